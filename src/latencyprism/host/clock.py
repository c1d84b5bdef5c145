"""CLOCK_MONOTONIC to wall-clock time: records carry the former, people and alerts the latter."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import datetime, timezone


@dataclass(frozen=True, slots=True)
class ClockMap:
    """``realtime = monotonic + offset_ns``, right to within ``error_ns`` at the moment it was measured.

    The offset moves when the wall clock is stepped or slewed; measure again now and then.
    """

    offset_ns: int
    error_ns: int

    @classmethod
    def measure(cls, tries: int = 5) -> ClockMap:
        """Reads both clocks ``tries`` times and keeps the pair that lay closest together."""
        best: tuple[int, int] | None = None
        for _ in range(max(1, tries)):
            before = time.monotonic_ns()
            wall = time.time_ns()
            after = time.monotonic_ns()
            pair = (after - before, wall - (before + after) // 2)
            best = pair if best is None or pair < best else best
        assert best is not None
        return cls(offset_ns=best[1], error_ns=best[0] // 2 + 1)

    def realtime_ns(self, monotonic_ns: int) -> int:
        return monotonic_ns + self.offset_ns

    def monotonic_ns(self, realtime_ns: int) -> int:
        return realtime_ns - self.offset_ns

    def rfc3339(self, monotonic_ns: int) -> str:
        """UTC with microseconds, such as ``2026-01-31T09:15:02.123456Z``."""
        micros = self.realtime_ns(monotonic_ns) // 1000
        moment = datetime.fromtimestamp(micros // 1_000_000, tz=timezone.utc)
        return moment.strftime("%Y-%m-%dT%H:%M:%S") + f".{micros % 1_000_000:06d}Z"
