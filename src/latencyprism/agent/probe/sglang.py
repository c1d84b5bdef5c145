"""Reading SGLang's scheduler: one record per batch, from the choice of the batch to its processed result.

Each rank runs the whole loop in a process of its own. The replica's first rank writes steps, the others model
runs. In the overlap loop the result of a batch is processed after the launch of the next one, from a copy of
the batch: a batch is found again by the result object that ``run_batch`` returned, else by the batch itself,
else by its ``forward_iter``. Composition runs right after the launch, while the device computes; where a list
has an item for each request, only prefills are looked at singly.
"""

# isort: off
# [cut
from latencyprism.agent.probe.core import now_ns, size
from latencyprism.agent.probe.sglang_knobs import ChunkKnobs
from latencyprism.records.ring import KIND_STEP, KIND_WORKER
from latencyprism.records.step import NULL

# cut]
# isort: on
from _operator import attrgetter

MAX_IN_FLIGHT = 64
FINISHED = attrgetter("finished_reason")
OUTPUT = attrgetter("output_ids")
PROMPT = attrgetter("origin_input_ids")
EXTENDING = ("EXTEND", "MIXED", "SPLIT_PREFILL", "DLLM_EXTEND")
SCHEDULES = ("schedule", "schedule_prefill", "schedule_decode")


def whole(value):
    """A plain int, else NULL; a tensor is never asked, since that may wait for the device."""
    return value if type(value) is int else NULL


def ended(requests):
    return len([None for reason in map(FINISHED, requests) if reason is not None])


class Batch:
    """A batch from its launch until its result was processed.

    ``work``: (requests, prefill requests, decode requests, prefill tokens, decode tokens, cached tokens,
    context tokens, attention work, draft tokens, outputs)."""

    __slots__ = (
        "batch", "iteration", "merged", "mode", "own_ns", "requests", "result", "schedule_end", "speculates",
        "start", "started", "work",
    )  # fmt: skip


class SchedulerReader:
    def __init__(self, probe, config):
        self.probe = probe
        self.rank = config["rank"]
        self.steps = config["role"].startswith("engine")
        self.layout = config.get("layout", "drafts")
        self.in_flight = []
        self.step = 0
        self.last_end = 0
        self.retracted = 0
        self.chunked = None
        self.context = (None, 0, 0)
        self.spec_total = None
        self.scheduled = None
        self.gc_seen = probe.gc_ns
        self.usage_known = True
        self.own_before = self.critical_before = 0
        self.knobs = ChunkKnobs(probe) if self.steps else None

    # -- hooks ---------------------------------------------------------------------------------------

    def on_scheduled(self, state, args, result, start, end):
        self.scheduled = (start, end)
        for batch in self.in_flight:
            batch.merged = True

    def on_retracted(self, state, args, result, start, end):
        self.retracted += size(result[0])

    def on_run(self, args):
        """Before the launch: what the launch may change. No loop here, nothing waits yet."""
        batch = args[1]
        mode = batch.forward_mode._name_
        lists = (batch.prefix_lens, batch.extend_lens) if mode in EXTENDING else None
        if self.layout == "counters":
            self.spec_total = whole(args[0].spec_num_total_accepted_tokens)
        return mode, lists, whole(batch.seq_lens_sum)

    def on_ran(self, state, args, result, start, end):
        scheduler, batch = args[0], args[1]
        mode, lists, context = state
        begun = now_ns()
        seen = Batch()
        seen.batch, seen.result, seen.mode = batch, result, mode
        seen.iteration = getattr(batch, "forward_iter", None)
        seen.start, seen.schedule_end = self.scheduled or (start, NULL)
        self.scheduled = None
        seen.started = start
        seen.merged = False
        seen.requests = batch.reqs
        seen.speculates = batch.spec_algorithm is not None and batch.spec_algorithm._name_ != "NONE"
        seen.work = self.compose(scheduler, seen, batch, lists, context)
        if len(self.in_flight) >= MAX_IN_FLIGHT:
            del self.in_flight[0]
            self.probe.late()
        self.in_flight.append(seen)
        if self.knobs is not None:
            self.knobs.joining = size(seen.requests)
            self.knobs.look(scheduler)
        seen.own_ns = now_ns() - begun

    def on_process(self, args):
        """(batch in flight that this result is of, its requests that were over before). Only where another
        batch was chosen since its launch can one of them have ended, and it gets nothing of this result."""
        seen = self.take(args[1], args[2] if len(args) > 2 else None)
        return seen, ended(seen.requests) if seen is not None and seen.merged else 0

    def on_processed(self, state, args, result, start, end):
        seen, over_before = state
        if seen is None:
            # The overlap loop of early versions starts with a result that belongs to no batch.
            if args[1].forward_mode._name_ != "DUMMY_FIRST":
                self.probe.dropped()
        elif self.steps:
            self.emit_step(args[0], seen, args[2], over_before, start, end)
        else:
            self.emit_run(seen, end)

    def take(self, batch, result):
        """The batch in flight that this result is of, taken out; None for one launched before attach."""
        iteration = getattr(batch, "forward_iter", None)
        if type(iteration) is not int or iteration <= 0:
            iteration = None
        found = None
        for seen in self.in_flight:  # oldest first; one object may stand for several decode batches in flight
            if result is not None and seen.result is result:
                found = seen
                break
            if found is None and (seen.iteration == iteration if iteration else seen.batch is batch):
                found = seen
        # A split prefill is launched several times and processed once.
        split = found is not None and found.mode == "SPLIT_PREFILL"
        self.in_flight = [
            one for one in self.in_flight if one is not found and not (split and one.batch is found.batch)
        ]
        return found

    # -- composition ---------------------------------------------------------------------------------

    def compose(self, scheduler, seen, batch, lists, context):
        requests = batch.reqs
        count = len(requests)
        if lists is not None and lists[0] is not None:
            return self.compose_prefill(seen.mode, batch, requests, lists)
        if not count or seen.mode not in ("DECODE", "TARGET_VERIFY"):
            # Idle beside other ranks; or a mode whose tokens are not known from the batch.
            known = 0 if not count else NULL
            return (count, known, known, known, known, known, known, known, known, 0)
        if context == NULL or seen.speculates:
            context = self.context_of(requests, seen.speculates)
        drafts = 0
        if seen.speculates:
            width = self.draft_width(scheduler, seen.result)
            drafts = NULL if width == NULL else count * (width - 1)
        tokens = NULL if drafts == NULL else count + drafts
        if drafts > 0 and context != NULL:
            context += drafts
        return (count, 0, count, 0, tokens, 0, context, 0, drafts, count)

    def compose_prefill(self, mode, batch, requests, lists):
        before, taken = lists
        decoding = size(batch.decoding_reqs) if mode == "MIXED" and batch.decoding_reqs else 0
        prefills = len(requests) - decoding
        cached = attention = tokens = 0
        for request, computed, scheduled in zip(requests[:prefills], before, taken):
            tokens += scheduled
            attention += scheduled * (computed + scheduled)
            if request.rid != self.chunked:  # else a later chunk: what was computed is its own
                cached += computed
        part = batch.chunked_req
        self.chunked = None if part is None else part.rid
        unfinished = part is not None and any(request is part for request in requests)
        context = sum(before) + sum(taken)
        return (
            len(requests), prefills, decoding, tokens, decoding, cached, context, attention, 0,
            len(requests) - unfinished,
        )  # fmt: skip

    def context_of(self, requests, speculates):
        """Tokens of all requests, the one of this step included. From one decode step to the next of the same
        requests it grows by one each; else it is summed up anew."""
        last, count, known = self.context
        if last is requests and count == len(requests) and not speculates:
            known += count
        else:
            known = sum(map(len, map(PROMPT, requests))) + sum(map(len, map(OUTPUT, requests)))
            if self.in_flight:  # tokens that are computed and not yet handed out
                mine = set(map(id, requests))
                known += sum(len(mine.intersection(map(id, batch.requests))) for batch in self.in_flight)
        self.context = (requests, len(requests), known)
        return known

    def draft_width(self, scheduler, result):
        """Tokens that one request has verified in a step: its drafts and the one that is sure."""
        if self.layout == "drafts":
            return whole(getattr(result, "speculative_num_draft_tokens", None))
        return whole(scheduler.server_args.speculative_num_draft_tokens)

    def accepted_of(self, scheduler, seen, result):
        if not seen.work[8] or seen.work[8] == NULL:
            return NULL
        if self.layout == "drafts":
            return whole(result.num_correct_drafts)
        if self.layout == "accepted_drafts":
            return whole(result.num_accepted_drafts)
        if self.layout.startswith("accepted"):
            if self.layout == "accepted_sync" and result.accept_lens is not None:
                return NULL  # counted with the sure token by some, and without it by others
            return whole(result.num_accepted_tokens)
        total = whole(scheduler.spec_num_total_accepted_tokens)
        if NULL in (total, self.spec_total) or total < self.spec_total:
            return NULL
        return total - self.spec_total - seen.work[0]  # its count includes the token that is sure

    # -- records -------------------------------------------------------------------------------------

    def emit_step(self, scheduler, seen, result, over_before, process_start, end):
        probe, work = self.probe, seen.work
        over = ended(seen.requests) - over_before if seen.requests else 0
        accepted = self.accepted_of(scheduler, seen, result)
        outputs = work[9] - over_before
        if work[8]:
            outputs = NULL if accepted == NULL or over_before else outputs + accepted
        gc_ns = probe.gc_ns - self.gc_seen
        self.gc_seen = probe.gc_ns
        retracted, self.retracted = self.retracted, 0
        start = seen.start
        gap = start - self.last_end if 0 < self.last_end <= start else NULL
        self.last_end = end
        step = self.step
        self.step = step + 1
        scheduled_at = seen.started if seen.schedule_end == NULL else seen.schedule_end
        schedule_ns = NULL if seen.schedule_end == NULL else scheduled_at - start
        probe.emit(KIND_STEP, (
            step, start, end,
            work[0], work[1], work[2], work[3], work[4], work[5], work[6], work[7],
            work[8], accepted, retracted,
            self.running(scheduler, seen, over), size(scheduler.waiting_queue), self.usage_ppm(scheduler),
            schedule_ns, process_start - scheduled_at, NULL, end - process_start, gap, gc_ns,
            outputs, NULL, over, scheduled_at, self.own_before, self.critical_before,
        ))  # fmt: skip
        if probe.alive:
            self.critical_before = now_ns() - end
            self.own_before = self.critical_before + seen.own_ns
            probe.cost(self.own_before, self.critical_before)

    def emit_run(self, seen, end):
        probe = self.probe
        begun = now_ns()
        gc_ns = probe.gc_ns - self.gc_seen
        self.gc_seen = probe.gc_ns
        tokens = NULL if NULL in (seen.work[3], seen.work[4]) else seen.work[3] + seen.work[4]
        probe.emit(KIND_WORKER, (self.rank, seen.started, end, NULL, NULL, tokens, gc_ns, self.own_before))
        if probe.alive:
            self.own_before = now_ns() - begun + seen.own_ns
            probe.cost(self.own_before, self.own_before)

    def running(self, scheduler, seen, over):
        """Requests that go on after this step. Prefilled ones join the running batch when the next batch is
        chosen; those of batches in flight are there only in these."""
        running = scheduler.running_batch.reqs
        count = size(running)
        if seen.mode not in EXTENDING or seen.merged:
            count -= over
        elif running is not seen.requests:
            count += len(seen.requests) - over
        for batch in self.in_flight:
            if batch.mode in EXTENDING and not batch.merged:
                count += len(batch.requests)
        return max(count, 0)

    def usage_ppm(self, scheduler):
        """Share of the KV pool that is neither free nor a cached prefix nobody uses, parts per million."""
        if not self.usage_known:
            return NULL
        try:
            total = scheduler.max_total_num_tokens
            free = scheduler.token_to_kv_pool_allocator.available_size()
            return int((total - free - scheduler.tree_cache.evictable_size()) * 1e6 / total)
        except Exception:
            self.usage_known = False  # pools of several kinds: there is no one share
            return NULL


def reader(probe, config):
    """Install the pack's hooks; what could not be hooked is told through ``probe.refused``."""
    scheduler = SchedulerReader(probe, config)
    hooks = config["hooks"]
    callbacks = {
        "process": (scheduler.on_process, scheduler.on_processed), "retract": (None, scheduler.on_retracted),
        "run": (scheduler.on_run, scheduler.on_ran),
    }  # fmt: skip
    callbacks.update((name, (None, scheduler.on_scheduled)) for name in SCHEDULES)
    # The end of a step before its beginning: one that begins between two hooks must not look whole.
    for name, (enter, leave) in callbacks.items():
        if name in hooks:
            probe.observe_named(hooks[name], enter, leave)
    return []
