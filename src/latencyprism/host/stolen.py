"""What the machine took from whoever runs on it in a stretch of time: time of the hypervisor, a lower clock.

From readings of /proc/stat and cpufreq as they were read anyway, and one more of each now.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from latencyprism.host.cpu_lines import busy_ticks, parse_cpu_lines

BEFORE_NS = 20_000_000_000
"""What is usual is taken from so long before the stretch."""
LEAST_TICKS = 2
"""Less than this beyond what is usual is the resolution of the count (one tick is 10 ms as a rule)."""

Reading = tuple[int, bytes]
"""CLOCK_MONOTONIC ns and the first lines of /proc/stat."""


class Stolen(NamedTuple):
    """``share`` of the time that threads wanted CPUs and the hypervisor gave them to others, in the stretch,
    and ``usual_share`` before it; ``lost_ns``: what a thread that runs on these CPUs lost in it beyond what
    is usual, 0 where that is below what the count can tell. The stretch is ``since_ns`` to ``until_ns``."""

    share: float
    usual_share: float
    lost_ns: float
    since_ns: int
    until_ns: int


def stolen(
    history: Sequence[Reading], now: Reading, onset_ns: int, cpus: Collection[int], ns_per_tick: int
) -> Stolen | None:
    """Between the last of ``history`` (oldest first) at or before ``onset_ns`` and ``now``, on ``cpus``. None
    where nothing was read before, or nothing ran."""
    at = max((place for place, (time_ns, _) in enumerate(history) if time_ns <= onset_ns), default=None)
    if at is None or now[0] <= history[at][0]:
        return None
    since_ns = history[at][0]
    first = next(place for place, (time_ns, _) in enumerate(history) if time_ns >= since_ns - BEFORE_NS)
    before, begun, ended = (ticks_on(data, cpus) for data in (history[first][1], history[at][1], now[1]))
    if before is None or begun is None or ended is None or first == at:
        return None
    usual_busy, usual_steal = begun[0] - before[0], begun[1] - before[1]
    busy, steal = ended[0] - begun[0], ended[1] - begun[1]
    if busy + steal <= 0 or min(busy, steal, usual_busy, usual_steal) < 0:
        return None  # a CPU went offline, and its counts with it
    share = steal / (busy + steal)
    usual = usual_steal / (usual_busy + usual_steal) if usual_busy + usual_steal else 0.0
    beyond = steal - usual * (busy + steal)
    length_ns = now[0] - since_ns
    running = max((busy + steal) * ns_per_tick / length_ns, 1.0)
    lost_ns = beyond * ns_per_tick / running if beyond >= LEAST_TICKS else 0.0
    return Stolen(share, usual, min(lost_ns, float(length_ns)), since_ns, now[0])


def ticks_on(data: bytes, cpus: Collection[int]) -> tuple[int, int] | None:
    """(busy, steal) ticks over ``cpus`` from /proc/stat; None where a line has no column for steal."""
    lines = [ticks for cpu, ticks in parse_cpu_lines(data).items() if cpu in cpus and len(ticks) >= 8]
    if not lines:
        return None
    return sum(map(busy_ticks, lines)), sum(ticks[7] for ticks in lines)


def frequency_ratio(before: Sequence[dict[int, int]], now: dict[int, int]) -> float | None:
    """Clock of the fastest of the CPUs in ``now`` against that of the fastest of all in the median of the
    readings before (kHz by CPU): the fastest are those that work. None where nothing was read."""
    fastest = sorted(max(reading.values()) for reading in before if reading)
    usual = fastest[len(fastest) // 2] if fastest else 0
    return max(now.values()) / usual if usual > 0 and now else None
