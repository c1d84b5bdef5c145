"""The slow-down that comes in bursts: time lost over whole seconds, whatever single steps do between.

A neighbour that takes a core for 5 ms out of 10 leaves most short steps untouched and hits some hard. Sums
over steps see the many normal ones in between and let go; a person waits for the sum of times.
"""

from __future__ import annotations

from math import log

BLOCK_MS = 1000.0
LEAST_STEPS = 40
BLOCKS = 2
FLOOR = 0.30
"""Log-ratio observed/expected of a block that is worth a page on the calmest stream."""
BY_NOISE = 4.0
SLOW, AGAIN = 1.2, 12
"""So many steps in a row without a slow one, and the bursts are over."""
FIRST_SCALE, RATE, WILD = 0.08, 0.1, 3.0
"""Mean size of a normal block's log-ratio: what it is taken to be at first, how fast it is learned, and how
many times itself a single block may count for."""


class LostTime:
    """Blocks of at least ``BLOCK_MS`` of stream and ``LEAST_STEPS`` steps; true while the last ``BLOCKS`` of
    them each took longer than expected by more than ``FLOOR`` and ``BY_NOISE`` times what blocks do."""

    __slots__ = (
        "_expected",
        "_normal",
        "_observed",
        "_scale",
        "_since",
        "_steps",
        "_streak",
        "fired",
        "onset",
    )

    def __init__(self) -> None:
        self._observed = self._expected = 0.0
        self._normal = self._steps = self._since = self._streak = self.onset = 0
        self.fired = False
        self._scale = FIRST_SCALE

    @property
    def near(self) -> bool:
        """The last block was one of those."""
        return self._streak > 0

    def feed(self, observed_ms: float, expected_ms: float, step: int) -> bool:
        """``expected_ms``: with the allowance for the unfamiliar."""
        steps = self._steps
        if steps == 0:
            self._since = step
        steps += 1
        self._normal = 0 if observed_ms > SLOW * expected_ms else self._normal + 1
        observed_ms = self._observed = self._observed + observed_ms
        self._expected += expected_ms
        self._steps = steps
        if observed_ms >= BLOCK_MS and steps >= LEAST_STEPS:
            ratio = log(observed_ms / self._expected)
            over = ratio > max(FLOOR, BY_NOISE * self._scale)
            if not over:
                self._scale += (min(abs(ratio), WILD * self._scale) - self._scale) * RATE
            if over and self._streak == 0:
                self.onset = self._since
            self._streak = self._streak + 1 if over else 0
            self.fired = self._streak >= BLOCKS
            self._observed = self._expected = 0.0
            self._steps = 0
        return self.fired and self._normal < AGAIN
