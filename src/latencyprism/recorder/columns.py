"""Captures as tables of named columns: what SQL, Parquet and CSV see. Not observed is None.

Names are those of the records, everywhere. ``capture`` says which file a row is from.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from latencyprism.recorder.capture import Capture
from latencyprism.recorder.drawing import clock_pair, hashed
from latencyprism.records import REQUEST_COLUMNS, STEP_COLUMNS

_ALERT = (
    ("id", str), ("kind", str), ("level", str), ("engine", str), ("replica", int), ("rank", int),
    ("step", int), ("onset_step", int),
    ("time", str), ("observed_ms", float), ("expected_ms", float), ("excess", float),
    ("delay_ms", float), ("where", str),
)  # fmt: skip
_WORDS = {"engine", "phase", "finish_reason", "request", "client_request", "route"}


@dataclass(frozen=True, slots=True)
class Table:
    """``columns``: name and type (``str``, ``int`` of 64 bits, ``float``); ``values`` are columns, too."""

    name: str
    columns: tuple[tuple[str, type], ...]
    values: list[Sequence[Any]]

    def rows(self) -> Iterator[tuple[Any, ...]]:
        return zip(*self.values)

    def __len__(self) -> int:
        return len(self.values[0])


def tables_of(captures: Iterable[tuple[str, Capture]]) -> list[Table]:
    """All tables of captures and their names, rows of one after the other's; empty ones, too."""
    found: dict[str, list[list[Any]]] = {name: [[] for _ in columns] for name, columns in COLUMNS.items()}
    for name, capture in captures:
        for table, rows in _rows(capture).items():
            columns = found[table]
            for values in rows:
                columns[0].append(name)
                for column, value in zip(columns[1:], values):
                    column.append(value)
    return [Table(name, COLUMNS[name], list(values)) for name, values in found.items()]


def _rows(capture: Capture) -> dict[str, Iterator[tuple[Any, ...]]]:
    return {
        "captures": _capture_row(capture),
        "steps": _steps(capture),
        "requests": _requests(capture),
        "spans": _spans(capture),
        "counters": _counters(capture),
        "operators": _operators(capture),
        "alerts": _alerts(capture),
        "verdicts": _verdicts(capture),
    }  # fmt: skip


def _capture_row(capture: Capture) -> Iterator[tuple[Any, ...]]:
    meta = capture.meta
    monotonic_ns, realtime_ns = clock_pair(meta.get("clock")) or (None, None)
    host = meta.get("host")
    yield (
        meta.get("engine") if isinstance(meta.get("engine"), str) else None,
        host if isinstance(host, str) else None,
        monotonic_ns,
        realtime_ns,
        _json(capture.notices) if capture.notices else None,
        _json({name: value for name, value in meta.items() if name != "request_key"}),
    )


def _steps(capture: Capture) -> Iterator[tuple[Any, ...]]:
    known = capture.expected_ms or []
    for place, step in enumerate(capture.steps):
        yield (*step, known[place] if place < len(known) else None)


def _requests(capture: Capture) -> Iterator[tuple[Any, ...]]:
    hidden = [REQUEST_COLUMNS.index(name) for name in ("request", "client_request")]
    for request in capture.requests:
        row: list[Any] = list(request)
        for place in hidden:
            row[place] = None if row[place] is None else hashed(row[place])
        yield tuple(row)


def _spans(capture: Capture) -> Iterator[tuple[Any, ...]]:
    for span in capture.spans:
        details = _json(dict(span.details)) if span.details else None
        yield "/".join(span.track), span.name, span.start_ns, span.end_ns, span.step, details


def _counters(capture: Capture) -> Iterator[tuple[Any, ...]]:
    for counter in capture.counters:
        yield "/".join(counter.track), counter.name, counter.time_ns, _number(counter.value), counter.unit


def _operators(capture: Capture) -> Iterator[tuple[Any, ...]]:
    for calls in capture.operators:
        track = "/".join(calls.track)
        for start_ns, end_ns, step, name in calls.rows.tolist():
            yield track, calls.names[name], start_ns, end_ns, None if step < 0 else step


def _alerts(capture: Capture) -> Iterator[tuple[Any, ...]]:
    for alert in capture.alerts:
        terms = None if alert.terms is None else _json(alert.terms)
        yield (*(getattr(alert, name) for name, _ in _ALERT), terms)


def _verdicts(capture: Capture) -> Iterator[tuple[Any, ...]]:
    verdict = capture.verdict
    if verdict is not None:
        told = verdict.to_dict()
        yield (
            verdict.cause, _number(verdict.probability), verdict.cycles, _number(verdict.seconds),
            _json(told["ranking"]), _json(told["evidence"]), _json(told["not_looked_at"]),
        )  # fmt: skip


def _number(value: float) -> float:
    return float(value)


def _json(value: Any) -> str:
    return json.dumps(value, default=str)


def _kind(name: str) -> type:
    return str if name in _WORDS else float if name == "kv_usage" else int


_FROM = ("capture", str)
COLUMNS: dict[str, tuple[tuple[str, type], ...]] = {
    "captures": (
        _FROM, ("engine", str), ("host", str), ("monotonic_ns", int), ("realtime_ns", int), ("notices", str),
        ("meta", str),
    ),
    "steps": (_FROM, *((name, _kind(name)) for name in STEP_COLUMNS), ("expected_ms", float)),
    "requests": (_FROM, *((name, _kind(name)) for name in REQUEST_COLUMNS)),
    "spans": (
        _FROM, ("track", str), ("name", str), ("start_ns", int), ("end_ns", int), ("step", int),
        ("details", str),
    ),
    "counters": (_FROM, ("track", str), ("name", str), ("time_ns", int), ("value", float), ("unit", str)),
    "operators": (
        _FROM, ("track", str), ("name", str), ("start_ns", int), ("end_ns", int), ("step", int),
    ),
    "alerts": (_FROM, *_ALERT, ("terms", str)),
    "verdicts": (
        _FROM, ("cause", str), ("probability", float), ("cycles", int), ("seconds", float), ("ranking", str),
        ("evidence", str), ("not_looked_at", str),
    ),
}  # fmt: skip
"""``request`` and ``client_request``: 16 hexadecimal digits; ``track``: its path with ``/`` between;
what is no single value is JSON. Times are CLOCK_MONOTONIC of the machine; ``captures`` has a pair of
readings.
"""
