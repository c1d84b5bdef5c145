"""How much of a slow-down the machine made itself: time that the hypervisor took, a lower clock.

Looked at when an alert is raised and at no other time, from readings that the host sampler has made anyway
and one more of each. Pressure (PSI) is not used: it counts the engine's own threads that wait for each other,
too, so that it does not tell the machine's part.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Sequence
from typing import NamedTuple

from latencyprism.host.held import read_once
from latencyprism.host.machine import MachineCounters
from latencyprism.host.processes import parse_stat
from latencyprism.host.stolen import frequency_ratio, stolen

WORTH = 0.05
"""Of the excess; less is not told."""
LOWER_CLOCK = 0.9
"""A clock below this part of what it was is told: turbo alone moves it by less on most machines."""
CLOCKS_WITHIN_NS = 200_000
STEPS = 500
"""At most so many of the newest steps are added up."""


class MachineShare(NamedTuple):
    """``steal_share``: of the time that threads wanted CPUs, the part that the hypervisor gave to others;
    ``frequency_ratio``: clock now against before; None where unknown. ``stolen_ms``, ``clock_ms``: what of
    the alert's excess each explains at most."""

    steal_share: float | None
    frequency_ratio: float | None
    stolen_ms: float
    clock_ms: float
    excess_ms: float

    def values(self) -> dict[str, float | None]:
        """As the alert has it."""
        steal, ratio = self.steal_share, self.frequency_ratio
        explained = (self.stolen_ms + self.clock_ms) / self.excess_ms
        return {
            "steal_share": None if steal is None else round(steal, 4),
            "frequency_ratio": None if ratio is None else round(ratio, 3),
            "explains": round(min(explained, 1.0), 3),
        }

    def text(self) -> str:
        """As "of which 12.0 ms is time the hypervisor took"."""
        parts = []
        if self.stolen_ms >= WORTH * self.excess_ms:
            parts.append(f"{self.stolen_ms:.1f} ms is time the hypervisor took")
        if self.clock_ms >= WORTH * self.excess_ms and self.frequency_ratio is not None:
            parts.append(f"{self.clock_ms:.1f} ms a CPU clock at {self.frequency_ratio:.2f} of what it was")
        return f"of the {self.excess_ms:.1f} ms beyond that, " + ", ".join(parts)


def machine_share(
    machine: MachineCounters, pids: Collection[int], onset_ns: int, excess_ms: float,
    steps: Sequence[tuple[float, float]], observed_ms: float,
) -> MachineShare | None:  # fmt: skip
    """What the machine explains of ``excess_ms``, by which a step of ``observed_ms`` was late. ``steps``: of
    each since the reading before the onset how long it took and should have taken, ms. None where nothing is
    known, or nothing worth telling. Below a millisecond."""
    if excess_ms <= 0.0:
        return None
    now = (time.monotonic_ns(), machine.cpu_times())
    lost = stolen(machine.history, now, onset_ns, allowed(pids), machine.ns_per_tick)
    stolen_ms = 0.0
    if lost is not None and lost.lost_ns > 0.0:
        beyond_ms = sum(max(took - expected, 0.0) for took, expected in steps) or excess_ms
        stolen_ms = excess_ms * min(lost.lost_ns / 1e6 / beyond_ms, 1.0)
    ratio = frequency_ratio(machine.frequencies, machine.clocks(running_on(pids), CLOCKS_WITHIN_NS))
    clock_ms = 0.0
    if ratio is not None and ratio < LOWER_CLOCK:
        clock_ms = min(observed_ms * (1.0 - ratio), excess_ms - stolen_ms)
    if stolen_ms + clock_ms < WORTH * excess_ms:
        return None
    share = None if lost is None else lost.share
    return MachineShare(share, ratio, stolen_ms, clock_ms, excess_ms)


def allowed(pids: Collection[int]) -> set[int]:
    """CPUs on which the main threads may run."""
    found: set[int] = set()
    for pid in pids:
        try:
            found |= os.sched_getaffinity(pid)
        except OSError:
            continue  # it has ended; the others tell
    return found


def running_on(pids: Collection[int]) -> list[int]:
    """CPUs on which the main threads ran last."""
    found = set()
    for pid in pids:
        parsed = parse_stat(read_once(f"/proc/{pid}/stat", 1024) or b"")
        if parsed is not None and parsed[1][36].isdigit():
            found.add(int(parsed[1][36]))
    return sorted(found)
