"""Counters of a window, regrouped so that any stretch of it can be asked for its totals."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from latencyprism.records import Counter

Array = npt.NDArray[np.float64]
Track = tuple[str, ...]

_LEAST_COVERED = 0.4
NEIGHBOUR = "neighbour "
SERVER = "API server"
SEEN = "neighbours_looked_ns"


@dataclass(slots=True)
class Series:
    """One counter over time."""

    times: Array
    values: Array

    def grown(self, start_ns: float, end_ns: float) -> float | None:
        """Growth of a cumulative counter over the stretch, by interpolation, scaled up to the whole stretch
        where the readings cover most of it; None where they cover less."""
        low, high = max(start_ns, self.times[0]), min(end_ns, self.times[-1])
        if high - low < _LEAST_COVERED * (end_ns - start_ns) or high <= low:
            return None
        growth = float(np.interp(high, self.times, self.values) - np.interp(low, self.times, self.values))
        # A counter that went backwards was reset: nothing is known about that stretch.
        return growth * (end_ns - start_ns) / (high - low) if growth >= 0 else None

    def within(self, start_ns: float, end_ns: float) -> Array:
        return self.values[(self.times >= start_ns) & (self.times <= end_ns)]


@dataclass(slots=True)
class Foreign:
    """CPU that processes outside the engine burnt, by look: ``shares[look][(pid, cpu)]`` in cores."""

    times: Array
    shares: list[dict[tuple[int, int], float]]
    names: dict[int, tuple[str, str]]

    def mean(self, start_ns: float, end_ns: float) -> dict[tuple[int, int], float] | None:
        """Mean cores by (pid, cpu) over the stretch; each look speaks for the time since the one before."""
        if len(self.times) < 2 or end_ns <= start_ns:
            return None
        total: dict[tuple[int, int], float] = defaultdict(float)
        covered = 0.0
        for look in range(1, len(self.times)):
            overlap = min(end_ns, self.times[look]) - max(start_ns, self.times[look - 1])
            if overlap <= 0:
                continue
            covered += overlap
            for key, share in self.shares[look].items():
                total[key] += share * overlap
        if covered < _LEAST_COVERED * (end_ns - start_ns):
            return None
        return {key: value / covered for key, value in total.items()}


@dataclass(slots=True)
class Tracks:
    """All counters of a window: ``series[track][name]``, and the neighbours apart."""

    series: dict[Track, dict[str, Series]] = field(default_factory=dict)
    foreign: Foreign | None = None

    @classmethod
    def of(cls, counters: Sequence[Counter], roles: Mapping[int, str]) -> Tracks:
        grouped: dict[Track, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
        for counter in counters:
            if counter.track and np.isfinite(counter.value):
                grouped[counter.track][counter.name].append((float(counter.time_ns), float(counter.value)))
        looks = sorted(time for time, _ in grouped.get(("machine",), {}).get(SEEN, []))
        neighbours = [track for track in grouped if track[0].startswith(NEIGHBOUR)]
        foreign = _foreign(looks, {track: grouped.pop(track) for track in neighbours}, frozenset(roles))
        series = {track: {name: _series(p) for name, p in named.items()} for track, named in grouped.items()}
        return cls(series, foreign)

    def machine(self, name: str) -> Series | None:
        return self.series.get(("machine",), {}).get(name)

    def threads(self, roles: Mapping[int, str]) -> Iterable[tuple[Track, dict[str, Series]]]:
        """The watched threads of the processes in ``roles``."""
        known = {f"{role} {pid}" for pid, role in roles.items()}
        for track, named in self.series.items():
            if track[0] in known and len(track) > 1 and track[-1] != "process":
                yield track, named

    def processes(self, roles: Mapping[int, str]) -> Iterable[tuple[str, dict[str, Series]]]:
        for pid, role in roles.items():
            name = f"{role} {pid}"
            if (name, "process") in self.series:
                yield name, self.series[name, "process"]

    def servers(self) -> Iterable[tuple[str, dict[str, Series]]]:
        """Processes that take requests in and hand answers out, where they are not the engine itself."""
        for track, named in self.series.items():
            if track[0].startswith(SERVER) and track[-1] == "process":
                yield track[0], named


def _series(points: list[tuple[float, float]]) -> Series:
    points.sort()
    table = np.array(points, dtype=float)
    return Series(table[:, 0], table[:, 1])


def _foreign(
    looks: list[float],
    neighbours: Mapping[Track, Mapping[str, list[tuple[float, float]]]],
    own: frozenset[int],
) -> Foreign | None:
    if len(looks) < 2:
        return None
    index = {time: number for number, time in enumerate(looks)}
    shares: list[dict[tuple[int, int], float]] = [{} for _ in looks]
    names: dict[int, tuple[str, str]] = {}
    for track, named in neighbours.items():
        digits = track[0][len(NEIGHBOUR) :]
        if not digits.isdigit() or int(digits) in own:
            continue
        pid = int(digits)
        names[pid] = (track[1] if len(track) > 1 else "?", track[2] if len(track) > 2 else "")
        for name, points in named.items():
            cpu = name[3:-6]
            if not (name.startswith("cpu") and name.endswith("_share") and cpu.isdigit()):
                continue
            for time, share in points:
                if time in index:
                    shares[index[time]][pid, int(cpu)] = share
    return Foreign(np.array(looks), shares, names)
