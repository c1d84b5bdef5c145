"""Reading Transformers' continuous batching: one record per turn of the generation loop, and what happens to
single requests.

One process; the loop runs in a thread of its own. A turn is prepare_next_batch (which schedules) ->
_generation_step -> update_batch. Composition runs right after scheduling: making the batch's tensors advances
position_offset.
"""

# isort: off
# [cut
from latencyprism.agent.probe.core import find_class, now_ns, size
from latencyprism.agent.probe.request_log import RequestLog, monotonic_of
from latencyprism.records.ring import (
    KIND_STEP,
    REQUEST_ADDED,
    REQUEST_ENDED,
    REQUEST_PAUSED,
    REQUEST_SCHEDULED,
    REQUEST_TOKENS,
)
from latencyprism.records.step import NULL

# cut]
# isort: on
from _operator import attrgetter

KNOWN_REQUESTS_LIMIT = 4096
# Places in records.request.FINISH_REASONS.
STOPPED, LENGTH, ABORTED, FAILED = range(4)
QUERY_LENGTH = attrgetter("query_length")
POSITION = attrgetter("state.position_offset")
GENERATED = attrgetter("state.generated_tokens")
NEW_TOKEN = attrgetter("has_new_token")


def compose(futures):
    """((requests, prefill requests, decode requests, prefill tokens, decode tokens, context tokens, attention
    work, outputs), places of the prefills) of a batch: counts, never contents."""
    lengths = list(map(QUERY_LENGTH, futures))
    computed = list(map(POSITION, futures))
    generated = list(map(len, map(GENERATED, futures)))
    outputs = list(map(NEW_TOKEN, futures)).count(True)
    tokens = sum(lengths)
    prefill_tokens = attention_work = 0
    places = []
    place = -1
    for _ in range(generated.count(0)):
        place = generated.index(0, place + 1)
        prefill_tokens += lengths[place]
        attention_work += lengths[place] * (computed[place] + lengths[place])
        places.append(place)
    return (
        len(futures), len(places), len(futures) - len(places), prefill_tokens, tokens - prefill_tokens,
        tokens + sum(computed), attention_work, outputs,
    ), places  # fmt: skip


class LoopReader:
    def __init__(self, probe, config):
        self.probe = probe
        self.log = RequestLog(probe, config)
        self.following = probe.reading("requests")
        self.step = 0
        self.last_end = 0
        self.gc_seen = probe.gc_ns
        self.known = set()
        self.fresh = []
        self.adopted = False
        self.flowing = set()
        self.paused = set()
        self.updating = False
        self.own_before = 0
        self.clear()

    def clear(self):
        self.prepare_start = self.prepare_end = 0
        self.step_start = self.step_end = 0
        self.schedule_ns = 0
        self.work = None
        self.cached_tokens = 0
        self.own_ns = 0

    # -- hooks ---------------------------------------------------------------------------------------

    def on_prepare(self, args):
        self.clear()

    def on_prepared(self, state, args, result, start, end):
        self.prepare_start, self.prepare_end = start, end

    def on_scheduled(self, state, args, result, start, end):
        self.schedule_ns += end - start
        if result[0]:
            self.work, places = compose(result[0])
            self.count_cached(args[0], result[0], places)
            if self.following.on:
                begun = now_ns()
                try:
                    self.note_changes(args[0], result[0], places)
                except Exception:
                    self.following.on = False  # what cannot be read once is not asked for again
                    self.probe.error()
                self.following.cost_ns += now_ns() - begun
        self.own_ns += now_ns() - end

    def on_stepped(self, state, args, result, start, end):
        self.step_start, self.step_end = start, end

    def on_update(self, args):
        self.updating = True
        return size(getattr(args[0].scheduler, "active_requests", None))

    def on_updated(self, active_before, args, result, start, end):
        self.updating = False
        if self.prepare_start and self.step_start and self.work is not None:
            self.emit(args[0].scheduler, start, end, active_before)
        else:
            self.probe.dropped()
        self.clear()

    def emit(self, scheduler, update_start, end, active_before):
        probe, work = self.probe, self.work
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
            work[0], work[1], work[2], work[3], work[4], self.cached_tokens, work[5], work[6],
            NULL, NULL, NULL,
            running, size(scheduler.waiting_requests), NULL,
            self.prepare_end - start, self.step_end - self.prepare_end, NULL, end - update_start, gap, gc_ns,
            work[7], NULL, max(active_before - running, 0), self.prepare_end, self.own_before,
            self.own_before,
        ))  # fmt: skip
        # After the step, of which some of it tells that it was their last.
        if probe.alive and self.log.words:
            self.log.flush()
        if probe.alive:
            self.own_before = self.own_ns + now_ns() - end
            probe.cost(self.own_before, self.own_before)

    # -- requests ------------------------------------------------------------------------------------

    def count_cached(self, scheduler, futures, places):
        """What a request has computed when it is first seen came out of the cache."""
        self.fresh = []
        for place in places:
            state = futures[place].state
            if state.request_id not in self.known:
                self.known.add(state.request_id)
                self.fresh.append(state)
                self.cached_tokens += state.position_offset
        if len(self.known) > KNOWN_REQUESTS_LIMIT:
            self.known &= set(scheduler.active_requests).union(scheduler.waiting_requests)

    def note_changes(self, scheduler, futures, places):
        log, flowing = self.log, self.flowing
        if not self.adopted:
            self.adopted = True
            self.adopt(futures)
        for state in self.fresh:
            name, computed = state.request_id, state.position_offset
            log.note(REQUEST_ADDED, name, created_ns(state), NULL, len(state.initial_tokens), 0)
            log.note(REQUEST_SCHEDULED, name, self.step, computed)
        for place in places:
            future = futures[place]
            name = future.state.request_id
            if future.has_new_token:
                flowing.add(name)
                log.note(REQUEST_TOKENS, name, self.step)
        if flowing and (self.paused or len(futures) != len(scheduler.active_requests)):
            self.note_turns(futures)

    def adopt(self, futures):
        """Once: the requests that had tokens before the probe came."""
        for future in futures:
            state = future.state
            if size(state.generated_tokens) > 0:
                self.flowing.add(state.request_id)
                had = generated_tokens(state)
                prompt = len(state.initial_tokens)
                self.log.note(REQUEST_ADDED, state.request_id, created_ns(state), NULL, prompt, had)

    def note_turns(self, futures):
        """Requests that have had a token and get none in this step, and those that do again."""
        taking_part = {future.state.request_id for future in futures if future.has_new_token}
        for name in self.flowing - taking_part - self.paused:
            self.paused.add(name)
            self.log.note(REQUEST_PAUSED, name, self.step, 0)
        for name in self.paused & taking_part:
            self.paused.discard(name)
            self.log.note(REQUEST_TOKENS, name, self.step)

    def on_finish(self, args):
        """Called for a request that ended, and also for one whose cache is given away for a while."""
        scheduler, name = args[0], args[1]
        state = scheduler.active_requests.get(name)
        if state is None:
            return
        failed = getattr(state.status, "name", "") == "FAILED"
        if not self.updating and not failed:
            self.log.note(REQUEST_PAUSED, name, self.step, 1)
            self.paused.add(name)
            return
        reason = (
            FAILED
            if failed
            else LENGTH
            if len(state.generated_tokens) >= getattr(state, "_new_tokens_limit", 0)
            else STOPPED
        )
        self.end(state, reason)

    def on_cancelled(self, state, args, result, start, end):
        for request in result or ():
            self.end(request, ABORTED)

    def end(self, state, reason):
        name = state.request_id
        last = self.step if self.updating else self.step - 1
        self.log.note(REQUEST_ENDED, name, last, now_ns(), generated_tokens(state), reason)
        self.log.forget(name)
        for names in (self.known, self.flowing, self.paused):
            names.discard(name)


def created_ns(state):
    """When it was created, by time.perf_counter(), which is CLOCK_MONOTONIC on Linux, or by time.time()."""
    created, now = getattr(state, "created_time", None), now_ns()
    if isinstance(created, float) and created * 1e9 <= now:
        return int(created * 1e9)
    return monotonic_of(created, now)


def generated_tokens(state):
    """All it was given, also before a reset that made its tokens part of its prompt."""
    prompt = getattr(state, "_true_initial_tokens", 0)
    before = len(state.initial_tokens) - prompt if prompt else 0
    return before + len(state.generated_tokens)


def reader(probe, config):
    """Install the pack's hooks; returns those that were not found."""
    loop = LoopReader(probe, config)
    callbacks = {
        "update": (loop.on_update, loop.on_updated), "finish": (loop.on_finish, None),
        "cancel": (None, loop.on_cancelled), "step": (None, loop.on_stepped),
        "schedule": (None, loop.on_scheduled), "prepare": (loop.on_prepare, loop.on_prepared),
    }  # fmt: skip
    missing = []
    for name, (enter, leave) in callbacks.items():
        if name not in config["hooks"]:
            continue
        module, class_names, method = config["hooks"][name]
        found = False
        for class_name in class_names.split("|"):
            owner = find_class(module, class_name)
            if owner is not None and callable(vars(owner).get(method)):
                reading = loop.following if name in ("finish", "cancel") else None
                hook = probe.observe(owner, method, enter=enter, leave=leave, reading=reading)
                found = hook is not None or found
        if not found:
            missing.append("%s.%s.%s" % (module, class_names, method))
    return missing
