"""A lasting speed-up: of everything, or of one batch size whose first steps were slow ones?

An engine that has become faster is faster at all that it does. One batch size alone is faster than expected
where it was learned during a fault; to scale all expectations by that would make everything else look slow,
for ever.
"""

from __future__ import annotations

LEAST_STEPS, LEAST_KINDS = 20, 3
ALIKE = 0.35
"""Speed-ups of one cause differ by at most this share of their mean (log)."""
EASE = 4


class Faster:
    """Steps that were far faster than expected, by batch size, less ``EASE`` for each that was not."""

    __slots__ = ("_by_batch", "count")

    def __init__(self) -> None:
        self.count = 0
        self._by_batch: dict[int, list[float]] = {}

    def take(self, batch_key: int, residual: float) -> int:
        """One fast step; the count so far."""
        seen = self._by_batch.setdefault(batch_key, [0.0, 0.0])
        seen[0] += 1.0
        seen[1] += residual
        self.count += 1
        return self.count

    def ease(self) -> None:
        """One ordinary step."""
        if self.count > EASE:
            self.count -= EASE
        elif self.count:
            self.count = 0
            self._by_batch = {}

    def verdict(self) -> tuple[float | None, dict[int, float]]:
        """The log-ratio of all together, None unless several batch sizes say the same; and that of each."""
        means = {key: total / count for key, (count, total) in self._by_batch.items() if count >= LEAST_STEPS}
        if len(means) < LEAST_KINDS:
            return None, means
        middle = sum(means.values()) / len(means)
        spread = max(means.values()) - min(means.values())
        return (middle if spread <= ALIKE * -middle else None), means
