"""Reading Transformers' continuous batching: one record per turn of the generation loop.

One process; the loop runs in a thread of its own. A turn is prepare_next_batch (which schedules) ->
_generation_step -> update_batch. Composition runs right after the forward pass returned: on an accelerator
it is still computing then.
"""

# [cut
from latencyprism.agent.probe.core import find_class, now_ns, size
from latencyprism.records.ring import KIND_STEP
from latencyprism.records.step import NULL

# cut]

KNOWN_REQUESTS_LIMIT = 4096


class LoopReader:
    def __init__(self, probe):
        self.probe = probe
        self.step = 0
        self.last_end = 0
        self.gc_seen = probe.gc_ns
        self.known = set()
        self.own_before = 0
        self.clear()

    def clear(self):
        self.prepare_start = self.prepare_end = 0
        self.step_start = self.step_end = 0
        self.schedule_ns = 0
        self.work = None
        self.own_ns = 0

    def wrap_schedule(self, original):
        probe, reader = self.probe, self

        def schedule_batch(scheduler, *args, **kwargs):
            if not probe.alive:
                return original(scheduler, *args, **kwargs)
            start = now_ns()
            result = original(scheduler, *args, **kwargs)
            end = now_ns()
            try:
                reader.schedule_ns += end - start
                if result[0]:
                    reader.work = reader.compose(scheduler, result[0])
                reader.own_ns += now_ns() - end
            except Exception:
                probe.error()
            return result

        return schedule_batch

    def compose(self, scheduler, futures):
        """Must read before the batch tensors are prepared: that advances position_offset."""
        prefill_requests = prefill_tokens = decode_tokens = cached_tokens = 0
        context_tokens = attention_work = outputs = 0
        for future in futures:
            state = future.state
            tokens = future.query_length
            computed = state.position_offset
            context_tokens += computed + tokens
            if future.has_new_token:
                outputs += 1
            if size(state.generated_tokens) == 0:
                prefill_requests += 1
                prefill_tokens += tokens
                attention_work += tokens * (computed + tokens)
                if state.request_id not in self.known:
                    self.known.add(state.request_id)
                    cached_tokens += computed
            else:
                decode_tokens += tokens
        if len(self.known) > KNOWN_REQUESTS_LIMIT:
            self.known &= set(scheduler.active_requests)
        requests = len(futures)
        return (
            requests, prefill_requests, requests - prefill_requests, prefill_tokens, decode_tokens,
            cached_tokens, context_tokens, attention_work, outputs,
        )  # fmt: skip

    def wrap_prepare(self, original):
        probe, reader = self.probe, self

        def prepare_next_batch(processor, *args, **kwargs):
            if not probe.alive:
                return original(processor, *args, **kwargs)
            reader.clear()
            start = now_ns()
            result = original(processor, *args, **kwargs)
            reader.prepare_end = now_ns()
            reader.prepare_start = start
            return result

        return prepare_next_batch

    def wrap_step(self, original):
        probe, reader = self.probe, self

        def _generation_step(processor, *args, **kwargs):
            if not probe.alive:
                return original(processor, *args, **kwargs)
            reader.step_start = now_ns()
            result = original(processor, *args, **kwargs)
            reader.step_end = now_ns()
            return result

        return _generation_step

    def wrap_update(self, original):
        probe, reader = self.probe, self

        def update_batch(processor, *args, **kwargs):
            if not probe.alive:
                return original(processor, *args, **kwargs)
            start = now_ns()
            active = size(getattr(processor.scheduler, "active_requests", None))
            result = original(processor, *args, **kwargs)
            end = now_ns()
            try:
                if reader.prepare_start and reader.step_start and reader.work is not None:
                    reader.emit(processor.scheduler, start, end, active)
                else:
                    probe.dropped()
                reader.clear()
            except Exception:
                probe.error()
            return result

        return update_batch

    def emit(self, scheduler, update_start, end, active_before):
        probe = self.probe
        work = self.work
        gc_ns = probe.gc_ns - self.gc_seen
        self.gc_seen = probe.gc_ns
        start = self.prepare_start
        gap = start - self.last_end if 0 < self.last_end <= start else NULL
        self.last_end = end
        step = self.step
        self.step = step + 1
        running = size(scheduler.active_requests)
        probe.emit(KIND_STEP, (
            step, start, end,
            work[0], work[1], work[2], work[3], work[4], work[5], work[6], work[7],
            NULL, NULL, NULL,
            running, size(scheduler.waiting_requests), NULL,
            self.prepare_end - start, self.step_end - self.prepare_end, NULL, end - update_start, gap, gc_ns,
            work[8], NULL, max(active_before - running, 0), self.prepare_end, self.own_before,
            self.own_before,
        ))  # fmt: skip
        if probe.alive:
            self.own_before = self.own_ns + now_ns() - end
            probe.cost(self.own_before, self.own_before)


def reader(probe, config):
    """Install the pack's hooks; returns those that were not found."""
    loop = LoopReader(probe)
    makers = {
        "update": loop.wrap_update, "step": loop.wrap_step,
        "schedule": loop.wrap_schedule, "prepare": loop.wrap_prepare,
    }  # fmt: skip
    missing = []
    for name, make in makers.items():
        module, class_names, method = config["hooks"][name]
        found = False
        for class_name in class_names.split("|"):
            owner = find_class(module, class_name)
            if owner is not None and callable(vars(owner).get(method)):
                probe.wrap(owner, method, make)
                found = True
        if not found:
            missing.append("%s.%s.%s" % (module, class_names, method))
    return missing
