"""How far predictions were off, kept apart by what kind of prediction they were: what a new one of the kind
may honestly be off by."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Sequence
from math import erfc, log, sqrt

KEPT = 3000
PRIOR, PRIOR_SD = 8.0, 0.6
"""Before anything was seen predictions are taken to be off by this sd (log), worth so many observations."""
SMALLEST = 1e-3
"""Seconds below which times are all alike."""
TRUST, SLOPE_TRUST, FADE, STEEPEST = 20.0, 0.05, 0.9995, 1.5
"""The first guess that predictions come true as they are weighs as much as so many observations (of unit
spread for the slope); older ones fade; a prediction is not stretched further."""


class Residuals:
    """log(truth / prediction) of the last ``KEPT`` predictions of one kind."""

    __slots__ = ("_order", "_ranked")

    def __init__(self) -> None:
        self._order: deque[float] = deque()
        self._ranked: list[float] = []

    def __len__(self) -> int:
        return len(self._order)

    def add(self, residual: float) -> None:
        self._order.append(residual)
        insort(self._ranked, residual)
        if len(self._order) > KEPT:
            old = self._order.popleft()
            del self._ranked[bisect_left(self._ranked, old)]

    def beyond(self, level: float) -> float:
        """Probability that a residual is above ``level``."""
        ranked = self._ranked
        above = len(ranked) - bisect_right(ranked, level)
        presumed = 0.5 * erfc(level / (PRIOR_SD * sqrt(2.0)))
        return (above + PRIOR * presumed) / (len(ranked) + PRIOR)


class _Line:
    """log(truth) as a line of log(prediction): how much of a prediction's ups and downs came true. Starts as
    "all of it" and forgets slowly."""

    __slots__ = ("_cross", "_square", "_weight", "_x", "_y")

    def __init__(self) -> None:
        self._weight = self._x = self._y = self._square = self._cross = 0.0

    def at(self, x: float) -> float:
        if not self._weight:
            return x
        spread = max(self._square / self._weight, 0.0)
        cross = self._cross / self._weight
        slope = (cross + SLOPE_TRUST / self._weight) / (spread + SLOPE_TRUST / self._weight)
        slope = min(max(slope, 0.0), STEEPEST)
        shift = (self._y - self._x) * self._weight / (self._weight + TRUST)
        return self._x + shift + slope * (x - self._x)

    def learn(self, x: float, y: float) -> None:
        self._weight = self._weight * FADE + 1.0
        part = 1.0 / self._weight
        away_x, away_y = x - self._x, y - self._y
        self._x += away_x * part
        self._y += away_y * part
        self._square = self._square * FADE + away_x * (x - self._x)
        self._cross = self._cross * FADE + away_x * (y - self._y)


class KindsOfError:
    """Residuals by a size that tells kinds of predictions apart, in bins with these upper edges."""

    def __init__(self, edges: Sequence[float]) -> None:
        self._edges = list(edges)
        self._bins = [Residuals() for _ in range(len(edges) + 1)]
        self._lines = [_Line() for _ in range(len(edges) + 1)]

    def kind(self, size: float) -> int:
        return bisect_left(self._edges, size)

    def add(self, kind: int, predicted: float, truth: float) -> None:
        line, came = self._lines[kind], log(max(truth, SMALLEST))
        said = log(max(predicted, SMALLEST))
        self._bins[kind].add(came - line.at(said))
        line.learn(said, came)

    def probability(self, kind: int, predicted: float, limit: float) -> float:
        """That the truth will lie above ``limit``."""
        middle = self._lines[kind].at(log(max(predicted, SMALLEST)))
        return self._bins[kind].beyond(log(max(limit, SMALLEST)) - middle)
