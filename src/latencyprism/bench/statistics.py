"""Paired comparison of windows: medians of ratios with a bootstrap interval."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES = 4000


def ratio_interval(ratios: Sequence[float], seed: int = 0, level: float = 0.95) -> tuple[float, float, float]:
    """(median, lower, upper): percentile bootstrap of the median over pairs. ValueError for no pairs."""
    values = np.asarray(ratios, dtype=np.float64)
    if values.size == 0 or not np.all(np.isfinite(values)):
        raise ValueError("no finite ratios")
    generator = np.random.default_rng(seed)
    draws = generator.integers(0, values.size, size=(RESAMPLES, values.size))
    medians = np.median(values[draws], axis=1)
    tail = (1 - level) / 2
    return float(np.median(values)), float(np.quantile(medians, tail)), float(np.quantile(medians, 1 - tail))


def resolution(interval: tuple[float, float, float]) -> float:
    """Half the width of the interval: the smallest effect the run could have told from none."""
    return (interval[2] - interval[1]) / 2
