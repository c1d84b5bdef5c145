"""What prompt tokens add to a step, learned at once from the few steps that carry many.

The baseline is slow to believe a step that is twenty times as long as those before it: it has to tell a fault
from work. Here every step with prompts is believed; two in a row that are off are not dropped as odd.
"""

from __future__ import annotations

from collections import deque

import numpy as np
import numpy.typing as npt

KEPT = 24
"""Observations a size of chunk (powers of two): chunks of all sizes stay in memory, the last of each."""
SHORTEST_MS, LONGEST_MS = 1e-3, 1e7
TRUST = 1e-3
"""Ridge: what nothing was seen of stays at zero."""
ODD = 2.5
"""An observation that is off by this factor from a fit of the others is left out of the next."""


class PrefillCost:
    """``take`` whole steps in ms; ``ms`` is what a chunk adds: a + b tokens + c attention, none below 0."""

    def __init__(self) -> None:
        self._sizes: dict[int, deque[tuple[float, float, float, float]]] = {}
        self._fit: npt.NDArray[np.float64] | None = None
        self._new = False

    @property
    def known(self) -> bool:
        return bool(self._sizes)

    def take(self, tokens: int, attention: int, step_ms: float, base_ms: float) -> None:
        """``attention``: sum over tokens of the context they attend to; ``base_ms``: a step without them."""
        if tokens <= 0 or not SHORTEST_MS <= step_ms <= LONGEST_MS or not abs(base_ms) <= LONGEST_MS:
            return
        kept = self._sizes.setdefault(tokens.bit_length(), deque(maxlen=KEPT))
        kept.append((float(tokens), float(max(attention, 0)), step_ms, base_ms))
        self._new = True

    def ms(self, tokens: int, attention: float) -> float | None:
        """None: nothing was seen yet."""
        if tokens <= 0:
            return 0.0
        if self._new:
            self._new = False
            self._refit()
        if self._fit is None:
            return None
        a, b, c = self._fit
        return float(a + b * tokens + c * attention)

    def _refit(self) -> None:
        rows = np.array([row for kept in self._sizes.values() for row in kept])
        step_ms, base_ms = rows[:, 2], rows[:, 3]
        # In parts of the step: noise grows with the whole of it.
        features = np.column_stack([np.ones(len(rows)), rows[:, 0], rows[:, 1]]) / step_ms[:, None]
        extra = (step_ms - base_ms) / step_ms
        fit = _solve(features, extra)
        ratio = base_ms / step_ms + features @ fit
        fair = (ratio < ODD) & (ratio > 1 / ODD)
        if fair.sum() >= max(3, len(rows) // 2):
            fit = _solve(features[fair], extra[fair])
        self._fit = fit


def _solve(features: npt.NDArray[np.float64], extra: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Least squares without negative prices: what comes out negative is left out."""
    size = np.maximum(np.abs(features).max(axis=0), 1e-12)
    chosen = [0, 1, 2]
    while True:
        part = features[:, chosen] / size[chosen]
        gram = part.T @ part + TRUST * np.eye(len(chosen))
        found = np.linalg.solve(gram, part.T @ extra) / size[chosen]
        if len(chosen) == 1 or (found >= 0).all():
            fit = np.zeros(3)
            fit[chosen] = np.maximum(found, 0.0)
            return fit
        chosen.pop(int(np.argmin(found * size[chosen])))
