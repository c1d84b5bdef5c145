"""Following single requests of vLLM V1 by what changes for them; see ``request_log``.

Runs inside the target.
"""

# [cut
from latencyprism.agent.probe.core import now_ns
from latencyprism.agent.probe.request_log import RequestLog, monotonic_of
from latencyprism.records.ring import (
    REQUEST_ADDED,
    REQUEST_ENDED,
    REQUEST_PAUSED,
    REQUEST_SCHEDULED,
    REQUEST_TOKENS,
    REQUEST_UNEVEN,
)
from latencyprism.records.step import NULL

# cut]

MAX_TURNS = 32
"""Requests of one step that may start or stop taking part without having been preempted. More is taken for a
scheme (pipeline micro-batches), in which following single requests would cost too much."""
MAX_MISCOUNTS = 64
# vLLM's names of the final states; the values are places in records.request.FINISH_REASONS.
REASONS = {
    "FINISHED_STOPPED": 0, "FINISHED_LENGTH_CAPPED": 1, "FINISHED_IGNORED": 1, "FINISHED_ABORTED": 2,
    "FINISHED_ERROR": 3, "FINISHED_REPETITION": 4,
}  # fmt: skip
# By what vLLM puts before the ids that it makes of requests; the values are places in records.request.ROUTES.
ROUTE_PREFIXES = (
    ("chatcmpl-", 0), ("cmpl-", 1), ("resp_", 2), ("generate-tokens-", 3), ("transcribe-", 4),
    ("translate-", 5),
)  # fmt: skip


def route_of(request_id):
    """Place of the route that a request came by, NULL where its id does not say. One of several answers to a
    prompt has its number and ``_`` before the id."""
    if not isinstance(request_id, str):
        return NULL
    number, _, rest = request_id.partition("_")
    name = rest if number.isdigit() else request_id
    for prefix, place in ROUTE_PREFIXES:
        if name.startswith(prefix):
            return place
    return NULL


def name_of_state(state):
    """Of a member of an Enum, whose ``name`` is a property and takes long to ask for."""
    return getattr(state, "_name_", None) or getattr(state, "name", "")


class Follower:
    """``tracked``: requests by id, the engine's own objects, until they end; ``flowing``: those that get
    tokens in this step; ``skipped``: those that did, and take no part at the moment; ``recomputing``: those
    whose prompt is computed once more. So whoever flows takes part if as many take part as flow. ``calm``: in
    a step of as many decodes and nothing else there is nothing to follow."""

    def __init__(self, probe, config, tended=False):
        self.log = RequestLog(probe, config, tended)
        self.sees_preemption = "preempt" in config["hooks"]
        self.requests = {}
        self.clear()

    def clear(self):
        self.tracked, self.added, self.paused = {}, [], []
        self.flowing, self.skipped, self.recomputing = set(), set(), set()
        self.even = True
        self.miscounts = 0
        self.calm = -1

    def adopt(self, scheduler):
        """Once: the requests that were there before the probe."""
        held = getattr(scheduler, "requests", None)
        self.requests = held if isinstance(held, dict) else {}
        for name, request in self.requests.items():
            self.tracked[name] = request
            begun = len(request._output_token_ids)
            if not begun and request.num_computed_tokens >= request.num_prompt_tokens:
                begun = 1  # its first token is on its way
            self.added.append((request, NULL, begun))
            if begun:
                self.flowing.add(name)

    def pause(self, request_id):
        """It was preempted."""
        self.calm = -1
        self.paused.append(request_id)

    def track(self, request, seen_ns):
        self.calm = -1
        if self.tracked.get(request.request_id) is not request:
            self.tracked[request.request_id] = request
            self.added.append((request, seen_ns, 0))

    def follow(self, scheduled, step, start_ns, before, work, prefills, resumed):
        """Note what this step changes. ``before``: the last step whose output was processed when it was
        scheduled; ``work``, ``prefills``: as composed."""
        tracked, requests, log = self.tracked, self.requests, self.log
        for name, _, _, begins in prefills:
            if begins and name in requests:
                self.track(requests[name], start_ns)
        if self.added:
            self.note_added()
        if scheduled.finished_req_ids:
            self.note_ended(scheduled.finished_req_ids, before, start_ns)
        if self.paused or resumed:
            self.note_paused(step, resumed)
        first = 0
        for name, computed, tokens, begins in prefills:
            request = tracked.get(name)
            if request is None:
                continue
            outputs = len(request._output_token_ids)
            whole = computed + tokens >= request.num_prompt_tokens + outputs
            if whole:
                self.flowing.add(name)
                self.skipped.discard(name)
                self.recomputing.discard(name)
                first += 1
            elif outputs:
                self.recomputing.add(name)
            if begins:
                log.note(REQUEST_SCHEDULED, name, step, computed, 1 if whole else 0, route_of(name))
            elif whole:
                log.note(REQUEST_TOKENS, name, step)
        if self.even and (self.skipped or self.recomputing or len(self.flowing) != work[2] + first):
            self.note_turns(scheduled.num_scheduled_tokens, step, prefills)
        self.calm = -1 if self.skipped or self.recomputing else len(self.flowing)
        if self.log.words:
            self.log.flush_when_due(step, not work[0])

    def note_added(self):
        added, self.added = self.added, []
        for request, seen_ns, begun in added:
            arrival = monotonic_of(getattr(request, "arrival_time", None), now_ns())
            if arrival == NULL:
                arrival = seen_ns
            prompt = request.num_prompt_tokens
            self.log.note(REQUEST_ADDED, request.request_id, arrival, seen_ns, prompt, begun)

    def note_ended(self, names, before, seen_ns):
        for name in names:
            request = self.tracked.pop(name, None)
            if request is not None:
                outputs = len(request._output_token_ids)
                reason = REASONS.get(name_of_state(request.status), NULL)
                self.log.note(REQUEST_ENDED, name, before, seen_ns, outputs, reason)
            self.log.forget(name)
            self.forget(name)

    def forget(self, name):
        self.flowing.discard(name)
        self.skipped.discard(name)
        self.recomputing.discard(name)

    def note_paused(self, step, resumed):
        paused, self.paused = self.paused, []
        if not self.sees_preemption:
            paused = resumed  # it is known by its return; since when it had no token, by ``note_turns``
        for name in paused:
            self.forget(name)
            if name in self.tracked:
                self.log.note(REQUEST_PAUSED, name, step, 1)

    def note_turns(self, taking_part, step, prefills):
        """Requests that have had tokens and yet take no part in this step, and those that do again. One of
        these may be a recomputed prompt's last chunk of one token, which looks like any decode."""
        gone = self.flowing.difference(taking_part)
        prefilling = {name for name, _, _, _ in prefills}
        back = {name for name in self.tracked.keys() & taking_part if name not in prefilling} - self.flowing
        explained = gone or back or self.skipped or self.recomputing
        self.miscounts = 0 if explained else self.miscounts + 1
        if len(gone) + len(back) > MAX_TURNS or self.miscounts > MAX_MISCOUNTS:
            self.even = False
            self.skipped.clear()
            self.log.note(REQUEST_UNEVEN, "")
            return
        for name in gone:
            self.log.note(REQUEST_PAUSED, name, step, 0)
        for name in back:
            self.log.note(REQUEST_TOKENS, name, step)
        self.flowing = (self.flowing - gone) | back
        self.recomputing -= back
        self.skipped = (self.skipped | gone) - back
