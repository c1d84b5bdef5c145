"""Gradient-boosted regression trees in numpy, enough to re-create a detector that is built on them.

Squared error, trees of fixed depth grown level by level on binned features (quantiles), as histogram-based
boosting does it. Slower and plainer than the libraries; deterministic.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Bins = npt.NDArray[np.int64]

TREES, DEPTH, RATE = 200, 4, 0.1
BINS = 64
LEAST_ROWS = 5


@dataclass
class BoostedTrees:
    """``fit`` then ``predict``. ``rows``: (n, features)."""

    trees: int = TREES
    depth: int = DEPTH
    rate: float = RATE
    _edges: list[Floats] = field(default_factory=list)
    _base: float = 0.0
    _grown: list[tuple[Bins, Bins, Floats]] = field(default_factory=list)
    """Per tree: feature and bin of each inner node in level order (bin ``BINS``: all go left); leaves."""

    def fit(self, rows: Floats, y: Floats) -> BoostedTrees:
        quantiles = np.linspace(0.0, 1.0, BINS + 1)[1:-1]
        self._edges = [np.unique(np.quantile(column, quantiles)) for column in rows.T]
        bins = self._bin(rows)
        self._base = float(y.mean())
        self._grown = []
        value = np.full(len(y), self._base)
        for _ in range(self.trees):
            features, cuts, leaf_of = self._grow(bins, y - value)
            sums = np.bincount(leaf_of, y - value, minlength=2**self.depth)
            counts = np.bincount(leaf_of, minlength=2**self.depth)
            leaves = self.rate * sums / np.maximum(counts, 1)
            self._grown.append((features, cuts, leaves))
            value += leaves[leaf_of]
        return self

    def predict(self, rows: Floats) -> Floats:
        bins = self._bin(rows)
        value = np.full(len(rows), self._base)
        index = np.arange(len(rows))
        for features, cuts, leaves in self._grown:
            node = np.zeros(len(rows), dtype=np.int64)
            for level in range(self.depth):
                at = node + 2**level - 1
                node = 2 * node + (bins[index, features[at]] > cuts[at])
            value += leaves[node]
        return value

    def _bin(self, rows: Floats) -> Bins:
        found = [np.searchsorted(edges, column) for edges, column in zip(self._edges, rows.T)]
        return np.stack(found, axis=1).astype(np.int64)

    def _grow(self, bins: Bins, rest: Floats) -> tuple[Bins, Bins, Bins]:
        """One tree on the residuals; also the leaf of each row."""
        node = np.zeros(len(rest), dtype=np.int64)
        features: list[int] = []
        cuts: list[int] = []
        for level in range(self.depth):
            wide = 2**level
            best = np.full(wide, 1e-12)
            feature, cut = np.zeros(wide, dtype=np.int64), np.full(wide, BINS, dtype=np.int64)
            for number in range(bins.shape[1]):
                gain, place = _best_cut(node * BINS + bins[:, number], rest, wide)
                better = gain > best
                best[better], feature[better], cut[better] = gain[better], number, place[better]
            features += feature.tolist()
            cuts += cut.tolist()
            node = 2 * node + (bins[np.arange(len(rest)), feature[node]] > cut[node])
        return np.array(features), np.array(cuts), node


def _best_cut(keys: Bins, rest: Floats, nodes: int) -> tuple[Floats, Bins]:
    """For each node: how much the best cut of one feature lowers the squared error, and its bin."""
    sums = np.bincount(keys, rest, minlength=nodes * BINS).reshape(nodes, BINS).cumsum(axis=1)
    counts = np.bincount(keys, minlength=nodes * BINS).reshape(nodes, BINS).cumsum(axis=1)
    total, rows = sums[:, -1:], counts[:, -1:]
    right = rows - counts
    fits = (counts >= LEAST_ROWS) & (right >= LEAST_ROWS)
    gain = sums**2 / np.maximum(counts, 1) + (total - sums) ** 2 / np.maximum(right, 1)
    gain = np.where(fits, gain - total**2 / np.maximum(rows, 1), 0.0)
    place = gain.argmax(axis=1)
    return gain[np.arange(nodes), place], place
