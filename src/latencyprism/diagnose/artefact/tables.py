"""The four tables of such a folder: ``normal_perf``, ``normal_counters``, ``abnormal_perf``,
``abnormal_counters``, each ``.csv`` or ``.csv.gz``. They may be missing, cut off, or not what they claim."""

from __future__ import annotations

import csv
import gzip
import io
import math
import zlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, cast

from latencyprism.diagnose.artefact.layers import layer_of
from latencyprism.errors import BadInput

PERIODS, KINDS = ("normal", "abnormal"), ("perf", "counters")
_PERF_COLUMNS = ("cycle", "pid", "function_name", "device", "func_type", "duration", "instances_count")
_COUNTER_COLUMNS = ("counter_name", "timestamp", "value")
_MOST_BYTES = 1 << 30
_MOST_ROWS = 4_000_000
_MOST_NAME = 8192
_MOST_BAD = 0.2

OpKey = tuple[str, str]
"""Layer (``features.LAYERS``) and name of an operation."""
CycleKey = tuple[str, str]
"""PID of the rank, and number of the cycle."""


@dataclass(slots=True)
class Cycle:
    """``spent``: microseconds and calls by operation. ``anchor``: the function that delimits the cycle."""

    spent: dict[OpKey, tuple[float, float]] = field(default_factory=dict)
    anchor: str = ""
    anchor_us: float = math.nan


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a perf table as the paper's score wants it."""

    cycle: CycleKey
    operation: str
    device: str
    metric: str
    kind: str
    beta_pct: float
    mu_pct: float


Counters = dict[str, list[tuple[float, float]]]
"""Counter -> (second, value), in order of time."""


@dataclass(slots=True)
class Folder:
    """What was found; ``missing`` says what was not, and what had to be left out."""

    cycles: dict[str, dict[CycleKey, Cycle]] = field(default_factory=dict)
    counters: dict[str, Counters] = field(default_factory=dict)
    rows: dict[str, list[Row]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)


def read_folder(folder: Path, *, rows: bool = False) -> Folder:
    """Raises BadInput for a path that is no folder, holds none of the tables, or whose tables cannot be read.
    ``rows``: keep the rows of the perf tables, too."""
    if not folder.is_dir():
        raise BadInput(f"{str(folder)!r:.200} is not a folder", "an artefact is a folder with tables in it")
    found = Folder()
    for period in PERIODS:
        for kind in KINDS:
            name = f"{period}_{kind}"
            path = next((p for p in (folder / f"{name}.csv", folder / f"{name}.csv.gz") if p.is_file()), None)
            if path is None:
                found.missing.append(f"{name} (no such table in the folder)")
            elif kind == "perf":
                found.cycles[period], found.rows[period] = _read_perf(path, found.missing, rows)
            else:
                found.counters[period] = _read_counters(path, found.missing)
    if not found.cycles and not found.counters:
        wanted = ", ".join(f"{period}_{kind}" for period in PERIODS for kind in KINDS)
        raise BadInput(f"{str(folder)!r:.200} holds no tables", f"looked for {wanted} as .csv or .csv.gz")
    return found


class _Bounded(io.RawIOBase):
    """Ends with BadInput instead of unpacking without bounds."""

    def __init__(self, inner: IO[bytes], name: str) -> None:
        self._inner, self._name, self._left = inner, name, _MOST_BYTES

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer)  # type: ignore[arg-type]
        data = self._inner.read(len(view))
        self._left -= len(data)
        if self._left < 0:
            raise BadInput(f"{self._name} is too large", f"more than {_MOST_BYTES >> 20} MiB unpacked")
        view[: len(data)] = data
        return len(data)


def _table(path: Path, columns: tuple[str, ...]) -> Iterator[dict[str, str]]:
    """The rows of a table that has these columns; BadInput for what is no such table."""
    try:
        with path.open("rb") as raw:
            packed = cast(IO[bytes], gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw)
            stream = io.BufferedReader(_Bounded(packed, path.name))
            text = io.TextIOWrapper(stream, encoding="utf-8", errors="replace", newline="")
            reader = csv.DictReader(text)
            lacking = [name for name in columns if name not in (reader.fieldnames or ())]
            if lacking:
                raise BadInput(f"{path.name} is no such table", f"it has no column {', '.join(lacking)}")
            for number, row in enumerate(reader):
                if number >= _MOST_ROWS:
                    raise BadInput(f"{path.name} is too large", f"more than {_MOST_ROWS} rows")
                yield row
    except (OSError, EOFError, zlib.error, csv.Error) as error:
        raise BadInput(f"{path.name} cannot be read", str(error)[:200] or type(error).__name__) from error


def _number(text: str | None) -> float:
    try:
        value = float(text or "")
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan


def _read_perf(path: Path, missing: list[str], keep: bool) -> tuple[dict[CycleKey, Cycle], list[Row]]:
    cycles: dict[CycleKey, Cycle] = defaultdict(Cycle)
    rows: list[Row] = []
    bad = total = 0
    for row in _table(path, _PERF_COLUMNS):
        total += 1
        spent_us, calls = _number(row["duration"]), _number(row["instances_count"])
        operation, device = (row["function_name"] or "")[:_MOST_NAME], row["device"] or ""
        if not (spent_us >= 0 and calls > 0 and operation):
            bad += 1
            continue
        key = ((row["pid"] or "")[:64], (row["cycle"] or "")[:64])
        cycle = cycles[key]
        layer = layer_of(row["func_type"] or "", operation, device)
        # One row for each metric of an operation: each says the same time and calls.
        cycle.spent[layer, operation] = (spent_us, calls)
        cycle.anchor = (row.get("anchor_name") or "")[:200]
        cycle.anchor_us = _number(row.get("anchor_dur_us"))
        if keep:
            metric, kind = (row.get("metric_name") or "")[:200], (row["func_type"] or "")[:200]
            beta, mu = _number(row.get("beta_pct")), _number(row.get("mu_pct"))
            rows.append(Row(key, operation, device[:64], metric, kind, beta, mu))
    _judge_rows(path.name, bad, total, missing)
    return dict(cycles), rows


def _read_counters(path: Path, missing: list[str]) -> Counters:
    found: Counters = defaultdict(list)
    bad = total = 0
    for row in _table(path, _COUNTER_COLUMNS):
        total += 1
        at_us, value = _number(row["timestamp"]), _number(row["value"])
        if at_us != at_us or value != value or not row["counter_name"]:
            bad += 1
            continue
        found[row["counter_name"][:200]].append((at_us / 1e6, value))
    _judge_rows(path.name, bad, total, missing)
    return {name: sorted(points) for name, points in found.items()}


def _judge_rows(name: str, bad: int, total: int, missing: list[str]) -> None:
    if bad > _MOST_BAD * total:
        raise BadInput(f"{name} is no such table", f"{bad} of {total} rows hold no usable numbers")
    if not total:
        missing.append(f"{name} (it is empty)")
    elif bad:
        missing.append(f"{bad} of {total} rows of {name} (no usable numbers)")
