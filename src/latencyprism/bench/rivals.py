"""Other detectors on the same streams: that of the LatencyPrism paper (arXiv 2601.09258), re-created, and raw
thresholds on the step time, which know no workload.

The paper: boosted trees (200 of depth 4) on batch size, KV load, prefill tokens and attention work; the error
E = max(0, (Y - Yhat) / Y); its mean over 10 steps ("window") or alone ("point") above mean + 3 sd of the
errors on what was trained on ("dynamic"), or above 15 % ("fixed").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from latencyprism.bench.boosted_trees import BoostedTrees
from latencyprism.records.step import Step

Floats = npt.NDArray[np.float64]
Told = Callable[[Sequence[Step]], list[int]]
"""Positions of a stream at which a detector alerts; the stream's work is that which was prepared for."""

WINDOW = 10
FIXED = 0.15
EWMA = 0.02
EWMA_SD = 3.0
RAW_QUANTILE = 0.999

NAMES = ("paper_dynamic_window", "paper_dynamic_point", "paper_fixed_window", "raw_threshold", "raw_ewma")


def rivals(trained: Sequence[Step], stream: Sequence[Step]) -> dict[str, Told]:
    """All of them, trained on the first steps; they do not learn on. Empty where nothing was trained on."""
    if len(trained) < WINDOW:
        return {}
    rows, took = _work(trained), _took(trained)
    trees = BoostedTrees().fit(rows, took)
    known = _errors(took, trees.predict(rows))
    window = _mean_of_last(known)
    expected = trees.predict(_work(stream))
    point_limit, window_limit = _limit(known), _limit(window)
    raw_limit = float(np.quantile(took, RAW_QUANTILE))
    start = (float(took.mean()), float(took.var()))

    def error(steps: Sequence[Step]) -> Floats:
        return _errors(_took(steps), expected)

    return {
        "paper_dynamic_window": lambda steps: _above(_mean_of_last(error(steps)), window_limit),
        "paper_dynamic_point": lambda steps: _above(error(steps), point_limit),
        "paper_fixed_window": lambda steps: _above(_mean_of_last(error(steps)), FIXED),
        "raw_threshold": lambda steps: _above(_took(steps), raw_limit),
        "raw_ewma": lambda steps: _ewma(_took(steps), *start),
    }


def _took(steps: Sequence[Step]) -> Floats:
    return np.array([(step.end_ns - step.start_ns) / 1e6 for step in steps])


def _work(steps: Sequence[Step]) -> Floats:
    rows = []
    for step in steps:
        batch = step.requests or step.decode_tokens or step.running or 0
        context = step.context_tokens or 0
        rows.append((batch, context, step.prefill_tokens or 0, step.attention_work or 0))
    return np.array(rows, dtype=np.float64)


def _errors(took: Floats, expected: Floats) -> Floats:
    return np.maximum(0.0, (took - expected) / np.maximum(took, 1e-9))


def _mean_of_last(errors: Floats) -> Floats:
    sums = np.concatenate(([0.0], errors.cumsum()))
    ends = np.arange(1, len(errors) + 1)
    starts = np.maximum(0, ends - WINDOW)
    means: Floats = (sums[ends] - sums[starts]) / (ends - starts)
    return means


def _limit(errors: Floats) -> float:
    return float(errors.mean() + 3.0 * errors.std())


def _above(values: Floats, limit: float) -> list[int]:
    found: list[int] = np.flatnonzero(values > limit).tolist()
    return found


def _ewma(took: Floats, mean: float, variance: float) -> list[int]:
    """Control chart on the raw step time that follows it."""
    found = []
    for at, value in enumerate(took.tolist()):
        ahead = value - mean
        if ahead > EWMA_SD * variance**0.5:
            found.append(at)
        mean += EWMA * ahead
        variance += EWMA * (ahead * ahead - variance)
    return found
