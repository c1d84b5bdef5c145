"""Where the excess sits: which phase of the engine, and which span of which process inside it."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from latencyprism.diagnose.signals import Expectations, worked
from latencyprism.diagnose.waits import scheduler_signal
from latencyprism.diagnose.workline import column
from latencyprism.records import Span, Step, Window
from latencyprism.timeline.collective_feed import LANE as COLLECTIVES

Array = npt.NDArray[np.float64]

_LEAST_SHARE = 0.3
"""A place is named when it holds at least this share of the excess."""
_LEAST_SEEN, _LEAST_CALM = 0.1, 5
_MOST_STEPS = 4000
_NESTED = 0.8
_BELOW = frozenset({"syscall", "interrupts", "memory", "events", COLLECTIVES})
"""Lanes of what the kernel says about threads: they tell how time was lost, not where in the engine. In a
collective a rank loses what another one does: see ``_waited_for``."""


def where(reference: Window, suspect: Window, expected: Expectations | None = None) -> str:
    """Which process and phase holds the time that the suspect window lost against the reference, such as
    ``"Worker 830 execute_model"`` or ``"schedule phase"``; ``"no excess"`` if it lost none, ``"not located"``
    if nothing narrower than the step was observed or no place stands out. ``expected``: already learned from
    the reference, to save the time."""
    expected = expected or Expectations.learn(worked(reference.steps))
    steps = worked(suspect.steps)[-_MOST_STEPS:]
    if expected is None or not steps:
        return "not located"
    predicted = expected.step.predict(steps)
    excess_ns = column(steps, "end_ns") - column(steps, "start_ns") - predicted
    lost_ns = float(excess_ns[excess_ns > 0].sum())
    if lost_ns < 0.01 * float(predicted.sum()):
        return "no excess"
    late_rank = _waited_for(suspect.spans, steps, excess_ns)
    if late_rank is not None:
        return f"{late_rank}, for which the other ranks waited in collectives"
    # Only steps that lost time say where it went.
    late = [step for step, excess in zip(steps, excess_ns) if excess > 0.1 * lost_ns / len(steps)]
    lost_ns = float(excess_ns[excess_ns > 0.1 * lost_ns / len(steps)].sum())
    spans = _span_excess(reference, suspect, late, expected)
    best = max(spans, key=lambda place: spans[place], default=None)
    if best is not None and spans[best] > _LEAST_SHARE * lost_ns:
        return _innermost(spans, spans[best], _span_time(suspect.spans, late))
    phases = _phase_excess(late, expected)
    best = max(phases, key=lambda place: phases[place], default=None)
    if best is not None and phases[best] > _LEAST_SHARE * lost_ns:
        return f"{best} phase"
    return "not located"


def _waited_for(spans: Sequence[Span], steps: Sequence[Step], excess_ns: Array) -> str | None:
    """The process for which another rank waited longer than in the calm steps, by at least ``_LEAST_SHARE``
    of what was lost in the steps of which collectives were seen; None if there is none, or if little of what
    was lost lies in these."""
    met = [span for span in spans if len(span.track) == 2 and span.track[1] == COLLECTIVES]
    if not met:
        return None
    since_ns, until_ns = met[0].start_ns, max(span.end_ns for span in met)
    seen = [
        (step, excess)
        for step, excess in sorted(zip(steps, excess_ns.tolist()), key=lambda pair: pair[0].start_ns)
        if since_ns <= step.start_ns and step.end_ns <= until_ns
    ]
    excess = np.array([excess for _, excess in seen])
    late = excess > 0
    lost_ns = float(excess[late].sum())
    if not late.any() or lost_ns < _LEAST_SEEN * float(excess_ns[excess_ns > 0].sum()):
        return None
    best, most_ns = None, _LEAST_SHARE * lost_ns
    for (_, culprit), waited in _net_waits(met, [step for step, _ in seen]).items():
        due_ns = float(np.median(waited[~late])) if (~late).sum() >= _LEAST_CALM else 0.0
        more_ns = float((waited[late] - due_ns).sum())
        if more_ns > most_ns:
            best, most_ns = culprit, more_ns
    return best


def _net_waits(met: Sequence[Span], steps: Sequence[Step]) -> Mapping[tuple[str, str], Array]:
    """By (who waited, for whom), ns in each step, less what that one waited for this one."""
    starts = [step.start_ns for step in steps]
    waited: dict[tuple[str, str], Array] = defaultdict(lambda: np.zeros(len(steps)))
    for span in met:
        told = dict(span.details)
        culprit, ns = told.get("waited_for"), told.get("waited_ns")
        at = bisect_right(starts, span.start_ns) - 1
        if at >= 0 and span.end_ns <= steps[at].end_ns and isinstance(culprit, str) and isinstance(ns, int):
            waited[span.track[0], culprit][at] += ns
            waited[culprit, span.track[0]][at] -= ns
    return waited


def _innermost(spans: Mapping[str, float], most_ns: float, spent: Mapping[str, float]) -> str:
    """Of the places that hold about as much as the largest: the one that takes the least time altogether. A
    process that waits for another loses what the other loses, in a span around it."""
    rivals = [place for place, lost_ns in spans.items() if lost_ns > _NESTED * most_ns]
    return min(rivals, key=lambda place: (spent[place], place))


def _phase_excess(late: Sequence[Step], expected: Expectations) -> dict[str, float]:
    """Time lost by phase over the late steps, ns."""
    lost = {}
    for name, line in expected.phases.items():
        values = column(late, name)
        if np.isfinite(values).any():
            lost[name.removesuffix("_ns")] = float(np.nansum(values - line.predict(late)))
    return lost


def _span_excess(
    reference: Window, suspect: Window, late: Sequence[Step], expected: Expectations
) -> dict[str, float]:
    """Time lost by place over the late steps, ns; a span's due is its share in the reference."""
    usual = _span_time(reference.spans, worked(reference.steps)[-_MOST_STEPS:])
    now = _span_time(suspect.spans, late)
    steps = worked(reference.steps)[-_MOST_STEPS:]
    usual_ns = float(expected.step.predict(steps).sum()) or 1.0
    due_ns = float(expected.step.predict(late).sum())
    return {place: spent - usual.get(place, 0.0) / usual_ns * due_ns for place, spent in now.items()}


def _span_time(spans: Sequence[Span], steps: Sequence[Step]) -> Mapping[str, float]:
    """Nanoseconds by place, of the spans that lie within the steps. A place is a process and a span's
    name; the whole step, and what the scheduler says about threads, are no places."""
    total: dict[str, float] = defaultdict(float)
    if not steps:
        return total
    places = [
        span for span in spans
        if span.track and scheduler_signal(span) is None and span.track[-1] not in _BELOW
        and "step" not in span.name.split()
    ]  # fmt: skip
    starts = np.array([step.start_ns for step in steps])
    ends = np.array([step.end_ns for step in steps])
    middles = np.array([(span.start_ns + span.end_ns) // 2 for span in places], dtype=np.int64)
    at = np.searchsorted(starts, middles, side="right") - 1
    inside = (at >= 0) & (middles <= ends[np.maximum(at, 0)])
    for span, counts in zip(places, inside.tolist()):
        if counts:
            total[f"{span.track[0]} {span.name}"] += span.end_ns - span.start_ns
    return total
