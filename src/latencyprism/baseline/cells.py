"""A line corrected by cells: step time is a staircase in batch size, and a line is 3 % off it.

Every cell is a running centroid (count, mean time, mean position), not an offset: when the line moves
later, the correction is recomputed against the moved line at the cell's own place and stays true.
"""

from __future__ import annotations

from math import exp, log

from latencyprism.baseline.line import RobustLine

COARSE_PRIOR, FINE_PRIOR = 3.0, 8.0
"""Observations by which a cell is pulled towards the level above it."""
MEMORY = 400.0
"""A centroid forgets over this many observations."""
CELLS_MAX = 600
"""Upper bound on cells of one line: state stays bounded whatever the traffic does."""

Centroid = list[float]
"""[count, mean u, mean v, mean y]"""


def absorb(cell: Centroid, u: float, v: float, y: float) -> None:
    """Move a centroid by one observation."""
    if cell[0] < MEMORY:
        cell[0] += 1.0
    part = 1.0 / cell[0]
    cell[1] += (u - cell[1]) * part
    cell[2] += (v - cell[2]) * part
    cell[3] += (y - cell[3]) * part


class CorrectedLine:
    """``line(u, v) x coarse cell x fine cell``; keys are made by the caller."""

    __slots__ = ("coarse", "coarse_count", "correction", "fine", "fine_count", "line")

    def __init__(self) -> None:
        self.line = RobustLine()
        self.coarse: dict[int, Centroid] = {}
        self.fine: dict[int, Centroid] = {}
        self.coarse_count = self.fine_count = 0.0
        self.correction = 0.0

    def at(self, u: float, v: float, coarse: int, fine: int) -> float:
        """Expected value; leaves ``correction`` (log), ``coarse_count`` and ``fine_count`` behind."""
        line = self.line
        shift = 0.0
        cell = self.coarse.get(coarse)
        if cell is None:
            self.coarse_count = self.fine_count = 0.0
        else:
            count = self.coarse_count = cell[0]
            shift = log(cell[3] / line.at(cell[1], cell[2])) * count / (count + COARSE_PRIOR)
            cell = self.fine.get(fine)
            if cell is None:
                self.fine_count = 0.0
            else:
                count = self.fine_count = cell[0]
                rest = log(cell[3] / line.at(cell[1], cell[2])) - shift
                shift += rest * count / (count + FINE_PRIOR)
        self.correction = shift
        return line.at(u, v) * exp(shift)

    def learn(self, u: float, v: float, coarse: int, fine: int, y: float, whole: float = 0.0) -> None:
        """One observation ``y`` > 0; see ``RobustLine.learn`` for ``whole``."""
        self.line.learn(u, v, y, whole)
        for cells, key in ((self.coarse, coarse), (self.fine, fine)):
            cell = cells.get(key)
            if cell is not None:
                absorb(cell, u, v, y)
            else:
                if len(cells) >= CELLS_MAX:
                    del cells[min(cells, key=lambda old: cells[old][0])]
                cells[key] = [1.0, u, v, y]

    def rescale(self, factor: float) -> None:
        self.line.rescale(factor)
        for cells in (self.coarse, self.fine):
            for cell in cells.values():
                cell[3] *= factor
