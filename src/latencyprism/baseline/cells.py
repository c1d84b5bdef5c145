"""A line corrected by cells: step time is a staircase in batch size, and a line is 3 % off it.

Every cell is a running centroid (count, mean time, mean position), not an offset: when the line moves
later, the correction is recomputed against the moved line at the cell's own place and stays true.
"""

from __future__ import annotations

from math import exp, log

from latencyprism.baseline.line import SMALLEST, RobustLine

COARSE_PRIOR, FINE_PRIOR = 0.5, 8.0
"""Observations by which a cell is pulled towards the level above it."""
MEMORY = 400.0
"""A centroid forgets over this many observations."""
CELLS_MAX = 600
"""Upper bound on cells of one line: state stays bounded whatever the traffic does."""

LEAST, LOOK_AGAIN = 0.5, 16
LOOSE = 50.0
FINE = 128
"""Fine cells of a coarse one: the key of a fine cell is ``FINE`` times that of its coarse cell, and more."""
FEW = 5.0
"""Observations that make a cell worth extrapolating from."""
NEARBY = 0.25
"""A log-ratio that the line bridges well."""
FARTHEST = 3.0
"""Cap of distances (log-ratio: twenty times as much)."""

Centroid = list[float]
"""[count, mean u, mean v, mean y]"""


def absorb(cells: dict[int, Centroid], key: int, u: float, v: float, y: float) -> None:
    """Move a centroid by one observation."""
    cell = cells.get(key)
    if cell is None:
        if len(cells) >= CELLS_MAX:
            del cells[min(cells, key=lambda old: cells[old][0])]
        cells[key] = [1.0, u, v, y]
        return
    count, mean_u, mean_v, mean_y = cell
    if count < MEMORY:
        count = cell[0] = count + 1.0
    part = 1.0 / count
    cell[1] = mean_u + (u - mean_u) * part
    cell[2] = mean_v + (v - mean_v) * part
    cell[3] = mean_y + (y - mean_y) * part


class CorrectedLine:
    """``line(u, v) x coarse cell x fine cell``; keys are made by the caller."""

    __slots__ = ("coarse", "coarse_count", "doubt", "fine", "fine_count", "least", "line")

    def __init__(self) -> None:
        self.line = RobustLine()
        self.coarse: dict[int, Centroid] = {}
        self.fine: dict[int, Centroid] = {}
        self.coarse_count = self.fine_count = self.doubt = 0.0
        self.least = 0.0
        """No work costs less: half of the cheapest that was seen. A slope learned in one corner must not
        carry an extrapolation down to nothing."""

    def at(self, u: float, v: float, coarse: int, fine: int) -> float:
        """Expected value; leaves behind ``coarse_count``, ``fine_count`` and ``doubt``, the part of the
        coarse cell's correction (log) that is held back for want of experience."""
        line = self.line
        a, b, c, unit = line.a, line.b, line.c, line.unit
        here = a + b * u + c * v  # as in ``RobustLine.at``, three times
        value = (here if here > SMALLEST else SMALLEST) * unit
        cell = self.coarse.get(coarse)
        if cell is None:
            self.coarse_count = self.fine_count = self.doubt = 0.0
            return value if value > self.least else self.least
        count, mean_u, mean_v, mean_y = cell
        self.coarse_count = count
        here = a + b * mean_u + c * mean_v
        whole = log(mean_y / ((here if here > SMALLEST else SMALLEST) * unit))
        shift = whole * count / (count + COARSE_PRIOR)
        self.doubt = whole - shift if whole > shift else 0.0
        cell = self.fine.get(fine)
        if cell is None:
            self.fine_count = 0.0
        else:
            count, mean_u, mean_v, mean_y = cell
            self.fine_count = count
            here = a + b * mean_u + c * mean_v
            rest = log(mean_y / ((here if here > SMALLEST else SMALLEST) * unit)) - shift
            shift += rest * count / (count + FINE_PRIOR)
        value *= exp(shift)
        return value if value > self.least else self.least

    def distance(self, u: float, v: float, coarse: int) -> tuple[float, float]:
        """How far outside of what was learned a place is, as log-ratios: of ``u`` to the nearest coarse
        cell with some experience, and of ``v`` to the mean of that cell."""
        cells = self.coarse
        near = cells.get(coarse)
        away = 0.0
        if near is None or near[0] < FEW:
            best = FARTHEST
            for cell in cells.values():
                if cell[0] >= FEW and cell[1] > 0.0 and u > 0.0:
                    ratio = log(u / cell[1])
                    size = ratio if ratio >= 0.0 else -ratio
                    if size < best:
                        best, near = size, cell
            away = best - NEARBY if best > NEARBY else 0.0
        if near is None or v <= 0.0:
            return away, 0.0
        if near[2] <= 0.0:
            return away, FARTHEST
        ratio = log(v / near[2])
        size = ratio if ratio >= 0.0 else -ratio
        size = size - NEARBY if size > NEARBY else 0.0
        return away, size if size < FARTHEST else FARTHEST

    def learn(self, u: float, v: float, coarse: int, fine: int, y: float, whole: float = 0.0) -> None:
        """One observation ``y`` > 0; see ``RobustLine.learn`` for ``whole``."""
        self.line.learn(u, v, y, whole)
        absorb(self.coarse, coarse, u, v, y)
        absorb(self.fine, fine, u, v, y)
        if self.line.rows % LOOK_AGAIN == 0:
            self.least = LEAST * min([cell[3] for cell in self.coarse.values()])

    def rescale_cell(self, coarse: int, factor: float) -> None:
        """Multiply what is known of one coarse cell and the fine ones in it, and hold it less firmly."""
        inside = [cell for key, cell in self.fine.items() if key // FINE == coarse]
        for cell in (*inside, *([self.coarse[coarse]] if coarse in self.coarse else ())):
            cell[3] *= factor
            if cell[0] > LOOSE:
                cell[0] = LOOSE

    def rescale(self, factor: float) -> None:
        self.line.rescale(factor)
        self.least *= factor
        for cells in (self.coarse, self.fine):
            for cell in cells.values():
                cell[3] *= factor
