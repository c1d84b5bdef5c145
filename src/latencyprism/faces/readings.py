"""Counters of a capture before and during an incident, the ones that moved most first."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from latencyprism.records import Counter

Points = list[tuple[int, float]]

_LEAST_READINGS = 6


@dataclass(slots=True)
class Moved:
    """One counter. ``rate``: it only ever grows, so ``points`` are its growth per second."""

    track: tuple[str, ...]
    name: str
    unit: str
    rate: bool
    points: Points
    before: float | None
    during: float | None

    @property
    def strength(self) -> float:
        """How far it moved, in spreads of its readings before."""
        if self.before is None or self.during is None:
            return 0.0
        return abs(self.during - self.before) / (self.spread + 0.05 * abs(self.before) + 1e-12)

    spread: float = 0.0


def moved(counters: Sequence[Counter], onset_ns: int | None, end_ns: int | None) -> list[Moved]:
    """Every counter with its median before ``onset_ns`` and from there to ``end_ns``, strongest first.

    Without an onset: in the order of their names, the median of all readings as ``before``.
    """
    series: dict[tuple[tuple[str, ...], str, str], Points] = {}
    for counter in counters:
        if counter.value == counter.value and abs(counter.value) != float("inf"):
            key = (counter.track, counter.name, counter.unit)
            series.setdefault(key, []).append((counter.time_ns, counter.value))
    found = []
    for (track, name, unit), points in series.items():
        points.sort()
        rate = _only_grows(points)
        shown = _growth(points) if rate else points
        if shown:
            found.append(_compare(track, name, unit, rate, shown, onset_ns, end_ns))
    if onset_ns is None:
        return sorted(found, key=lambda entry: (entry.track, entry.name))
    return sorted(found, key=lambda entry: -entry.strength)


def _compare(
    track: tuple[str, ...],
    name: str,
    unit: str,
    rate: bool,
    points: Points,
    onset_ns: int | None,
    end_ns: int | None,
) -> Moved:
    start = points[-1][0] + 1 if onset_ns is None else onset_ns
    earlier = [value for time_ns, value in points if time_ns < start]
    # A slow counter may have no reading between onset and alert: the first one after them speaks for it.
    inside = [v for t, v in points if t >= start and (end_ns is None or t <= end_ns)]
    later = inside or [v for t, v in points if t >= start][:1]
    middle = median(earlier) if earlier else None
    entry = Moved(track, name, unit, rate, points, middle, median(later) if later else None)
    if middle is not None:
        entry.spread = median(abs(value - middle) for value in earlier)
    return entry


def _only_grows(points: Points) -> bool:
    values = [value for _, value in points]
    if len(values) < _LEAST_READINGS or values[0] < 0:
        return False
    steps = [after - before for before, after in itertools.pairwise(values)]
    return all(step >= 0 for step in steps) and sum(step > 0 for step in steps) >= 3 and values[0] > 0


def _growth(points: Points) -> Points:
    return [
        (time_ns, (value - before) / ((time_ns - earlier) / 1e9))
        for (earlier, before), (time_ns, value) in itertools.pairwise(points)
        if time_ns > earlier
    ]
