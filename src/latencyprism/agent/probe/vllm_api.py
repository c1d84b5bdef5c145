"""Reading vLLM's API process: when requests arrived, and when each step's tokens were handed out.

One record per call that hands out tokens, whatever the number of requests in it. Runs inside the target.
"""

# [cut
from latencyprism.agent.probe.core import now_ns, size
from latencyprism.agent.probe.request_log import RequestLog, monotonic_of
from latencyprism.records.ring import KIND_REQUEST, REQUEST_DELIVERED, REQUEST_RECEIVED
from latencyprism.records.step import NULL

# cut]


class ApiReader:
    def __init__(self, probe, config):
        self.probe = probe
        self.log = RequestLog(probe, config)

    def on_received(self, state, args, result, start, end):
        request = args[1]
        arrival = monotonic_of(getattr(request, "arrival_time", None), now_ns())
        outer = getattr(request, "external_req_id", None)
        known = NULL if outer is None else self.log.hashed(outer)
        self.log.note(REQUEST_RECEIVED, request.request_id, arrival, known, start)
        self.log.forget(request.request_id)
        self.log.flush()

    def on_delivered(self, state, args, result, start, end):
        stamp = args[2] if len(args) > 2 else None
        if not isinstance(stamp, float):
            return
        probe = self.probe
        probe.emit(KIND_REQUEST, (1, REQUEST_DELIVERED, 0, start, end, int(stamp * 1e9), size(args[1])))
        if probe.alive:
            own_ns = now_ns() - end
            probe.cost(own_ns, own_ns)
