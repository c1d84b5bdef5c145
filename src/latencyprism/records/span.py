"""Span and Counter: what is drawn on a track of the timeline."""

from __future__ import annotations

from typing import NamedTuple


class Span(NamedTuple):
    """Something that took time. ``track`` is a path such as ``("EngineCore 812", "schedule")``: process,
    then thread or lane; times are CLOCK_MONOTONIC nanoseconds; ``step`` is the step it belongs to."""

    track: tuple[str, ...]
    name: str
    start_ns: int
    end_ns: int
    step: int | None = None
    details: tuple[tuple[str, str | int | float], ...] = ()


class Counter(NamedTuple):
    """One reading of a number that changes over time; ``unit`` is a word such as ``ns`` or ``count``."""

    track: tuple[str, ...]
    name: str
    time_ns: int
    value: float
    unit: str = "count"
