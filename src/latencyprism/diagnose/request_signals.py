"""What requests say of the way to the engine and back: time lost where no step is running late."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from latencyprism.records import Request

Values = dict[tuple[str, str], float]

_LEAST = 2


def request_signals(requests: Sequence[Request], start_ns: int, end_ns: int, step_ns: float) -> Values:
    """Means over the requests that arrived in the stretch, in units of ``step_ns``, a normal step:
    ``arrival_lag``, from arrival to the first step that carried it (where it waits for a place in the batch,
    ``waiting`` says so, too); ``delivery_lag``, from the end of the step that made the first token until it
    was handed to its stream. Absent for fewer than two requests."""
    seen = [r for r in requests if r.arrival_ns is not None and start_ns <= r.arrival_ns <= end_ns]
    out: Values = {}
    queued = [r.queue_ns for r in seen if r.queue_ns is not None and r.queue_ns >= 0]
    if len(queued) >= _LEAST and step_ns > 0:
        out["arrival_lag", ""] = float(np.mean(queued)) / step_ns
    late = [
        max(0, r.ttft_ns - r.queue_ns - r.prefill_ns)
        for r in seen
        if r.ttft_ns is not None and r.queue_ns is not None and r.prefill_ns is not None
    ]
    if len(late) >= _LEAST and step_ns > 0:
        out["delivery_lag", ""] = float(np.mean(late)) / step_ns
    return out
