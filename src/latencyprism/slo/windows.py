"""Windows in which the burning of a budget is looked at, and counts over a sliding one."""

from __future__ import annotations

from typing import NamedTuple

HOUR_S, MONTH_S = 3600.0, 30 * 86400.0
BUCKETS = 60


class BurnWindow(NamedTuple):
    """Fires where the budget burns ``burn`` times as fast as it may, over ``long_s`` and still over
    ``short_s``."""

    long_s: float
    short_s: float
    burn: float
    level: str


def standard_windows(period_s: float) -> tuple[BurnWindow, ...]:
    """Those of the SRE workbook for 30 days (1 h and 5 min at 14.4, 6 h and 30 min at 6, 3 d and 6 h at 1),
    scaled to the budget's period: they fire when 2 %, 5 % and 10 % of it are gone."""
    scale = period_s / MONTH_S
    return (
        BurnWindow(HOUR_S * scale, HOUR_S * scale / 12, 14.4, "page"),
        BurnWindow(6 * HOUR_S * scale, 6 * HOUR_S * scale / 12, 6.0, "page"),
        BurnWindow(72 * HOUR_S * scale, 72 * HOUR_S * scale / 12, 1.0, "evidence"),
    )


class SlidingCount:
    """Requests and violations of the last ``length_s`` seconds, in steps of a sixtieth of it.

    Times are of any one clock, ns. One that jumps back stands still here until it has caught up, what is
    counted meanwhile is counted as of the latest time seen; one that jumps ahead leaves the window empty."""

    __slots__ = ("_bad", "_bads", "_counts", "_total", "_width_ns", "place")

    def __init__(self, length_s: float) -> None:
        self._width_ns = max(1, int(length_s * 1e9) // BUCKETS)
        self._counts = [0] * BUCKETS
        self._bads = [0] * BUCKETS
        self._total = self._bad = 0
        self.place: int | None = None

    def add(self, now_ns: int, violated: bool) -> None:
        self._move(now_ns)
        at = (self.place or 0) % BUCKETS
        self._counts[at] += 1
        self._bads[at] += violated
        self._total += 1
        self._bad += violated

    def counts(self, now_ns: int) -> tuple[int, int]:
        """(requests, violations)."""
        self._move(now_ns)
        return self._total, self._bad

    def _move(self, now_ns: int) -> None:
        place = now_ns // self._width_ns
        before = self.place
        if before is None:
            self.place = place
            return
        if place <= before:
            return
        for old in range(before + 1, min(place, before + BUCKETS) + 1):
            at = old % BUCKETS
            self._total -= self._counts[at]
            self._bad -= self._bads[at]
            self._counts[at] = self._bads[at] = 0
        self.place = place
