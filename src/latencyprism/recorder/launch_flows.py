"""Flows from a call that launched work on a device to the first of what it launched there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from latencyprism.records import Span
from latencyprism.records.device_spans import CORRELATION, is_launch, on_a_device, process_of


def launches(spans: Sequence[Span]) -> list[tuple[int, int, tuple[Any, ...]]]:
    """(place of the call, place of the first row on a device, what tells this pair from others).

    Both are of one process and have one correlation there. A graph's launch has many kernels: the arrow goes
    to the one that began first."""
    calls: dict[tuple[str, Any], int] = {}
    rows: dict[tuple[str, Any], int] = {}
    for place, span in enumerate(spans):
        if not span.details or len(span.track) != 2:
            continue
        if is_launch(span):
            _keep_first(calls, (process_of(span), _correlation(span)), place, spans)
        elif on_a_device(span):
            _keep_first(rows, (process_of(span), _correlation(span)), place, spans)
    return [
        (place, rows[key], ("launch", *key))
        for key, place in calls.items()
        if key[1] is not None and key in rows
    ]


def _keep_first(
    found: dict[tuple[str, Any], int], key: tuple[str, Any], place: int, spans: Sequence[Span]
) -> None:
    before = found.get(key)
    if before is None or spans[place].start_ns < spans[before].start_ns:
        found[key] = place


def _correlation(span: Span) -> Any:
    return next((value for name, value in span.details if name == CORRELATION), None)
