"""Operators: calls of a framework's operators in one thread, as columns, for there are very many."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

OPERATOR_DTYPE = np.dtype([("start_ns", "<i8"), ("end_ns", "<i8"), ("step", "<i8"), ("name", "<u4")])
"""CLOCK_MONOTONIC; ``step``: the one in whose time it began, NULL for none; ``name``: place in the names."""


@dataclass(slots=True)
class Operators:
    """``track`` is a path as that of a Span: process, then lane of the thread. ``rows`` are in order of
    their starts, an outer call before those in it; calls of one thread nest. ``every``: only steps whose
    number is a multiple of it were kept (1: all)."""

    track: tuple[str, ...]
    names: list[str]
    rows: npt.NDArray[np.void]
    every: int = 1
