"""Reading TGI's Python server: one record per Prefill or Decode call of its router.

Each shard is a process of its own and serves the router's calls one after another in its event loop: a call
makes or joins a batch (``schedule_ns``), gives it to ``generate_token`` of the model, and packs the answer.
Prefill and Decode themselves cannot be hooked: gRPC has kept them bound since before attach. The interceptor
around every call is looked up each time, so there a step begins and ends. The first shard writes steps, the
others model runs. Of a call nothing but its name is looked at, of tokens nothing but how many. The queue of
requests is in the router, which is no Python: nothing here tells how many wait.
"""

# isort: off
# [cut
from latencyprism.agent.probe.core import find_class, now_ns, size
from latencyprism.records.ring import KIND_STEP, KIND_WORKER
from latencyprism.records.step import NULL

# cut]
# isort: on
from _operator import attrgetter

PREFILL, DECODE = "Prefill", "Decode"
UNFINISHED_LIMIT = 4096
TEXT = attrgetter("generated_text")
REQUESTS = attrgetter("requests")


def whole(value):
    """A plain int, else NULL; a tensor is never asked, since that may wait for the device."""
    return value if type(value) is int else NULL


def draft_width(batch):
    """Drafts that each request has verified in this step. Of their tensor only the shape is read."""
    drafts = batch.speculative_ids
    return 0 if drafts is None else whole(drafts.shape[1])


def lengths_of(batch):
    """(tokens with a place in the cache, tokens of prompts and outputs) of all requests."""
    return sum(batch.cache_lengths), sum(map(len, batch.all_input_ids))


class Turn:
    """One call of the router. ``work``: (requests, prefill requests, decode requests, prefill tokens, decode
    tokens, cached tokens, context tokens, attention work, draft tokens); ``lengths`` only with drafts."""

    __slots__ = (
        "accepted", "execute_ns", "generate_end", "generate_start", "kind", "lengths", "outputs", "over",
        "own_ns", "work",
    )  # fmt: skip


class ShardReader:
    def __init__(self, probe, config):
        self.probe = probe
        self.rank = config["rank"]
        self.steps = config["role"].startswith("engine")
        self.turn = None
        self.cache = None
        self.unfinished = set()
        self.step = 0
        self.last_end = 0
        self.gc_seen = probe.gc_ns
        self.own_before = 0

    # -- hooks ---------------------------------------------------------------------------------------

    def on_call(self, args):
        """The call's name is the last parameter; the request before it is the user's."""
        name = args[4]
        kind = name[name.rfind("/") + 1 :] if type(name) is str else None
        if kind != PREFILL and kind != DECODE:
            return None
        turn = self.turn = Turn()
        turn.kind, turn.work, turn.generate_end = kind, None, 0
        return turn

    def on_generate(self, args):
        turn = self.turn
        if turn is None:
            return None  # warming up
        begun = now_ns()
        turn.work = self.compose(turn, args[1])
        turn.own_ns = now_ns() - begun
        return turn

    def on_generated(self, turn, args, result, start, end):
        if turn is None:
            return
        begun = now_ns()
        turn.generate_start, turn.generate_end = start, end
        forward_ns = whole(result[2][0])
        turn.execute_ns = forward_ns if 0 <= forward_ns <= end - start else NULL
        self.count_results(turn, args[0], args[1], result)
        turn.own_ns += now_ns() - begun

    def on_kept(self, args):
        self.cache = args[0].cache

    def on_called(self, turn, args, result, start, end):
        if turn is None:
            return
        if self.turn is turn:
            self.turn = None
        if not turn.generate_end:
            self.probe.dropped()
        elif self.steps:
            self.emit_step(turn, start, end)
        else:
            self.emit_run(turn)

    # -- composition ---------------------------------------------------------------------------------

    def compose(self, turn, batch):
        if type(getattr(batch, "prefilling_mask", None)) is not list:
            return self.compose_padded(turn, batch)
        count = len(batch.requests)
        taken, before = batch.input_lengths, batch.cache_lengths
        context = sum(taken) + sum(before)
        if batch.prefilling is not True:
            turn.lengths = None
            width = draft_width(batch)
            if width == NULL:
                return (count, 0, count, 0, NULL, 0, NULL, 0, NULL)
            drafts = count * width
            if drafts:
                turn.lengths = lengths_of(batch)
            return (count, 0, count, 0, count + drafts, 0, context + drafts, 0, drafts)
        turn.lengths = None
        return self.compose_prefill(batch, count, context)

    def compose_prefill(self, batch, count, context):
        prefills = tokens = attention = cached = 0
        for request, prefilling, taken, before in zip(
            batch.requests, batch.prefilling_mask, batch.input_lengths, batch.cache_lengths
        ):
            if prefilling:
                prefills += 1
                tokens += taken
                attention += taken * (before + taken)
                if before and not (self.unfinished and request.id in self.unfinished):
                    cached += before  # else a later chunk: what was computed is its own
        decodes = count - prefills
        return (count, prefills, decodes, tokens, decodes, cached, context, attention, 0)

    def compose_padded(self, turn, batch):
        """Batches without paged attention: all of one is prefill or all of it is decode; no prefix is kept.
        Of paged ones in an earlier form only the requests are known."""
        turn.lengths = None
        count = size(batch.requests)
        lengths = getattr(batch, "input_lengths", None)
        if type(lengths) is not list or getattr(batch, "block_tables", None) is not None:
            return (count, *[NULL] * 8)
        tokens = sum(lengths)
        if turn.kind == PREFILL:
            attention = sum([length * length for length in lengths])
            return (count, count, 0, tokens, 0, 0, tokens, attention, 0)
        decoded = getattr(batch, "decoder_input_lengths", None)  # beside those of an encoder
        context = tokens + sum(decoded) if type(decoded) is list else tokens
        return (count, 0, count, 0, count, 0, context, 0, 0)

    def count_results(self, turn, model, batch, result):
        """Outputs, accepted drafts, and how many requests are over; a shard packs the answers of its own
        share of the requests, so that one of several does not know the last."""
        count, drafts = turn.work[0], turn.work[8]
        generations, left = result[0], result[1]
        turn.over = turn.accepted = turn.outputs = NULL
        if left is None:
            turn.over = count
        elif whole(model.world_size) == 1:
            turn.over = len([None for text in map(TEXT, generations) if text is not None])
        if turn.lengths is not None:
            before, after = turn.lengths, lengths_of(batch)
            turn.accepted = after[0] - before[0] - count
            turn.outputs = after[1] - before[1]
        elif drafts == 0:
            turn.outputs = count - self.note_unfinished(batch)

    def note_unfinished(self, batch):
        """How many of the batch have prompt left; their ids are kept until it has none."""
        mask = getattr(batch, "prefilling_mask", None)
        still = mask.count(True) if type(mask) is list else 0
        if still or self.unfinished:
            if len(self.unfinished) > UNFINISHED_LIMIT:
                self.unfinished.clear()  # of requests that were cancelled
            for request, prefilling in zip(batch.requests, mask or ()):
                (self.unfinished.add if prefilling else self.unfinished.discard)(request.id)
        return still

    # -- records -------------------------------------------------------------------------------------

    def emit_step(self, turn, start, end):
        probe, work = self.probe, turn.work
        gc_ns = probe.gc_ns - self.gc_seen
        self.gc_seen = probe.gc_ns
        gap = start - self.last_end if 0 < self.last_end <= start else NULL
        self.last_end = end
        step = self.step
        self.step = step + 1
        generated, execute_ns = turn.generate_start, turn.execute_ns
        update_ns = NULL if execute_ns == NULL else end - generated - execute_ns
        probe.emit(KIND_STEP, (
            step, start, end,
            work[0], work[1], work[2], work[3], work[4], work[5], work[6], work[7],
            work[8], turn.accepted, NULL, self.running(turn), NULL, NULL,
            generated - start, execute_ns, NULL, update_ns, gap, gc_ns,
            turn.outputs, NULL, turn.over, generated, self.own_before, self.own_before,
        ))  # fmt: skip
        if probe.alive:
            self.own_before = now_ns() - end + turn.own_ns
            probe.cost(self.own_before, self.own_before)

    def emit_run(self, turn):
        probe = self.probe
        begun = now_ns()
        gc_ns = probe.gc_ns - self.gc_seen
        self.gc_seen = probe.gc_ns
        prefill, decode = turn.work[3], turn.work[4]
        tokens = NULL if NULL in (prefill, decode) else prefill + decode
        probe.emit(KIND_WORKER, (
            self.rank, turn.generate_start, turn.generate_end, NULL, NULL, tokens, gc_ns, self.own_before,
        ))  # fmt: skip
        if probe.alive:
            self.own_before = now_ns() - begun + turn.own_ns
            probe.cost(self.own_before, self.own_before)

    def running(self, turn):
        """Requests of all batches that the shard keeps for the next calls, less those of this one that are
        over: the router has them taken out before it goes on."""
        if self.cache is None:
            return NULL
        kept = sum(map(size, map(REQUESTS, self.cache.values())))
        if turn.over == NULL:
            return NULL
        return kept if turn.over == turn.work[0] else kept - turn.over


def reader(probe, config):
    """Install the pack's hooks; what could not be hooked is told through ``probe.refused``. Of the kinds of
    models only those are hooked that this server has loaded."""
    shard = ShardReader(probe, config)
    hooks = config["hooks"]
    kinds = [name for name in hooks if name.startswith("generate")]
    loaded = [name for name in kinds if find_class(hooks[name][0], hooks[name][1]) is not None]
    callbacks = {"call": (shard.on_call, shard.on_called), "keep": (shard.on_kept, None)}
    callbacks.update((name, (shard.on_generate, shard.on_generated)) for name in loaded or kinds)
    # The end of a step before its beginning: one that begins between two hooks must not look whole.
    for name in ("keep", *(loaded or kinds), "call"):
        if name in hooks:
            enter, leave = callbacks[name]
            probe.observe_named(hooks[name], enter, leave)
    return []
