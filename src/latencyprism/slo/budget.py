"""The error budget of one objective: what burns, how fast, and when to say so."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from latencyprism.records.objective import Objective
from latencyprism.records.request import Request
from latencyprism.slo.windows import BurnWindow, SlidingCount

LEAST_REQUESTS, LEAST_VIOLATIONS = 10, 3
"""Below these in its long window no rate is told: one slow request of two is no burn rate of 50."""
KEPT_VALUES = 1000


class Burn(NamedTuple):
    """One window as it stands; rates in multiples of what the budget allows, None: too few requests."""

    window: BurnWindow
    long_rate: float | None
    short_rate: float | None
    requests: int
    violations: int

    @property
    def burning(self) -> bool:
        return (
            self.long_rate is not None
            and self.short_rate is not None
            and self.long_rate >= self.window.burn
            and self.short_rate >= self.window.burn
        )


class Account:
    """Feed it every ended request; ask for ``news`` now and then."""

    def __init__(self, objective: Objective, windows: Sequence[BurnWindow]) -> None:
        self.objective = objective
        self.total = self.violations = 0
        """Since the beginning, for counters that only rise."""
        self.unjudged = 0
        self._pairs = [(w, SlidingCount(w.long_s), SlidingCount(w.short_s)) for w in windows]
        self._period = SlidingCount(objective.period_s)
        self._told: set[BurnWindow] = set()
        self._values: deque[int] = deque(maxlen=KEPT_VALUES)

    def take(self, now_ns: int, request: Request) -> bool | None:
        """True if it violates, None if the objective does not apply to it or nothing was observed."""
        judged = self.objective.judge(request)
        if judged is None:
            self.unjudged += 1
            return None
        self.total += 1
        self.violations += judged.violated
        if judged.value_ns is not None:
            self._values.append(judged.value_ns)
        self._period.add(now_ns, judged.violated)
        for _, long, short in self._pairs:
            long.add(now_ns, judged.violated)
            short.add(now_ns, judged.violated)
        return judged.violated

    def burns(self, now_ns: int) -> list[Burn]:
        found = []
        for window, long, short in self._pairs:
            requests, violations = long.counts(now_ns)
            lately, late = short.counts(now_ns)
            enough = requests >= LEAST_REQUESTS and violations >= LEAST_VIOLATIONS
            allowed = self.objective.budget
            found.append(
                Burn(
                    window,
                    violations / requests / allowed if enough else None,
                    late / lately / allowed if enough and lately else None,
                    requests,
                    violations,
                )
            )
        return found

    def news(self, now_ns: int) -> list[Burn]:
        """Windows that have begun to burn; each once, and again after it has come to rest, in its short span
        and in its long one. A page says what the slower windows would."""
        new = []
        for burn in self.burns(now_ns):
            if burn.burning:
                if burn.window not in self._told:
                    self._told.add(burn.window)
                    new.append(burn)
            elif max(burn.short_rate or 0.0, burn.long_rate or 0.0) < burn.window.burn / 2:
                self._told.discard(burn.window)
        return new[:1]

    def burning(self, now_ns: int) -> bool:
        """Does any window that pages burn?"""
        return any(burn.burning and burn.window.level == "page" for burn in self.burns(now_ns))

    def calm(self, now_ns: int) -> bool:
        """Has the budget come to rest: no window that pages burns at all in its short window?"""
        return all(
            burn.short_rate is None or burn.short_rate < 1.0
            for burn in self.burns(now_ns)
            if burn.window.level == "page"
        )

    def left(self, now_ns: int) -> float | None:
        """Share of the period's budget that is left; below 0 when overdrawn, None before any request."""
        requests, violations = self._period.counts(now_ns)
        return 1.0 - violations / requests / self.objective.budget if requests else None

    def value_ns(self) -> int | None:
        """The objective's own percentile over the last requests."""
        if not self._values:
            return None
        ranked = sorted(self._values)
        return ranked[min(len(ranked) - 1, int(self.objective.share * len(ranked)))]
