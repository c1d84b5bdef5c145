"""Reading vLLM V1: one record per scheduler output, one per model execution in a worker, and what happens to
single requests.

Composition runs where EngineCore waits for the worker anyway (``get_grammar_bitmask`` is called after the
launch and before the wait); only stashing and packing are on the critical path. Steps are keyed by the
scheduler output object, so that several in flight (pipeline parallel, async scheduling) pair right.
"""

# [cut
from latencyprism.agent.probe.core import find_class, size
from latencyprism.agent.probe.knobs import Knobs
from latencyprism.agent.probe.lane import PLAIN, quick_put
from latencyprism.agent.probe.prelude import now_ns
from latencyprism.agent.probe.vllm_api import ApiReader
from latencyprism.agent.probe.vllm_compose import Lists, count_outputs
from latencyprism.agent.probe.vllm_follow import Follower
from latencyprism.agent.probe.vllm_sums import Sums
from latencyprism.records.ring import (
    DECODE_WIRE_WORDS,
    KIND_DECODE,
    KIND_STEP,
    KIND_WORKER,
    STEP_WIRE_WORDS,
    WORKER_WIRE_WORDS,
)
from latencyprism.records.step import NULL

# cut]

MAX_IN_FLIGHT = 64
TEND_MASK, TEND_NS = 3, 50_000_000
"""Lease, commands and budget are looked at in every fourth step, and once this time has passed."""


class EngineReader:
    """What is seen of the scheduler, in the process that runs EngineCore.

    ``in_flight``: by id of the scheduler's output, [it, start, end of scheduling, step, last step whose
    output was processed, work, how many requests get no token, how many run, KV usage, own time, critical own
    time]; work is the tuple of ``compose``, or the context tokens alone where each request decodes, None at
    first. ``critical``, ``waiting``: the hooks, whose cost is what a step costs."""

    __slots__ = (
        "accounted_ns", "at_once", "begun", "busy_ns", "critical", "critical_seen", "critical_told",
        "follower", "following", "gc_seen", "in_flight", "knobs", "last_end", "last_start", "layout",
        "no_preemption", "preempted", "probe", "put", "put_decode", "step", "steps", "sums", "tended_ns",
        "updated", "waiting", "waiting_seen", "waiting_told",
    )  # fmt: skip

    def __init__(self, probe, config):
        self.probe = probe
        self.put = quick_put(probe, KIND_STEP, STEP_WIRE_WORDS)
        self.put_decode = quick_put(probe, KIND_DECODE, DECODE_WIRE_WORDS)
        self.layout = config.get("layout", "outputs")
        # Without a call between launch and wait everything is read at once: when the step is over, the
        # requests that it ended are gone.
        self.at_once = "grammar" not in config["hooks"]
        self.following = probe.reading("requests")
        self.follower = Follower(probe, config, tended=True)
        self.knobs = Knobs(probe)
        self.sums = Sums()
        self.sums.trusted = "preempt" in config["hooks"]
        self.in_flight = {}
        self.critical, self.waiting = [], []
        self.step = self.steps = 0
        self.updated = NULL
        self.last_start = self.last_end = self.accounted_ns = self.busy_ns = self.tended_ns = 0
        self.no_preemption = 0 if "preempt" in config["hooks"] else NULL
        self.preempted = self.no_preemption
        self.gc_seen = probe.gc_ns
        self.critical_seen = self.waiting_seen = self.critical_told = self.waiting_told = 0
        self.begun = False

    # -- hooks ---------------------------------------------------------------------------------------

    def on_added(self, state, args, result, start, end):
        if self.begun and self.following.on:
            self.follower.track(args[1], start)

    def on_scheduled(self, state, args, result, start, end):
        if len(self.in_flight) >= MAX_IN_FLIGHT:
            self.in_flight.clear()
            self.probe.late()
        step = self.step
        self.step = step + 1
        stash = self.in_flight[id(result)] = [
            result, start, end, step, self.updated, None, None, len(args[0].running), NULL, 0, 0
        ]  # fmt: skip
        if not self.begun:
            self.begun = True
            self.follower.adopt(args[0])
        if self.at_once:
            self.prepare(args[0], stash)

    def on_preempted(self, args):
        self.preempted += 1
        self.sums.preempted(args[1])
        if self.following.on:
            self.follower.pause(args[1].request_id)

    def on_waiting(self, args):
        stash = self.in_flight.get(id(args[1]))
        if stash is not None and stash[0] is args[1]:
            self.prepare(args[0], stash)

    def prepare(self, scheduler, stash):
        """Everything of a step that need not wait for its end. Most steps give one more token to each of the
        same requests."""
        scheduled, _, _, step, _, _, _, running, _, _, _ = stash
        if not self.account(stash):
            return
        again = scheduled.scheduled_cached_reqs
        if self.layout != "outputs":
            again = Lists(self.layout, again, self.follower.requests)
        context = self.sums.goes_on(scheduled, again, step, running)
        if context >= 0 and self.follower.calm == running and self.following.on:
            stash[5], stash[6] = context, 0
            if self.follower.log.words:
                self.follower.log.flush_when_due(step, False)
        else:
            self.compose(scheduled, again, stash, context)
        stash[8] = usage_ppm(scheduler)
        self.knobs.look(scheduler)

    def account(self, stash):
        """What the probe has cost since this was called last; and, now and then, lease, commands and budget.
        False: the probe is gone."""
        critical_ns, waiting_ns = self.probe.stalled_ns, 0
        for hook in self.critical:
            critical_ns += hook.cost_ns
        for hook in self.waiting:
            waiting_ns += hook.cost_ns
        own_ns = critical_ns - self.critical_seen
        stash[10] = own_ns
        stash[9] = own_ns + waiting_ns - self.waiting_seen
        self.critical_seen, self.waiting_seen = critical_ns, waiting_ns
        start, end = self.last_start, self.last_end
        if end > self.accounted_ns:
            self.busy_ns += end - max(start, self.accounted_ns)
            self.accounted_ns = end
            self.steps += 1
        if stash[3] & TEND_MASK and stash[2] < self.tended_ns + TEND_NS:
            return True
        self.tended_ns = stash[2]
        steps, busy_ns, self.steps, self.busy_ns = self.steps, self.busy_ns, 0, 0
        critical_told, waiting_told = self.critical_told, self.waiting_told
        self.critical_told, self.waiting_told = critical_ns, waiting_ns
        critical_ns -= critical_told
        return self.probe.tend(steps, busy_ns, critical_ns + waiting_ns - waiting_told, critical_ns)

    def compose(self, scheduled, again, stash, context):
        """Compose the step and note what changed for single requests."""
        step, running = stash[3], stash[7]
        prefills = []
        if context >= 0:
            work, stash[6] = (running, 0, running, 0, running, 0, context, 0, 0), 0
        else:
            compose, requests = self.sums.compose, self.follower.requests
            try:
                work, stash[6] = compose(scheduled, again, step, running, requests, prefills)
            except RuntimeError:
                self.probe.error()
                prefills.clear()
                work, _ = compose(scheduled, again, step, running, requests, prefills)
        if not PLAIN.issuperset(map(type, work)):
            work = self.probe.plain_values(work)
            self.sums.distrust()
        stash[5] = tuple(work)
        following = self.following
        if following.on:
            begun = now_ns()
            try:
                self.follower.follow(
                    scheduled, step, stash[1], stash[4], work, prefills, again.resumed_req_ids
                )
            except Exception:
                following.on = False  # what cannot be read once is not asked for again; steps go on
                self.probe.error()
            following.cost_ns += now_ns() - begun
        elif self.follower.tracked:
            self.follower.clear()

    def on_updated(self, state, args, result, update_start, end):
        scheduler, scheduled = args[0], args[1]
        stash = self.in_flight.pop(id(scheduled), None)
        if stash is None or stash[0] is not scheduled:
            self.probe.dropped()
            return
        if stash[5] is None:
            self.prepare(scheduler, stash)
            if stash[5] is None:
                return
        _, start, scheduled_at, step, _, work, without, requests, usage, own_ns, critical_ns = stash
        sampled = args[2].sampled_token_ids
        gap = start - self.last_end if 0 < self.last_end <= start else NULL
        gc_ns = self.probe.gc_ns
        if type(work) is int:
            outputs = requests if len(sampled) == requests else count_outputs(sampled, 0)[0]
            self.put_decode((
                step, start, end, requests, work, len(scheduler.running), size(scheduler.waiting), usage,
                scheduled_at, update_start, gap, gc_ns - self.gc_seen, outputs, own_ns, critical_ns,
            ))  # fmt: skip
        else:
            if without is not None and len(sampled) == work[0]:
                outputs, accepted = work[0] - without, NULL
            else:
                outputs, accepted = count_outputs(sampled, work[8])
            self.put((
                step, start, end, *work, accepted, self.preempted,
                len(scheduler.running), size(scheduler.waiting), usage,
                scheduled_at - start, update_start - scheduled_at, NULL, end - update_start, gap,
                gc_ns - self.gc_seen, outputs, NULL, len(scheduled.finished_req_ids), scheduled_at,
                own_ns, critical_ns,
            ))  # fmt: skip
            self.preempted = self.no_preemption
        self.last_start, self.last_end, self.updated, self.gc_seen = start, end, step, gc_ns


def usage_ppm(scheduler):
    """Share of KV cache blocks in use, parts per million."""
    try:
        return int(scheduler.kv_cache_manager.block_pool.get_usage() * 1e6)
    except AttributeError:
        return NULL


class WorkerReader:
    """What is seen of the worker's two calls a step, in every worker process; one call in older versions."""

    __slots__ = (
        "busy_ns", "gc_seen", "hooks", "last", "open", "probe", "put", "rank", "runs", "samples_apart",
        "seen", "tended_ns", "told", "within",
    )  # fmt: skip

    def __init__(self, probe, config):
        self.probe = probe
        self.put = quick_put(probe, KIND_WORKER, WORKER_WIRE_WORDS)
        self.rank = config["rank"]
        self.samples_apart = "sample" in config["hooks"]
        self.within = config["role"] == "engine+worker"  # its time is part of the step's
        self.hooks = []
        self.open = None
        self.gc_seen = probe.gc_ns
        self.last = self.seen = self.told = 0
        self.runs = self.busy_ns = self.tended_ns = 0

    def on_executed(self, state, args, result, start, end):
        tokens = args[1].total_num_scheduled_tokens
        if type(tokens) is not int:
            tokens = NULL
        if result is None and tokens and self.samples_apart:
            self.open = (start, end, tokens)
        else:
            self.write(start, end, NULL, NULL, tokens)

    def on_sampled(self, state, args, result, start, end):
        if self.open is None:
            self.probe.dropped()
        else:
            opened, self.open = self.open, None
            self.write(opened[0], opened[1], start, end, opened[2])

    def write(self, start, end, sample_start, sample_end, tokens):
        probe = self.probe
        spent = probe.stalled_ns
        for hook in self.hooks:
            spent += hook.cost_ns
        gc_ns = probe.gc_ns
        self.put((
            self.rank, start, end, sample_start, sample_end, tokens, gc_ns - self.gc_seen, spent - self.seen,
        ))  # fmt: skip
        self.seen, self.gc_seen = spent, gc_ns
        if not self.within:
            self.runs += 1
            self.busy_ns += end - max(start, self.last)
            self.last = end
            if self.runs <= TEND_MASK and end < self.tended_ns + TEND_NS:
                return
        own_ns = spent - self.told
        runs, busy_ns, self.runs, self.busy_ns = self.runs, self.busy_ns, 0, 0
        self.told, self.tended_ns = spent, end
        probe.tend(runs, busy_ns, own_ns, own_ns)


def reader(probe, config):
    """Install what the pack names for this process's role; returns the hooks that were not found."""
    hooks = config["hooks"]
    callbacks, hooks_of = {}, {}
    if config["role"] in ("engine", "engine+worker"):
        engine = EngineReader(probe, config)
        callbacks.update(
            schedule=(None, engine.on_scheduled), grammar=(engine.on_waiting, None),
            update=(None, engine.on_updated), preempt=(engine.on_preempted, None),
            add=(None, engine.on_added),
        )  # fmt: skip
        hooks_of.update(dict.fromkeys(("schedule", "update", "preempt", "add"), engine.critical))
        hooks_of["grammar"] = engine.waiting
    if config["role"] in ("worker", "engine+worker"):
        worker = WorkerReader(probe, config)
        callbacks.update(execute=(None, worker.on_executed), sample=(None, worker.on_sampled))
        hooks_of.update(execute=worker.hooks, sample=worker.hooks)
    if config["role"] == "api":
        api = ApiReader(probe, config)
        callbacks.update(receive=(None, api.on_received), deliver=(None, api.on_delivered))
        hooks_of.update(receive=api.hooks, deliver=api.hooks)
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
            hook = probe.observe(owner, method, enter=enter, leave=leave, reading=reading)
            if hook is not None:
                hooks_of[name].append(hook)
    return missing
