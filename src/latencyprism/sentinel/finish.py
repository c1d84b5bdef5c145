"""The last touch of a capture, made in the process that writes it: the verdict."""

from __future__ import annotations

from latencyprism.diagnose import localise
from latencyprism.recorder.capture import Capture
from latencyprism.records import Request, Window


def finish(capture: Capture) -> Capture:
    """Diagnose the stretch from the onset on against the one before it. Without an alert: unchanged."""
    onset_ns = capture.meta.get("onset_ns")
    if not isinstance(onset_ns, int):
        return capture
    reference, suspect = split(capture.window, onset_ns)
    roles = {int(pid): str(role) for pid, role in dict(capture.meta.get("roles", {})).items()}
    missing = [str(text) for text in capture.meta.get("not_available", [])]
    capture.verdict = localise(reference, suspect, roles=roles, not_available=missing)
    for alert in capture.alerts:
        alert.verdict = capture.verdict.to_dict()
    return capture


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
