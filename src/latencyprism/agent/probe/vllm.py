"""Reading vLLM V1: one record per scheduler output, one per model execution in a worker, and what happens to
single requests.

Composition runs where EngineCore waits for the worker anyway (``get_grammar_bitmask`` is called after the
launch and before the wait); only stashing and packing are on the critical path. Sums over requests are left
to built-in functions and to vLLM's own totals; Python looks at single requests only where they are no plain
decodes. Steps are keyed by the scheduler output object, so that several in flight (pipeline parallel, async
scheduling) pair right.
"""

# [cut
from latencyprism.agent.probe.core import find_class, now_ns, size
from latencyprism.agent.probe.request_log import RequestLog, monotonic_of
from latencyprism.agent.probe.vllm_api import ApiReader
from latencyprism.records.ring import (
    KIND_STEP,
    KIND_WORKER,
    REQUEST_ADDED,
    REQUEST_ENDED,
    REQUEST_PAUSED,
    REQUEST_SCHEDULED,
    REQUEST_TOKENS,
    REQUEST_UNEVEN,
)
from latencyprism.records.step import NULL

# cut]

MAX_IN_FLIGHT = 64
MAX_TURNS = 32
"""Requests of one step that may start or stop taking part without having been preempted. More is taken for a
scheme (pipeline micro-batches), in which following single requests would cost too much."""
NOTHING = []
# vLLM's names of the final states; the values are places in records.request.FINISH_REASONS.
REASONS = {
    "FINISHED_STOPPED": 0, "FINISHED_LENGTH_CAPPED": 1, "FINISHED_IGNORED": 1, "FINISHED_ABORTED": 2,
    "FINISHED_ERROR": 3, "FINISHED_REPETITION": 4,
}  # fmt: skip


def compose(scheduled, prefills):
    """What a step is made of, from the scheduler's output alone: counts, never contents.

    Returns (requests, prefill requests, decode requests, prefill tokens, decode tokens, cached tokens,
    context tokens, attention work, draft tokens); appends (request id, computed, tokens, begins) of each
    request that is no plain decode to ``prefills``."""
    tokens_of = scheduled.num_scheduled_tokens
    again = scheduled.scheduled_cached_reqs
    total = scheduled.total_num_scheduled_tokens
    requests = len(tokens_of)
    context_tokens = total + sum(again.num_computed_tokens)
    resumed = again.resumed_req_ids
    new_requests = scheduled.scheduled_new_reqs
    if total == requests and not new_requests and not resumed and all(again.num_output_tokens):
        return (requests, 0, requests, 0, requests, 0, context_tokens, 0, 0)
    prefill_tokens = cached_tokens = attention_work = 0
    for new in new_requests:
        tokens = tokens_of[new.req_id]
        computed = new.num_computed_tokens
        cached_tokens += computed
        context_tokens += computed
        attention_work += tokens * (computed + tokens)
        prefill_tokens += tokens
        prefills.append((new.req_id, computed, tokens, True))
    ids = again.req_ids
    places = unusual(
        again, tokens_of, scheduled.scheduled_spec_decode_tokens, total - prefill_tokens, new_requests
    )
    for place in places:
        request = ids[place]
        tokens = tokens_of[request]
        computed = again.num_computed_tokens[place]
        attention_work += tokens * (computed + tokens)
        prefill_tokens += tokens
        if request in resumed:
            cached_tokens += computed
        prefills.append((request, computed, tokens, False))
    decode_requests = len(ids) - len(places)
    decode_tokens = total - prefill_tokens
    return (
        len(new_requests) + len(ids), len(new_requests) + len(places), decode_requests,
        prefill_tokens, decode_tokens, cached_tokens, context_tokens, attention_work,
        decode_tokens - decode_requests,
    )  # fmt: skip


def unusual(again, tokens_of, drafts_of, tokens, new_requests):
    """Places in ``again`` of later chunks of prompts and of work recomputed after a preemption; ``tokens``:
    all that these requests were given."""
    ids = again.req_ids
    outputs = again.num_output_tokens
    places = set()
    if again.resumed_req_ids:
        places.update(place for place, request in enumerate(ids) if request in again.resumed_req_ids)
    place = -1
    for _ in range(outputs.count(0)):
        place = outputs.index(0, place + 1)
        places.add(place)
    # The others have one token each and their drafts on top; more is a later chunk of a recomputed prompt.
    excess = tokens - len(ids) - sum(tokens_of[ids[place]] - 1 for place in places)
    if excess and drafts_of:
        excess -= sum(map(tokens_of.__getitem__, drafts_of)) - len(drafts_of)
        prefilling = [ids[place] for place in places] + [new.req_id for new in new_requests]
        excess += sum(tokens_of[request] - 1 for request in prefilling if request in drafts_of)
    if excess:
        places.update(
            place for place, request in enumerate(ids) if tokens_of[request] != 1 and request not in drafts_of
        )
    return sorted(places)


class EngineReader:
    """What is seen of the scheduler, in the process that runs EngineCore."""

    def __init__(self, probe, config):
        self.probe = probe
        self.log = RequestLog(probe, config)
        self.in_flight = {}
        self.step = 0
        self.updated = NULL
        self.last_end = 0
        self.preempted = 0
        self.gc_seen = probe.gc_ns
        self.carry_ns = 0
        self.own_before = self.critical_before = 0
        self.following = probe.reading("requests")
        # Requests by id: the engine's own object, for as long as it may still change.
        self.requests = self.tracked = None
        self.added = []
        self.paused = []
        self.flowing = set()
        self.skipped = set()
        self.even = True

    # -- hooks ---------------------------------------------------------------------------------------

    def on_added(self, state, args, result, start, end):
        if self.tracked is not None and self.following.on:
            self.track(args[1], start)

    def on_scheduled(self, state, args, result, start, end):
        if len(self.in_flight) >= MAX_IN_FLIGHT:
            self.in_flight.clear()
            self.probe.late()
        scheduler = args[0]
        if self.tracked is None:
            self.adopt(scheduler)
        step = self.step
        self.step = step + 1
        self.in_flight[id(result)] = [
            result, start, end, step, len(scheduler.running), self.updated, now_ns() - end, None, NULL,
        ]  # fmt: skip

    def on_preempted(self, args):
        self.preempted += 1
        if self.following.on:
            self.paused.append(args[1].request_id)

    def on_waiting(self, args):
        stash = self.in_flight.get(id(args[1]))
        if stash is not None and stash[0] is args[1]:
            start = now_ns()
            self.prepare(args[0], stash)
            self.carry_ns += now_ns() - start

    def on_updated(self, state, args, result, update_start, end):
        probe, scheduler, scheduled = self.probe, args[0], args[1]
        stash = self.in_flight.pop(id(scheduled), None)
        if stash is None or stash[0] is not scheduled:
            probe.dropped()
            return
        if stash[7] is None:
            self.prepare(scheduler, stash)
        _, start, scheduled_at, step, _, _, stash_ns, work, usage = stash
        outputs, accepted = count_outputs(args[2].sampled_token_ids, work[8])
        gc_ns = probe.gc_ns
        last_end = self.last_end
        waiting_ns = self.carry_ns
        probe.emit(KIND_STEP, (
            step, start, end, *work, accepted, self.preempted,
            len(scheduler.running), size(scheduler.waiting), usage,
            scheduled_at - start, update_start - scheduled_at, NULL, end - update_start,
            start - last_end if 0 < last_end <= start else NULL, gc_ns - self.gc_seen,
            outputs, NULL, len(scheduled.finished_req_ids), scheduled_at, self.own_before,
            self.critical_before,
        ))  # fmt: skip
        self.last_end, self.updated, self.gc_seen = end, step, gc_ns
        self.preempted = self.carry_ns = 0
        if probe.alive:
            self.critical_before = stash_ns + now_ns() - end
            self.own_before = self.critical_before + waiting_ns
            probe.cost(self.own_before, self.critical_before)

    # -- requests ------------------------------------------------------------------------------------

    def adopt(self, scheduler):
        """Once: the requests that were there before the probe."""
        held = getattr(scheduler, "requests", None)
        self.requests = held if isinstance(held, dict) else {}
        self.tracked = dict(self.requests)
        self.added = [(request, NULL) for request in self.tracked.values()]
        self.flowing = {name for name, request in self.tracked.items() if len(request._output_token_ids)}

    def track(self, request, seen_ns):
        if self.tracked.get(request.request_id) is not request:
            self.tracked[request.request_id] = request
            self.added.append((request, seen_ns))

    def prepare(self, scheduler, stash):
        """Compose the step and note what changed for single requests."""
        prefills = []
        stash[7] = compose(stash[0], prefills)
        stash[8] = usage_ppm(scheduler)
        following = self.following
        if following.on:
            begun = now_ns()
            try:
                self.follow(scheduler, stash, prefills)
            except Exception:
                following.on = False  # what cannot be read once is not asked for again; steps go on
                self.probe.error()
            following.cost_ns += now_ns() - begun
        elif self.tracked:
            self.tracked, self.added, self.paused, self.flowing, self.skipped = {}, [], [], set(), set()

    def follow(self, scheduler, stash, prefills):
        scheduled, step = stash[0], stash[3]
        taking_part = len(scheduled.num_scheduled_tokens)
        if prefills or scheduled.finished_req_ids or self.added or self.paused:
            for name, _, _, begins in prefills:
                if begins and name in self.requests:
                    self.track(self.requests[name], stash[1])
            self.note_changes(scheduled, step, stash, prefills)
        if self.even and (self.skipped or stash[4] != taking_part):
            self.note_turns(scheduler, scheduled, step)
        if self.log.words:
            self.log.flush_when_due(step, not taking_part)

    def note_changes(self, scheduled, step, stash, prefills):
        log, tracked, flowing = self.log, self.tracked, self.flowing
        added, self.added = self.added, []
        for request, seen_ns in added:
            log.note(
                REQUEST_ADDED, request.request_id, monotonic_of(request.arrival_time, now_ns()), seen_ns,
                request.num_prompt_tokens, len(request._output_token_ids) if seen_ns == NULL else 0,
            )  # fmt: skip
        for name in scheduled.finished_req_ids:
            request = tracked.pop(name, None)
            if request is not None:
                log.note(
                    REQUEST_ENDED, name, stash[5], stash[1], len(request._output_token_ids),
                    REASONS.get(getattr(request.status, "name", ""), NULL),
                )  # fmt: skip
            log.forget(name)
            flowing.discard(name)
            self.skipped.discard(name)
        paused, self.paused = self.paused, []
        for name in paused:
            flowing.discard(name)
            if name in tracked:
                log.note(REQUEST_PAUSED, name, step, 1)
        for name, computed, tokens, begins in prefills:
            request = tracked.get(name)
            if request is None:
                continue
            if begins:
                log.note(REQUEST_SCHEDULED, name, step, computed)
            if computed + tokens >= request.num_prompt_tokens + len(request._output_token_ids):
                log.note(REQUEST_TOKENS, name, step)
                flowing.add(name)

    def note_turns(self, scheduler, scheduled, step):
        """Requests that run and yet take no part in this step, and those that do again."""
        taking_part = scheduled.num_scheduled_tokens
        skipped = {request.request_id for request in scheduler.running}.difference(taking_part)
        skipped &= self.flowing
        gone, back = skipped - self.skipped, self.skipped.intersection(taking_part)
        if len(gone) + len(back) > MAX_TURNS:
            self.even = False
            self.log.note(REQUEST_UNEVEN, "")
            return
        for name in gone:
            self.log.note(REQUEST_PAUSED, name, step, 0)
        for name in back:
            self.log.note(REQUEST_TOKENS, name, step)
        self.skipped = (self.skipped | gone) - back


def count_outputs(sampled, drafts):
    """(tokens that a step gave, of which accepted drafts). Without drafts no request gets more than one."""
    if not drafts:
        if sampled and type(sampled[0]) is list:
            return len(sampled) - sampled.count(NOTHING), NULL
        return sum(map(len, sampled)), NULL
    lengths = list(map(len, sampled))
    outputs = sum(lengths)
    return outputs, outputs - len(lengths) + lengths.count(0)


def usage_ppm(scheduler):
    """Share of KV cache blocks in use, parts per million."""
    try:
        return int(scheduler.kv_cache_manager.block_pool.get_usage() * 1e6)
    except AttributeError:
        return NULL


class WorkerReader:
    """What is seen of the worker's two calls a step, in every worker process."""

    def __init__(self, probe, rank):
        self.probe = probe
        self.rank = rank
        self.open = None
        self.gc_seen = probe.gc_ns
        self.own_before = 0

    def on_executed(self, state, args, result, start, end):
        tokens = args[1].total_num_scheduled_tokens
        if result is None and tokens:
            self.open = (start, end, tokens)
        else:
            self.emit(start, end, NULL, NULL, tokens)

    def on_sampled(self, state, args, result, start, end):
        if self.open is None:
            self.probe.dropped()
        else:
            opened, self.open = self.open, None
            self.emit(opened[0], opened[1], start, end, opened[2])

    def emit(self, start, end, sample_start, sample_end, tokens):
        probe = self.probe
        begun = now_ns()
        gc_ns = probe.gc_ns - self.gc_seen
        self.gc_seen = probe.gc_ns
        from_word = (self.rank, start, end, sample_start, sample_end, tokens, gc_ns, self.own_before)
        probe.emit(KIND_WORKER, from_word)
        if probe.alive:
            self.own_before = now_ns() - begun
            probe.cost(self.own_before, self.own_before)


def reader(probe, config):
    """Install what the pack names for this process's role; returns the hooks that were not found."""
    hooks = config["hooks"]
    callbacks = {}
    if config["role"] in ("engine", "engine+worker"):
        engine = EngineReader(probe, config)
        callbacks.update(
            schedule=(None, engine.on_scheduled), grammar=(engine.on_waiting, None),
            update=(None, engine.on_updated), preempt=(engine.on_preempted, None),
            add=(None, engine.on_added),
        )  # fmt: skip
    if config["role"] in ("worker", "engine+worker"):
        worker = WorkerReader(probe, config["rank"])
        callbacks.update(execute=(None, worker.on_executed), sample=(None, worker.on_sampled))
    if config["role"] == "api":
        api = ApiReader(probe, config)
        callbacks.update(receive=(None, api.on_received), deliver=(None, api.on_delivered))
    missing = []
    # Update before schedule: a step that begins between the two hooks must not look whole.
    for name in (
        "update",
        "grammar",
        "preempt",
        "add",
        "sample",
        "execute",
        "receive",
        "deliver",
        "schedule",
    ):
        if name not in callbacks or name not in hooks:
            continue
        module, class_name, method = hooks[name]
        owner = find_class(module, class_name)
        if owner is None or not callable(vars(owner).get(method)):
            missing.append("%s.%s.%s" % (module, class_name, method))
        else:
            enter, leave = callbacks[name]
            probe.observe(owner, method, enter=enter, leave=leave)
    return missing
