"""Before and during: which part of a step holds the excess."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from latencyprism.records import Alert, Step

PARTS = ("schedule_ns", "execute_ns", "sample_ns", "update_ns")
"""What a step consists of, in order; the rest of it is called ``other``."""

WITHIN = ("runqueue_ns", "offcpu_ns", "throttled_ns", "gc_ns", "collective_ns", "xpu_busy_ns", "gap_ns")
"""Times that lie inside those parts (or, ``gap_ns``, before the step) and explain them."""

LOAD = ("requests", "prefill_tokens", "decode_tokens", "context_tokens", "running", "waiting", "kv_usage")

_MOST_BEFORE = 2000


@dataclass(slots=True)
class Change:
    """Medians per step. ``share``: of the excess of the whole step (parts only)."""

    name: str
    before: float | None
    during: float | None
    share: float | None = None


@dataclass(slots=True)
class Contrast:
    """``parts`` and ``within`` in ms, ``load`` in the units of the columns."""

    before_steps: int
    during_steps: int
    before_ms: float
    during_ms: float
    parts: list[Change] = field(default_factory=list)
    within: list[Change] = field(default_factory=list)
    load: list[Change] = field(default_factory=list)

    @property
    def holder(self) -> Change | None:
        """The part that grew most, if any did."""
        grown = [part for part in self.parts if part.share is not None and part.share > 0]
        return max(grown, key=lambda part: part.share or 0.0, default=None)


def contrast(steps: Sequence[Step], alert: Alert) -> Contrast | None:
    """Steps of the alert's replica before its onset against those from onset to alert, of the same phase.

    None if there is nothing to compare.
    """
    key = (alert.engine, alert.replica, alert.rank)
    own = [step for step in steps if (step.engine, step.replica, step.rank) == key]
    first = min(alert.onset_step, alert.step)
    during = [step for step in own if first <= step.step <= alert.step]
    before = [step for step in own if step.step < first][-_MOST_BEFORE:]
    if not during or not before:
        return None
    phase = Counter(step.phase for step in during).most_common(1)[0][0]
    during = [step for step in during if step.phase == phase]
    # A phase that never occurred before has no like: then all of before is the yardstick.
    before = [step for step in before if step.phase == phase] or before
    return compare(before, during)


def compare(before: Sequence[Step], during: Sequence[Step]) -> Contrast:
    """The same for any two lists of steps, neither empty."""
    before_ms, during_ms = (median(step.duration_ms for step in side) for side in (before, during))
    found = Contrast(len(before), len(during), before_ms, during_ms)
    excess_ms = during_ms - before_ms
    for name in PARTS:
        _add(found.parts, name, before, during)
    if found.parts:
        rest = [during_ms - sum(p.during or 0.0 for p in found.parts)]
        rest.insert(0, before_ms - sum(p.before or 0.0 for p in found.parts))
        found.parts.append(Change("other", max(rest[0], 0.0), max(rest[1], 0.0)))
    for part in found.parts:
        if excess_ms > 0 and part.before is not None and part.during is not None:
            part.share = (part.during - part.before) / excess_ms
    for name in WITHIN:
        _add(found.within, name, before, during)
    for name in LOAD:
        change = Change(name, _middle(name, before), _middle(name, during))
        if change.before is not None or change.during is not None:
            found.load.append(change)
    return found


def _add(changes: list[Change], name: str, before: Sequence[Step], during: Sequence[Step]) -> None:
    was, now = _middle(name, before), _middle(name, during)
    if was is None and now is None:
        return
    in_ms = [None if value is None else value / 1e6 for value in (was, now)]
    changes.append(Change(name.removesuffix("_ns"), in_ms[0], in_ms[1]))


def _middle(name: str, steps: Sequence[Step]) -> float | None:
    seen = [value for step in steps if (value := getattr(step, name)) is not None]
    return median(seen) if seen else None
