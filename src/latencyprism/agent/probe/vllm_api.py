"""Reading vLLM's API process: when requests arrived, and when each step's tokens were handed out.

One record per call that hands out tokens, whatever the number of requests in it. Runs inside the target.
"""

# [cut
from latencyprism.agent.probe.core import now_ns, size
from latencyprism.agent.probe.lane import quick_put
from latencyprism.agent.probe.request_log import RequestLog, monotonic_of
from latencyprism.agent.probe.vllm_follow import route_of
from latencyprism.records.ring import KIND_REQUEST, REQUEST_DELIVERED, REQUEST_EVENT_WORDS, REQUEST_RECEIVED
from latencyprism.records.step import NULL

# cut]

TEND_RECORDS, TEND_AFTER_NS = 8, 50_000_000
"""Lease, commands and budget are looked at after so many records, and once this time has passed."""


class ApiReader:
    """``hooks``: those whose cost is the probe's in this process."""

    def __init__(self, probe, config):
        self.probe = probe
        self.put = quick_put(probe, KIND_REQUEST, 1 + REQUEST_EVENT_WORDS)
        self.hooks = []
        self.records = self.tended_ns = self.seen = 0
        self.log = RequestLog(probe, config)

    def on_received(self, state, args, result, start, end):
        request = args[1]
        arrival = monotonic_of(getattr(request, "arrival_time", None), now_ns())
        outer = getattr(request, "external_req_id", None)
        known = NULL if outer is None else self.log.hashed(outer)
        route = route_of(request.request_id)
        self.log.note(REQUEST_RECEIVED, request.request_id, arrival, known, start, route)
        self.log.forget(request.request_id)
        self.log.flush()

    def on_delivered(self, state, args, result, start, end):
        stamp = args[2] if len(args) > 2 else None
        if not isinstance(stamp, float):
            return
        self.put((1, REQUEST_DELIVERED, 0, start, end, int(stamp * 1e9), size(args[1])))
        self.records += 1
        if self.records >= TEND_RECORDS or end - self.tended_ns > TEND_AFTER_NS:
            self.tend(end)

    def tend(self, now):
        spent = self.probe.stalled_ns
        for hook in self.hooks:
            spent += hook.cost_ns
        passed_ns = now - self.tended_ns if self.tended_ns else 0
        records, own_ns = self.records, spent - self.seen
        self.records, self.tended_ns, self.seen = 0, now, spent
        self.probe.tend(records, passed_ns, own_ns, own_ns)
