"""What the loop of an engine does for one step while the workers execute another: work that costs no time.

A step has host intervals (the loop's own work for it: scheduling before its execution, updating after it), a
device interval (from the first to the last call in which a worker executed it) and the overlap: the part of
its host intervals in which a worker executed another step. A loop that does one after the other has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from latencyprism.records import Step
from latencyprism.timeline.breakdown import BEHIND, LOOP, SCHEDULE, UPDATE, Breakdown

Interval = tuple[int, int]
_NEAR = 8
"""Steps before and after that may be under way at once: more than any engine's pipeline is deep."""


class Overlap(NamedTuple):
    """CLOCK_MONOTONIC ns. ``device`` and ``overlap_ns`` are None where no execution of the step was seen."""

    step: Step
    host: tuple[Interval, ...]
    device: Interval | None
    overlap_ns: int | None

    @property
    def host_ns(self) -> int:
        return sum(end - start for start, end in self.host)


def overlaps(found: Sequence[Breakdown]) -> list[Overlap]:
    """One for each step. ``found`` are consecutive steps of one replica and rank, as ``break_down`` gives
    them; a step whose neighbours are not among them counts as not overlapped by these."""
    devices = [_device(one) for one in found]
    told = []
    for at, one in enumerate(found):
        host = tuple((p.start_ns, p.end_ns) for p in one.parts if p.name in (SCHEDULE, UPDATE))
        near = range(max(at - _NEAR, 0), min(at + _NEAR + 1, len(found)))
        others = [device for place in near if place != at and (device := devices[place]) is not None]
        hidden = None if devices[at] is None else sum(_within(interval, others) for interval in host)
        told.append(Overlap(one.step, host, devices[at], hidden))
    return told


def _device(one: Breakdown) -> Interval | None:
    """Parts that a worker alone has; what it spent with the step before is no part of it."""
    own = [p for p in one.parts if LOOP not in p.lanes and p.name != BEHIND]
    return (own[0].start_ns, own[-1].end_ns) if own else None


def _within(interval: Interval, others: Sequence[Interval]) -> int:
    """ns of ``interval`` that lie in one of ``others`` at least."""
    start, end = interval
    covered = 0
    for other_start, other_end in sorted(others):
        begun, ended = max(start, other_start), min(end, other_end)
        if begun < ended:
            covered += ended - begun
            start = ended
    return covered
