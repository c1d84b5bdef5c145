"""The reading half of a capture: believes only whole blocks, and says in words what it had to leave out."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from latencyprism.agent.operator_ring import OperatorRecords
from latencyprism.errors import BadInput
from latencyprism.recorder import operator_blocks, tables
from latencyprism.recorder.blocks import BadBlock, Block, blocks_in
from latencyprism.recorder.judgements import alert_from_dict, verdict_from_dict
from latencyprism.recorder.wire import WireError
from latencyprism.records import NULL, STEP_DTYPE, Alert, Counter, Request, Span, Step, Verdict
from latencyprism.records.operators import Operators

FORMAT = 1
"""Raised when a reader of the format before could misread a file; new columns and blocks do not raise it."""

_TYPES = {"<i8", "<i4", "<u4", "<f8", "|S16"}


@dataclass(slots=True)
class Contents:
    meta: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, Any] = field(default_factory=dict)
    steps: dict[int, Step] = field(default_factory=dict)
    """By place in the capture as written, so that what is aligned with them stays so around a hole."""
    spans: list[Span] = field(default_factory=list)
    counters: list[Counter] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    operators: list[Operators] = field(default_factory=list)
    operator_records: list[tuple[str, OperatorRecords]] = field(default_factory=list)
    alerts: list[Alert] = field(default_factory=list)
    verdict: Verdict | None = None
    expected_ms: list[float | None] | None = None
    words: list[Any] = field(default_factory=list)
    whole: bool = False
    notices: list[str] = field(default_factory=list)


def read_contents(data: memoryview, path: str) -> Contents:
    """BadInput if ``data`` is not a capture or of a later format."""
    contents = Contents()
    begun = False
    try:
        for block in blocks_in(data):
            if isinstance(block, BadBlock):
                contents.notices.append(str(block))
            elif block.kind == "capture":
                _begin(contents, block, path)
                begun = True
            elif begun:
                _take(contents, block)
    except WireError as error:
        if begun:
            contents.notices.append(f"the file is cut off or damaged: {error}")
        elif error.offset == 0 and bytes(data[:1]) != b"\x0a":
            raise BadInput(f"cannot read {path}", "it is not a LatencyPrism capture") from None
    if not begun:
        why = contents.notices[0] if contents.notices else "no capture header in it"
        raise BadInput(
            f"cannot read {path}",
            f"it is not a LatencyPrism capture, or is cut off before its header ({why})",
            "a plain Perfetto trace can be opened at https://ui.perfetto.dev",
        )
    _tell_what_is_missing(contents)
    return contents


def _begin(contents: Contents, block: Block, path: str) -> None:
    written = block.header.get("format")
    if not isinstance(written, int) or written < 1:
        raise BadInput(f"cannot read {path}", "its header names no format")
    if written > FORMAT:
        raise BadInput(
            f"cannot read {path}",
            f"it has format {written} and this version reads up to {FORMAT}",
            "read it with the version of latencyprism that wrote it, or a later one",
        )
    meta, counts = block.header.get("meta"), block.header.get("counts")
    contents.meta = meta if isinstance(meta, dict) else {}
    contents.counts = counts if isinstance(counts, dict) else {}


def _take(contents: Contents, block: Block) -> None:
    reader = _READERS.get(block.kind)
    if reader is None:
        contents.notices.append(f"a block of the unknown kind {block.kind!r:.40} is left out")
        return
    try:
        reader(contents, block)
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        contents.notices.append(f"a block of {block.kind} is left out: {error}")


def _read_steps(contents: Contents, block: Block) -> None:
    first = block.header["first"]
    if not isinstance(first, int) or first < 0:
        raise ValueError("its place is not told")
    steps = tables.unpack_step_rows(_rows(block, STEP_DTYPE))
    contents.steps.update(enumerate(steps, first))


def _read_spans(contents: Contents, block: Block) -> None:
    contents.spans += tables.unpack_spans(_rows(block, tables.SPAN_DTYPE), contents.words)


def _read_counters(contents: Contents, block: Block) -> None:
    contents.counters += tables.unpack_counters(_rows(block, tables.COUNTER_DTYPE), contents.words)


def _read_requests(contents: Contents, block: Block) -> None:
    contents.requests += tables.unpack_requests(_rows(block, tables.REQUEST_DTYPE))


def _read_operators(contents: Contents, block: Block) -> None:
    contents.operators.append(operator_blocks.read_operators(block))


def _read_operator_records(contents: Contents, block: Block) -> None:
    process, seen = operator_blocks.read_raw(block)
    for known, before in contents.operator_records:
        if known == process and before.pid == seen.pid:
            for chunk in seen.chunks:
                before.keep(chunk)
            return
    contents.operator_records.append((process, seen))


def _read_words(contents: Contents, block: Block) -> None:
    words = tables.words_from_json(block.data)
    first = block.header["first"]
    if not isinstance(first, int) or not 0 <= first <= len(contents.words) + (1 << 22):
        raise ValueError("its place is not told")
    # A block before this one may be missing: rows that point into the hole are refused one block at a time.
    contents.words += [None] * (first - len(contents.words))
    contents.words[first:] = words


def _read_alerts(contents: Contents, block: Block) -> None:
    contents.alerts = [alert_from_dict(told) for told in json.loads(block.data)]


def _read_verdict(contents: Contents, block: Block) -> None:
    contents.verdict = verdict_from_dict(json.loads(block.data))


def _read_expected(contents: Contents, block: Block) -> None:
    values = np.frombuffer(block.data, dtype="<f8").tolist()
    contents.expected_ms = [None if value != value else value for value in values]


def _read_end(contents: Contents, block: Block) -> None:
    contents.whole = True


_READERS: dict[str, Callable[[Contents, Block], None]] = {
    "steps": _read_steps,
    "spans": _read_spans,
    "counters": _read_counters,
    "requests": _read_requests,
    "operators": _read_operators,
    "operator_records": _read_operator_records,
    "words": _read_words,
    "alerts": _read_alerts,
    "verdict": _read_verdict,
    "expected": _read_expected,
    "end": _read_end,
}


def _rows(block: Block, wanted: np.dtype[np.void]) -> tables.Packed:
    """The rows of a table in today's layout, whatever columns they were written with."""
    columns = [(str(name), str(kind)) for name, kind in block.header["columns"]]
    if not columns or any(kind not in _TYPES for _, kind in columns):
        raise ValueError("its columns are not told")
    written = np.dtype(columns)
    found = np.frombuffer(block.data, dtype=written)
    if len(found) != block.header.get("rows"):
        raise ValueError("it holds another number of rows than it says")
    rows = np.empty(len(found), dtype=wanted)
    for name in wanted.names or ():
        if name in (written.names or ()):
            if written[name].kind != wanted[name].kind and "S" in (written[name].kind, wanted[name].kind):
                raise ValueError(f"column {name} has another type")
            rows[name] = found[name]
        elif wanted[name].kind == "S":
            rows[name] = b""
        elif wanted[name].kind == "f":
            rows[name] = np.nan
        elif name in _REQUIRED or wanted[name].kind == "u":
            raise ValueError(f"column {name} is missing")
        else:
            rows[name] = -1 if name == "details" else NULL
    return rows


_REQUIRED = {"start_ns", "end_ns", "time_ns"}


def _tell_what_is_missing(contents: Contents) -> None:
    found = {"steps": len(contents.steps), "spans": len(contents.spans), "counters": len(contents.counters),
             "requests": len(contents.requests), "alerts": len(contents.alerts),
             "operators": sum(len(calls.rows) for calls in contents.operators)}  # fmt: skip
    short = [
        f"{held} of {contents.counts[kind]} {kind}"
        for kind, held in found.items()
        if isinstance(contents.counts.get(kind), int) and held < contents.counts[kind]
    ]
    if short:
        contents.notices.append("read " + ", ".join(short))
    elif not contents.whole:
        contents.notices.append("all records are here; only the part that Perfetto shows may be cut off")
