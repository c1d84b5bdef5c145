"""Reading vLLM V1: one record per scheduler output, one per model execution in a worker, and what happens to
single requests.

Composition runs where EngineCore waits for the worker anyway (``get_grammar_bitmask`` is called after the
launch and before the wait); only stashing and packing are on the critical path. Steps are keyed by the
scheduler output object, so that several in flight (pipeline parallel, async scheduling) pair right.
"""

# [cut
from latencyprism.agent.probe.core import find_class, now_ns, size
from latencyprism.agent.probe.knobs import Knobs
from latencyprism.agent.probe.vllm_api import ApiReader
from latencyprism.agent.probe.vllm_compose import Lists, count_outputs
from latencyprism.agent.probe.vllm_follow import Follower
from latencyprism.agent.probe.vllm_sums import Sums
from latencyprism.records.ring import KIND_STEP, KIND_WORKER
from latencyprism.records.step import NULL

# cut]

MAX_IN_FLIGHT = 64


class EngineReader:
    """What is seen of the scheduler, in the process that runs EngineCore."""

    def __init__(self, probe, config):
        self.probe = probe
        self.layout = config.get("layout", "outputs")
        # Without a call between launch and wait everything is read at once: when the step is over, the
        # requests that it ended are gone.
        self.at_once = "grammar" not in config["hooks"]
        self.following = probe.reading("requests")
        self.follower = Follower(probe, config)
        self.knobs = Knobs(probe)
        self.sums = Sums()
        self.sums.trusted = "preempt" in config["hooks"]
        self.in_flight = {}
        self.step = 0
        self.updated = NULL
        self.last_end = 0
        self.no_preemption = 0 if "preempt" in config["hooks"] else NULL
        self.preempted = self.no_preemption
        self.gc_seen = probe.gc_ns
        self.carry_ns = 0
        self.own_before = self.critical_before = 0
        self.begun = False

    # -- hooks ---------------------------------------------------------------------------------------

    def on_added(self, state, args, result, start, end):
        if self.begun and self.following.on:
            self.follower.track(args[1], start)

    def on_scheduled(self, state, args, result, start, end):
        if len(self.in_flight) >= MAX_IN_FLIGHT:
            self.in_flight.clear()
            self.probe.late()
        if not self.begun:
            self.begun = True
            self.follower.adopt(args[0])
        step = self.step
        self.step = step + 1
        stash = self.in_flight[id(result)] = [
            result, start, end, step, self.updated, 0, None, NULL, len(args[0].running), None,
        ]  # fmt: skip
        if self.at_once:
            self.prepare(args[0], stash)
        self.knobs.look(args[0])
        stash[5] = now_ns() - end

    def on_preempted(self, args):
        self.preempted += 1
        self.sums.preempted(args[1])
        if self.following.on:
            self.follower.paused.append(args[1].request_id)

    def on_waiting(self, args):
        stash = self.in_flight.get(id(args[1]))
        if stash is not None and stash[0] is args[1]:
            start = now_ns()
            self.prepare(args[0], stash)
            self.carry_ns += now_ns() - start

    def prepare(self, scheduler, stash):
        """Compose the step and note what changed for single requests."""
        scheduled = stash[0]
        again = scheduled.scheduled_cached_reqs
        if self.layout != "outputs":
            again = Lists(self.layout, again, self.follower.requests)
        prefills = []
        try:
            work, stash[9] = self.sums.compose(
                scheduled, again, stash[3], stash[8], self.follower.requests, prefills
            )
        except RuntimeError:
            self.probe.error()
            prefills.clear()
            work, _ = self.sums.compose(
                scheduled, again, stash[3], stash[8], self.follower.requests, prefills
            )
        stash[6] = work
        stash[7] = usage_ppm(scheduler)
        following = self.following
        if following.on:
            begun = now_ns()
            try:
                self.follower.follow(
                    scheduled, stash[3], stash[1], stash[4], work, prefills, again.resumed_req_ids
                )
            except Exception:
                following.on = False  # what cannot be read once is not asked for again; steps go on
                self.probe.error()
            following.cost_ns += now_ns() - begun
        elif self.follower.tracked:
            self.follower.clear()

    def on_updated(self, state, args, result, update_start, end):
        probe, scheduler, scheduled = self.probe, args[0], args[1]
        stash = self.in_flight.pop(id(scheduled), None)
        if stash is None or stash[0] is not scheduled:
            probe.dropped()
            return
        if stash[6] is None:
            self.prepare(scheduler, stash)
        _, start, scheduled_at, step, _, stash_ns, work, usage, _, without = stash
        sampled = args[2].sampled_token_ids
        if without is not None and len(sampled) == work[0]:
            outputs, accepted = work[0] - without, NULL
        else:
            outputs, accepted = count_outputs(sampled, work[8])
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
        self.preempted, self.carry_ns = self.no_preemption, 0
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
    """What is seen of the worker's two calls a step, in every worker process; one call in older versions."""

    def __init__(self, probe, config):
        self.probe = probe
        self.rank = config["rank"]
        self.samples_apart = "sample" in config["hooks"]
        self.open = None
        self.gc_seen = probe.gc_ns
        self.own_before = 0

    def on_executed(self, state, args, result, start, end):
        tokens = args[1].total_num_scheduled_tokens
        if result is None and tokens and self.samples_apart:
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
        worker = WorkerReader(probe, config)
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
            reading = engine.following if name == "add" else None
            probe.observe(owner, method, enter=enter, leave=leave, reading=reading)
    return missing
