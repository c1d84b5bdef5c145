"""What watching a replica costs, as the watch itself sees it: counters in every capture, and at the end."""

from __future__ import annotations

import time
from typing import Any

from latencyprism.records import Counter, StepSource
from latencyprism.sentinel.below_watch import BelowWatch

TRACK = ("latencyprism",)
PERIOD_NS = 2_000_000_000


class Cost:
    """``below``: of this replica, None where the kernel is not asked.

    Counters of the track ``latencyprism``: ``watch_cpu_ns`` (cumulative, of the whole watch, all replicas),
    ``below_share`` (estimated, of all CPUs), ``below_lost`` (records, cumulative) and, for each process with
    a probe in it, ``probe_share PID`` (of the step time, by the probe's own clock)."""

    def __init__(self, source: StepSource, below: BelowWatch | None) -> None:
        self._source, self._below = source, below
        self._next_ns = 0
        self._told_lost = 0

    def counters(self, now_ns: int) -> list[Counter]:
        """Every two seconds; in between nothing."""
        if now_ns < self._next_ns:
            return []
        self._next_ns = now_ns + PERIOD_NS
        values = self.values()
        found = [Counter(TRACK, "watch_cpu_ns", now_ns, time.process_time_ns(), "ns")]
        if values["below_share"] is not None:
            found.append(Counter(TRACK, "below_share", now_ns, values["below_share"], "share"))
        if values["below_lost"] is not None:
            found.append(Counter(TRACK, "below_lost", now_ns, values["below_lost"]))
        for pid, share in values["probe_share"].items():
            found.append(Counter(TRACK, f"probe_share {pid}", now_ns, share, "share"))
        return found

    def values(self) -> dict[str, Any]:
        """``below_share``, ``below_lost``: null where nothing is seen below; ``probe_share``: {PID: share},
        without those that have not measured it yet."""
        below = None if self._below is None else self._below.describe()
        health: dict[int, dict[str, Any]] = getattr(self._source, "health", dict)()
        shares = {pid: told.get("budget_share") for pid, told in health.items()}
        return {
            "below_share": None if below is None else below["estimated_share"],
            "below_lost": None if below is None else below["lost"],
            "probe_share": {pid: round(share, 6) for pid, share in shares.items() if share is not None},
        }

    def notices(self) -> list[str]:
        """That records of waits were lost, when more were."""
        lost = 0 if self._below is None else self._below.probe.lost
        new, self._told_lost = lost - self._told_lost, lost
        if new <= 0:
            return []
        return [f"below: a full ring lost {new} waits as records of their own; totals still have them"]
