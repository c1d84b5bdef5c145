"""Reading vLLM V1: one record per scheduler output, one per model execution in a worker.

The composition loop runs where EngineCore waits for the worker anyway (``get_grammar_bitmask`` is called
after the launch and before the wait); only stashing and packing are on the critical path. Steps are keyed
by the scheduler output object, so that several in flight (pipeline parallel, async scheduling) pair right.
"""

# [cut
from latencyprism.agent.probe.core import find_class, now_ns, size
from latencyprism.records.ring import KIND_STEP, KIND_WORKER
from latencyprism.records.step import NULL

# cut]

MAX_IN_FLIGHT = 64


def compose(scheduled):
    """What a step is made of, from the scheduler's output alone: counts, never contents.

    Returns (requests, prefill requests, decode requests, prefill tokens, decode tokens, cached tokens,
    context tokens, attention work, draft tokens)."""
    tokens_of = scheduled.num_scheduled_tokens
    drafts_of = scheduled.scheduled_spec_decode_tokens
    prefill_requests = decode_requests = prefill_tokens = decode_tokens = 0
    cached_tokens = context_tokens = attention_work = draft_tokens = 0
    for new in scheduled.scheduled_new_reqs:
        tokens = tokens_of[new.req_id]
        computed = new.num_computed_tokens
        cached_tokens += computed
        context_tokens += computed + tokens
        attention_work += tokens * (computed + tokens)
        prefill_tokens += tokens
        prefill_requests += 1
    again = scheduled.scheduled_cached_reqs
    resumed = again.resumed_req_ids
    for request, computed, output in zip(again.req_ids, again.num_computed_tokens, again.num_output_tokens):
        tokens = tokens_of[request]
        context_tokens += computed + tokens
        if output and tokens == 1 and request not in resumed:
            decode_requests += 1
            decode_tokens += 1
        elif output and request in drafts_of and request not in resumed:
            decode_requests += 1
            decode_tokens += tokens
            draft_tokens += tokens - 1
        else:  # a later chunk of a prompt, or work recomputed after a preemption
            prefill_requests += 1
            prefill_tokens += tokens
            attention_work += tokens * (computed + tokens)
            if request in resumed:
                cached_tokens += computed
    return (
        prefill_requests + decode_requests, prefill_requests, decode_requests, prefill_tokens, decode_tokens,
        cached_tokens, context_tokens, attention_work, draft_tokens,
    )  # fmt: skip


class EngineReader:
    """Wraps of the scheduler, in the process that runs EngineCore."""

    def __init__(self, probe):
        self.probe = probe
        self.in_flight = {}
        self.step = 0
        self.last_end = 0
        self.preempted = 0
        self.gc_seen = probe.gc_ns
        self.carry_ns = 0
        self.own_before = self.critical_before = 0

    def wrap_schedule(self, original):
        probe, reader = self.probe, self

        def schedule(scheduler, *args, **kwargs):
            if not probe.alive:
                return original(scheduler, *args, **kwargs)
            start = now_ns()
            scheduled = original(scheduler, *args, **kwargs)
            end = now_ns()
            try:
                if len(reader.in_flight) >= MAX_IN_FLIGHT:
                    reader.in_flight.clear()
                    probe.late()
                reader.in_flight[id(scheduled)] = [scheduled, start, end, None, now_ns() - end]
            except Exception:
                probe.error()
            return scheduled

        return schedule

    def wrap_preempt(self, original):
        reader = self

        def _preempt_request(*args, **kwargs):
            reader.preempted += 1
            return original(*args, **kwargs)

        return _preempt_request

    def wrap_grammar(self, original):
        probe, reader = self.probe, self

        def get_grammar_bitmask(scheduler, scheduled, *args, **kwargs):
            if probe.alive:
                try:
                    start = now_ns()
                    stash = reader.in_flight.get(id(scheduled))
                    if stash is not None and stash[0] is scheduled:
                        stash[3] = compose(scheduled)
                        reader.carry_ns += now_ns() - start
                except Exception:
                    probe.error()
            return original(scheduler, scheduled, *args, **kwargs)

        return get_grammar_bitmask

    def wrap_update(self, original):
        probe, reader = self.probe, self

        def update_from_output(scheduler, scheduled, output, *args, **kwargs):
            if not probe.alive:
                return original(scheduler, scheduled, output, *args, **kwargs)
            start = now_ns()
            result = original(scheduler, scheduled, output, *args, **kwargs)
            end = now_ns()
            try:
                stash = reader.in_flight.pop(id(scheduled), None)
                if stash is None or stash[0] is not scheduled:
                    probe.dropped()
                else:
                    reader.emit(scheduler, scheduled, output, stash, start, end)
            except Exception:
                probe.error()
            return result

        return update_from_output

    def emit(self, scheduler, scheduled, output, stash, update_start, end):
        probe = self.probe
        _, start, scheduled_at, work, stash_ns = stash
        if work is None:
            work = compose(scheduled)
        accepted = NULL
        outputs = 0
        sampled = output.sampled_token_ids
        for tokens in sampled:
            outputs += size(tokens)
        if work[8]:
            accepted = 0
            for request in scheduled.scheduled_spec_decode_tokens:
                index = output.req_id_to_index.get(request)
                if index is not None:
                    accepted += max(size(sampled[index]) - 1, 0)
        gc_ns = probe.gc_ns - self.gc_seen
        self.gc_seen = probe.gc_ns
        preempted, self.preempted = self.preempted, 0
        gap = start - self.last_end if 0 < self.last_end <= start else NULL
        self.last_end = end
        step = self.step
        self.step = step + 1
        waiting_ns, self.carry_ns = self.carry_ns, 0
        probe.emit(KIND_STEP, (
            step, start, end,
            work[0], work[1], work[2], work[3], work[4], work[5], work[6], work[7],
            work[8], accepted, preempted,
            len(scheduler.running), size(scheduler.waiting), usage_ppm(scheduler),
            scheduled_at - start, update_start - scheduled_at, NULL, end - update_start, gap, gc_ns,
            outputs, NULL, len(scheduled.finished_req_ids), scheduled_at, self.own_before,
            self.critical_before,
        ))  # fmt: skip
        if probe.alive:
            self.critical_before = stash_ns + now_ns() - end
            self.own_before = self.critical_before + waiting_ns
            probe.cost(self.own_before, self.critical_before)


def usage_ppm(scheduler):
    """Share of KV cache blocks in use, parts per million."""
    try:
        return int(scheduler.kv_cache_manager.block_pool.get_usage() * 1e6)
    except AttributeError:
        return NULL


class WorkerReader:
    """Wraps of the worker's two calls a step, in every worker process."""

    def __init__(self, probe, rank):
        self.probe = probe
        self.rank = rank
        self.open = None
        self.gc_seen = probe.gc_ns
        self.own_before = 0

    def wrap_execute(self, original):
        probe, reader = self.probe, self

        def execute_model(worker, scheduled, *args, **kwargs):
            if not probe.alive:
                return original(worker, scheduled, *args, **kwargs)
            start = now_ns()
            result = original(worker, scheduled, *args, **kwargs)
            end = now_ns()
            try:
                tokens = scheduled.total_num_scheduled_tokens
                if result is None and tokens:
                    reader.open = (start, end, tokens)
                else:
                    reader.emit(start, end, NULL, NULL, tokens)
            except Exception:
                probe.error()
            return result

        return execute_model

    def wrap_sample(self, original):
        probe, reader = self.probe, self

        def sample_tokens(worker, *args, **kwargs):
            if not probe.alive:
                return original(worker, *args, **kwargs)
            start = now_ns()
            result = original(worker, *args, **kwargs)
            end = now_ns()
            try:
                if reader.open is None:
                    probe.dropped()
                else:
                    opened, reader.open = reader.open, None
                    reader.emit(opened[0], opened[1], start, end, opened[2])
            except Exception:
                probe.error()
            return result

        return sample_tokens

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
    missing = []
    makers = {}
    if config["role"] in ("engine", "engine+worker"):
        engine = EngineReader(probe)
        makers.update(
            schedule=engine.wrap_schedule, grammar=engine.wrap_grammar,
            update=engine.wrap_update, preempt=engine.wrap_preempt,
        )  # fmt: skip
    if config["role"] in ("worker", "engine+worker"):
        worker = WorkerReader(probe, config["rank"])
        makers.update(execute=worker.wrap_execute, sample=worker.wrap_sample)
    # Update before schedule: a step that begins between the two wraps must not look whole.
    for name in ("update", "grammar", "preempt", "sample", "execute", "schedule"):
        if name not in makers:
            continue
        module, class_name, method = hooks[name]
        owner = find_class(module, class_name)
        if owner is None or not callable(vars(owner).get(method)):
            missing.append("%s.%s.%s" % (module, class_name, method))
        else:
            probe.wrap(owner, method, makers[name])
    return missing
