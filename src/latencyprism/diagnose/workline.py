"""What a duration should be for the work in a step: a robust line through the reference window."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from latencyprism.records import STEP_COLUMNS, Step

Array = npt.NDArray[np.float64]

WORK_COLUMNS = ("decode_tokens", "prefill_tokens", "context_tokens", "attention_work", "requests")
_ROUNDS = 6
_HUBER = 1.5
_RIDGE = 1e-3


def column(steps: Sequence[Step], name: str) -> Array:
    """One column of the steps as floats; NaN where it was not observed."""
    index = STEP_COLUMNS.index(name)
    return np.array([step[index] for step in steps], dtype=float)


class WorkLine:
    """``duration = a + b x decode tokens + c x prefill tokens + …`` over those columns that the steps
    carry; fitted by re-weighted least squares on relative errors (Huber), so that spikes do not pull it."""

    def __init__(self, steps: Sequence[Step], durations: Array) -> None:
        self.columns = [name for name in WORK_COLUMNS if self._usable(column(steps, name))]
        raw = self._raw(steps)
        self._low, self._high = raw.min(axis=0), raw.max(axis=0)
        self._centre, self._scale = raw.mean(axis=0), raw.std(axis=0) + 1e-12
        self.typical = float(np.median(durations))
        self._coefficients = self._fit(self._design(raw), durations)
        # A line through noise may cross zero; nothing takes less than a fifth of the fastest seen.
        self._least = 0.2 * max(float(np.percentile(durations, 2)), 1.0)

    @staticmethod
    def _usable(values: Array) -> bool:
        seen = np.isfinite(values)
        return bool(seen.mean() > 0.9 and np.ptp(values[seen]) > 0) if len(values) else False

    def _raw(self, steps: Sequence[Step]) -> Array:
        table = [np.nan_to_num(column(steps, name)) for name in self.columns]
        return np.column_stack(table) if table else np.zeros((len(steps), 0))

    def _design(self, raw: Array) -> Array:
        return np.column_stack([np.ones(len(raw)), (raw - self._centre) / self._scale])

    def _fit(self, design: Array, durations: Array) -> Array:
        predicted = np.full(len(durations), max(self.typical, 1.0))
        weights = np.ones(len(durations))
        coefficients = np.zeros(design.shape[1])
        ridge = _RIDGE * len(durations) * np.eye(design.shape[1])
        ridge[0, 0] = 0.0
        for _ in range(_ROUNDS):
            scale = np.sqrt(weights) / np.maximum(predicted, 0.2 * max(self.typical, 1.0))
            scaled = design * scale[:, None] * max(self.typical, 1.0)
            target = durations * scale * max(self.typical, 1.0)
            coefficients = np.linalg.lstsq(scaled.T @ scaled + ridge, scaled.T @ target, rcond=None)[0]
            predicted = design @ coefficients
            relative = (durations - predicted) / np.maximum(predicted, 0.2 * max(self.typical, 1.0))
            spread = 1.4826 * np.median(np.abs(relative - np.median(relative))) + 1e-6
            weights = np.minimum(1.0, _HUBER * spread / np.maximum(np.abs(relative), 1e-12))
        return np.asarray(coefficients)

    def predict(self, steps: Sequence[Step]) -> Array:
        """Expected duration of each step, in the unit of the durations fitted."""
        if not steps:
            return np.zeros(0)
        return np.asarray(np.maximum(self._design(self._raw(steps)) @ self._coefficients, self._least))

    def unfamiliar(self, steps: Sequence[Step]) -> float:
        """How far the work lies outside of what the line was fitted on: 0 inside, 1 for twice the range, …
        (the worst column, median over steps)."""
        if not self.columns or not steps:
            return 0.0
        raw = self._raw(steps)
        width = np.maximum(self._high - self._low, 1e-9)
        outside = np.maximum(raw - self._high, 0) + np.maximum(self._low - raw, 0)
        return float(np.max(np.mean(outside / width, axis=0)))
