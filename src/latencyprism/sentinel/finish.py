"""The last touch of a capture, made in the process that writes it: the verdict."""

from __future__ import annotations

from latencyprism.diagnose import begun_ns, localise
from latencyprism.recorder.capture import Capture
from latencyprism.records import Request, Window
from latencyprism.records.device_spans import from_a_window

APART_NS, APART_SHARE, SHORT_NS = 1_000_000_000, 0.1, 5_000_000_000
"""Between the reference and the suspect stretch: so long, at most that share of the reference, and nothing
where the reference is shorter than ``SHORT_NS``, which has nothing to spare."""


def finish(capture: Capture) -> Capture:
    """Diagnose the stretch from the beginning of the trouble on against the one before it; ``begun_ns`` in
    ``meta`` tells where they meet. Without an alert: unchanged."""
    onset_ns, alert_ns = capture.meta.get("onset_ns"), capture.meta.get("alert_ns")
    if not isinstance(onset_ns, int):
        return capture
    at_ns = onset_ns
    if capture.expected_ms is not None and isinstance(alert_ns, int):
        at_ns = capture.meta["begun_ns"] = begun_ns(capture.steps, capture.expected_ms, onset_ns, alert_ns)
    before, suspect = split(undisturbed(capture), at_ns)
    reference, _ = split(before, at_ns - _apart_ns(before, at_ns))
    roles = {int(pid): str(role) for pid, role in dict(capture.meta.get("roles", {})).items()}
    missing = [str(text) for text in capture.meta.get("not_available", [])]
    capture.verdict = localise(reference, suspect, roles=roles, not_available=missing)
    for alert in capture.alerts:
        alert.verdict = capture.verdict.to_dict()
    return capture


def _apart_ns(before: Window, at_ns: int) -> int:
    """What is left out before the beginning, which is not known to the step: one stretch with a little of the
    fault in it, and that is taken for what stretches do by themselves."""
    length_ns = at_ns - min((step.start_ns for step in before.steps), default=at_ns)
    return min(APART_NS, int(APART_SHARE * length_ns)) if length_ns >= SHORT_NS else 0


def undisturbed(capture: Capture) -> Window:
    """Without kernels, which were seen in one short window and so have nothing to be compared with, and
    without the steps beside the profiler that recorded them: what they lost is nobody's but ours."""
    seen = capture.window
    stretches = _profiled(capture.meta.get("kernels"))
    if not stretches:
        return seen
    steps = [
        step
        for step in seen.steps
        if not any(step.start_ns < end_ns and step.end_ns > begin_ns for begin_ns, end_ns in stretches)
    ]
    spans = [span for span in seen.spans if not from_a_window(span)]
    return Window(steps, spans, seen.counters, seen.requests)


def _profiled(told: object) -> list[tuple[int, int]]:
    """From the first to the last moment of each window that ``meta`` tells of."""
    found = []
    for window in told if isinstance(told, list) else []:
        moments = window.get("moments") if isinstance(window, dict) else None
        times = [at for at in moments.values() if isinstance(at, int)] if isinstance(moments, dict) else []
        if times:
            found.append((min(times), max(times)))
    return found


def _arrived(request: Request) -> int:
    return request.arrival_ns or 0


def split(window: Window, at_ns: int) -> tuple[Window, Window]:
    """What ended before ``at_ns``, and the rest."""
    before = Window(
        [step for step in window.steps if step.end_ns <= at_ns],
        [span for span in window.spans if span.end_ns <= at_ns],
        [counter for counter in window.counters if counter.time_ns <= at_ns],
        [request for request in window.requests if _arrived(request) <= at_ns],
    )
    after = Window(
        [step for step in window.steps if step.end_ns > at_ns],
        [span for span in window.spans if span.end_ns > at_ns],
        [counter for counter in window.counters if counter.time_ns > at_ns],
        [request for request in window.requests if _arrived(request) > at_ns],
    )
    return before, after
