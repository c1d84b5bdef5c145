"""Step: one engine iteration (one batch), in the column names used everywhere.

Times are CLOCK_MONOTONIC nanoseconds of the machine the engine runs on; durations are nanoseconds;
counts are plain integers. A value that was not observed is ``None`` in Python and ``NULL`` in the
packed layout, never zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

NULL = -(2**63)
"""The packed form of "not observed" for integer columns; NaN is the one for ``kv_usage``."""

PHASES = ("prefill", "decode", "mixed")


class Step(NamedTuple):
    """One batch. ``phase`` is one of ``PHASES`` or None (a step that scheduled no token)."""

    engine: str
    replica: int
    rank: int
    step: int
    start_ns: int
    end_ns: int
    phase: str | None = None
    requests: int | None = None
    prefill_requests: int | None = None
    decode_requests: int | None = None
    prefill_tokens: int | None = None
    """Tokens scheduled for prefill in this step, after prefix-cache hits."""
    decode_tokens: int | None = None
    cached_tokens: int | None = None
    context_tokens: int | None = None
    """Sum over requests of computed + scheduled tokens."""
    attention_work: int | None = None
    """Sum over prefill requests of scheduled x context tokens."""
    draft_tokens: int | None = None
    accepted_tokens: int | None = None
    preempted: int | None = None
    running: int | None = None
    """Requests that run at the end of the step, after the finished ones were taken out."""
    waiting: int | None = None
    """Requests that wait at the end of the step."""
    kv_usage: float | None = None
    schedule_ns: int | None = None
    execute_ns: int | None = None
    sample_ns: int | None = None
    update_ns: int | None = None
    gap_ns: int | None = None
    """Engine idle time between the end of the step before and the start of this one."""
    runqueue_ns: int | None = None
    offcpu_ns: int | None = None
    throttled_ns: int | None = None
    gc_ns: int | None = None
    major_faults: int | None = None
    xpu_busy_ns: int | None = None
    """Time of the step in which a kernel ran on the busiest device; known in the few steps of a window of
    kernels alone. A kernel that waits for other ranks runs, too; copies do not count."""
    collective_ns: int | None = None
    """Time in collectives, waiting for other ranks included, of the rank that ended last; captures alone."""

    @property
    def duration_ns(self) -> int:
        return self.end_ns - self.start_ns

    @property
    def duration_ms(self) -> float:
        return (self.end_ns - self.start_ns) / 1e6


STEP_COLUMNS: tuple[str, ...] = Step._fields

_ENGINE_BYTES = 16


def _column_type(name: str) -> str:
    if name == "engine":
        return f"S{_ENGINE_BYTES}"
    return "<f8" if name == "kv_usage" else "<i8"


STEP_DTYPE = np.dtype([(name, _column_type(name)) for name in STEP_COLUMNS])
"""Packed: FixedString(16), then Int64 (``phase`` as index into PHASES), ``kv_usage`` Float64; the
bytes are ClickHouse RowBinary of that table."""


def step_to_row(step: Step) -> tuple[object, ...]:
    """The packed form of a step, as a tuple that ``STEP_DTYPE`` accepts."""
    row: list[object] = []
    for name, value in zip(STEP_COLUMNS, step):
        if name == "engine":
            row.append(str(value).encode()[:_ENGINE_BYTES])
        elif name == "kv_usage":
            row.append(float("nan") if value is None else value)
        elif name == "phase":
            row.append(NULL if value is None else PHASES.index(str(value)))
        else:
            row.append(NULL if value is None else value)
    return tuple(row)


def row_to_step(row: Sequence[object]) -> Step:
    """The inverse of ``step_to_row``."""
    values: list[object] = []
    for name, value in zip(STEP_COLUMNS, row):
        if name == "engine":
            values.append(value.decode("ascii", "replace") if isinstance(value, bytes) else str(value))
        elif name == "kv_usage":
            number = float(value)  # type: ignore[arg-type]
            values.append(None if number != number else number)
        else:
            integer = int(value)  # type: ignore[call-overload]
            if integer == NULL:
                values.append(None)
            else:
                values.append(PHASES[integer] if name == "phase" else integer)
    return Step._make(values)


def pack_steps(steps: Iterable[Step]) -> npt.NDArray[np.void]:
    """Steps as one packed array of ``STEP_DTYPE``."""
    return np.array([step_to_row(step) for step in steps], dtype=STEP_DTYPE)


def unpack_steps(packed: npt.NDArray[np.void]) -> list[Step]:
    """The inverse of ``pack_steps``; ValueError if the array has another layout."""
    if packed.dtype != STEP_DTYPE:
        raise ValueError(f"not a packed step array: {packed.dtype}")
    return [row_to_step(row) for row in packed.tolist()]
