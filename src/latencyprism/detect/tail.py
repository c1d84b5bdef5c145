"""How slow a lone step may honestly be: an exponential tail over a running threshold.

Peaks over threshold in the log domain: a power-law tail of step times is exponential there, so a machine
with heavy scheduling tails gets a wide limit and a calm one a narrow limit from the same rule.
"""

from __future__ import annotations

WILD = 4.0
MOST = 4.0
"""No limit is above this log-ratio (55 times the expected time)."""


class Tail:
    """``share``: part of the steps above the threshold; ``excess``: first guess of the mean excess over
    it."""

    __slots__ = ("count", "excess", "share", "threshold")

    def __init__(self, share: float, threshold: float, excess: float) -> None:
        self.share = share
        self.threshold = threshold
        self.excess = excess
        self.count = 0

    def limit(self, rarity: float) -> float:
        """Level that a step exceeds once in e^rarity / share steps."""
        limit = self.threshold + self.excess * rarity
        return limit if limit < MOST else MOST

    def take(self, residual: float, near: float, most: float = WILD) -> None:
        """One one-step-ahead log residual; ``near`` is the step-to-step sd, the pace of the threshold.
        ``most``: multiple of the mean excess as which it counts at most. About 1 for a step that was told
        as a fault, so that a series of stalls does not hide itself."""
        threshold = self.threshold
        over = residual - threshold
        if over > 0.0:
            self.count += 1
            most *= self.excess
            rate = 0.03 if self.count > 28 else 1.0 / (self.count + 5)
            self.excess += ((over if over < most else most) - self.excess) * rate
            self.threshold = threshold + 0.5 * near * (1.0 - self.share)
        else:
            self.threshold = threshold - 0.5 * near * self.share
