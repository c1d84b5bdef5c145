"""How long a step usually takes: the watch sleeps through usual steps and is woken by a long one.

To be woken costs the watch more than to read a step: what it needs has left the caches by then; and where
processors are few it costs the engine, too: a watch that is woken at the end of a step runs in the engine's
place. So a probe wakes it only for a step that is longer than most for its number of tokens, or once steps
have lost so much time together that an alert may be due; the others are read a few at a time. Where a probe
cannot add that up they are read sooner while one is wary.
"""

from __future__ import annotations

from collections import deque
from math import exp, log
from statistics import median

import numpy as np
import numpy.typing as npt

from latencyprism.records import Step, Usual

KEPT, LEAST = 256, 64
LONG_SHARE = 0.03
"""Of usual steps, so many are called long."""
RESTLESS, MEMORY = 0.4, 1 / 16
"""From this share of long ones among the last few on, one is wary."""
SPREAD = 1.6
"""Where long steps take so many times as long as the median for their tokens, durations say too little."""
PENALTY_NS = 60_000_000_000
"""So long one is wary after an alert about a step that was not called long."""
FIT_NS = 2_000_000_000
NEVER_NS, ROUNDING_NS = 1 << 62, 1_000
NEVER = Usual(NEVER_NS, 0, 0, NEVER_NS, NEVER_NS)
"""No step is worth being woken for."""


class Habit:
    """``take`` each step, ``look`` now and then. ``usual``: None while too little is known. ``wary``: steps
    are to be looked at soon after they ended, because too many are long. ``vague``: being long tells too
    little, or too little is known."""

    def __init__(self) -> None:
        self._rows: deque[tuple[int, int, int, int]] = deque(maxlen=KEPT)
        self._known: Usual | None = None
        self._share = self._expected = 0.0
        self._ragged = False
        self._fitted_ns = self._ended_ns = self._wary_until_ns = 0

    @property
    def usual(self) -> Usual | None:
        return self._known

    @property
    def wary(self) -> bool:
        return self._share > RESTLESS or self._ended_ns < self._wary_until_ns

    @property
    def vague(self) -> bool:
        return self._ragged or self._known is None

    @property
    def step_ns(self) -> int | None:
        """How long a step usually takes, with the gap before it: the median of the last ones; None: none
        was seen. May be asked by another thread."""
        rows = self._rows.copy()
        lengths = [row[0] + max(row[3], 0) for row in rows]
        return int(median(lengths)) if lengths else None

    def alerted(self, step: Step) -> None:
        """An alert was raised about a step: it should have been a long one."""
        if self._known is not None and not self._known.long(step):
            self._wary_until_ns = step.end_ns + PENALTY_NS

    @property
    def expected_1024(self) -> float:
        """How long steps are expected to be by who judges them, in 1024ths of what is long here. In a fault
        that goes on what is typical here is what it has made of the steps."""
        return 1024.0 * exp(self._expected)

    def expect(self, step: Step, expected_ms: float) -> None:
        """What the judge expected of a step."""
        if self._known is not None and expected_ms > 0.0:
            limit_ns = self._known.limit_ns(step.decode_tokens, step.prefill_tokens)
            told = log(expected_ms * 1e6 / limit_ns)
            self._expected += (told - self._expected) * MEMORY

    def take(self, step: Step) -> None:
        self._ended_ns = step.end_ns
        gap = -1 if step.gap_ns is None else step.gap_ns
        self._rows.append(
            (step.end_ns - step.start_ns, step.decode_tokens or 0, step.prefill_tokens or 0, gap)
        )
        if self._known is not None:
            self._share += (self._known.long(step) - self._share) * MEMORY

    def look(self, now_ns: int, least: float = 0.0) -> None:
        """Learn anew what is usual, every two seconds. ``least``: no step is called long that is not longer
        than typical by that (log)."""
        if now_ns - self._fitted_ns >= FIT_NS and len(self._rows) >= LEAST:
            self._fitted_ns = now_ns
            before = self._known
            self._known, self._ragged = _fit(np.array(self._rows, np.float64), exp(least))
            if before is None:
                self._expected = log(self._known.typical_1024 / 1024.0)
            else:  # the same times, by another measure
                _, decode, prefill, _ = self._rows[-1]
                self._expected += log(
                    before.limit_ns(decode, prefill) / self._known.limit_ns(decode, prefill)
                )


def _fit(rows: npt.NDArray[np.float64], least: float) -> tuple[Usual, bool]:
    """Least squares of relative errors, then as much more as leaves ``LONG_SHARE`` above; and whether that is
    much more."""
    took = np.maximum(rows[:, 0], 1.0)
    terms = np.column_stack([np.ones(len(rows)), rows[:, 1], rows[:, 2]])
    scaled = terms / took[:, None]
    # A little on the diagonal: a number of tokens that never changes has no price of its own.
    square = scaled.T @ scaled
    square += np.diag(np.diag(square) * 1e-9 + 1e-30)
    found = np.maximum(np.linalg.solve(square, scaled.sum(axis=0)), 0.0)
    line = terms @ found
    if not np.all(line > 0.0):
        found, line = np.array([1.0, 0.0, 0.0]), np.ones(len(rows))
    ratios = took / line
    long, typical = _above(ratios, LONG_SHARE), _above(ratios, 0.5)
    ragged = long > SPREAD * typical
    more = max(least * typical / long, 1.0)
    long *= more
    prices = found * long
    gaps = rows[rows[:, 3] >= 0.0, 3]
    gap_ns = int(_above(gaps, LONG_SHARE / 2)) if gaps.size else NEVER_NS
    base, decode, prefill = (int(price) for price in prices)
    bare = rows[rows[:, 2] == 0.0] if np.any(rows[:, 2] == 0.0) else rows
    bare_ns = int(_above(bare[:, 0] + np.maximum(bare[:, 3], 0.0), LONG_SHARE) * more)
    usual = Usual(
        base + ROUNDING_NS, decode, prefill, gap_ns + ROUNDING_NS, bare_ns + ROUNDING_NS,
        max(int(1024 * typical / long), 1), int(np.median(gaps)) if gaps.size else 0,
    )  # fmt: skip
    return usual, ragged


def _above(values: npt.NDArray[np.float64], share: float) -> float:
    """What this share of the values lies above."""
    return float(np.sort(values)[int((1.0 - share) * (len(values) - 1))])
