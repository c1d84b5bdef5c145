"""Capture: the seconds around an alert in one file, which Perfetto opens and which reads back exactly.

The file is a Perfetto trace. Blocks of our own (``recorder.blocks``) hold the packed tables; then comes
the same again as tracks, slices and counters; the last block says that the file is whole.
"""

from __future__ import annotations

import json
import mmap
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from latencyprism.agent.operator_ring import OperatorRecords
from latencyprism.errors import BadInput
from latencyprism.recorder import operator_blocks, perfetto, tables
from latencyprism.recorder.atomic import replace_file
from latencyprism.recorder.blocks import Block, write_block
from latencyprism.recorder.judgements import alert_to_dict
from latencyprism.recorder.reading import FORMAT, Contents, read_contents
from latencyprism.recorder.squeezed import squeezed
from latencyprism.records import Alert, Counter, Request, Span, Step, Verdict, Window
from latencyprism.records.operators import Operators

_ROWS_PER_BLOCK = 1000
_WORDS_PER_BLOCK = 20_000
_MAX_FILE_BYTES = 2 << 30


@dataclass(slots=True)
class Capture:
    """``meta`` is any JSON object; keys that the faces know: ``engine``, ``host``, ``pids`` (role to pid),
    ``versions``, ``command``, ``clock`` (``{"monotonic_ns", "realtime_ns", "error_ns"}``),
    ``alert_ns`` (CLOCK_MONOTONIC), ``deep_probe`` (``{"armed_ns", "disarmed_ns"}``), ``loop_threads`` (those
    that emit steps), ``request_key`` (hex: what request ids were hashed with) and ``not_available`` (sources
    that were not there, in words)."""

    meta: dict[str, Any] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    counters: list[Counter] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    """Those that ended, in order of their ends."""
    operators: list[Operators] = field(default_factory=list)
    """Calls of a framework's operators in the deep window, by thread."""
    operator_records: list[tuple[str, OperatorRecords]] = field(default_factory=list)
    """The same as it was copied, by the name of its process, before the writing process has made
    ``operators`` of it; in raw captures alone."""
    alerts: list[Alert] = field(default_factory=list)
    verdict: Verdict | None = None
    expected_ms: list[float | None] | None = None
    """What each step should have taken, aligned with ``steps``; None in it: not known."""
    notices: list[str] = field(default_factory=list)
    """What could not be read of the file, in words; empty for a capture that is whole. Never written."""

    @property
    def window(self) -> Window:
        return Window(self.steps, self.spans, self.counters, self.requests)


def write_capture(path: str | os.PathLike[str], capture: Capture) -> int:
    """Write ``capture`` whole or not at all; returns the size in bytes. PrismError if it cannot be."""
    return replace_file(path, _file(capture), "the capture")


def write_raw(path: str | os.PathLike[str], capture: Capture) -> int:
    """The tables alone, unpacked and not synced: quick. ``read_capture`` reads it; Perfetto does not."""
    return replace_file(path, _raw(capture), "the capture", sync=False)


def _raw(capture: Capture) -> Iterator[bytes]:
    for block in _blocks(capture):
        yield write_block(block, compress=False)
    for block in operator_blocks.raw_blocks(capture.operator_records):
        yield write_block(block, compress=False)
    yield write_block(Block("end", {}))


def _file(capture: Capture) -> Iterator[bytes]:
    # The clock packet is first, for whoever guesses the kind of a file from its first bytes.
    yield perfetto.clock_packet(capture.meta.get("clock"))
    for block in _blocks(capture):
        yield write_block(block)
    yield from squeezed(
        perfetto.trace_packets(
            capture.window,
            alerts=capture.alerts,
            verdict=capture.verdict,
            expected_ms=capture.expected_ms,
            clock=capture.meta.get("clock"),
            operators=capture.operators,
        )
    )
    yield write_block(Block("end", {}))


def _blocks(capture: Capture) -> Iterator[Block]:
    counts = {
        "steps": len(capture.steps),
        "spans": len(capture.spans),
        "counters": len(capture.counters),
        "requests": len(capture.requests),
        "operators": sum(len(calls.rows) for calls in capture.operators),
        "alerts": len(capture.alerts),
    }
    yield Block("capture", {"format": FORMAT, "meta": capture.meta, "counts": counts})
    yield Block("alerts", {}, json.dumps([alert_to_dict(alert) for alert in capture.alerts]).encode())
    if capture.verdict is not None:
        yield Block("verdict", {}, json.dumps(capture.verdict.to_dict()).encode())
    if capture.expected_ms is not None:
        expected = np.array([np.nan if ms is None else ms for ms in capture.expected_ms], dtype="<f8")
        yield Block("expected", {}, expected.tobytes())
    yield from _table_blocks(capture)
    yield from operator_blocks.operator_blocks(capture.operators)


def _table_blocks(capture: Capture) -> Iterator[Block]:
    """Each slice of words goes before the first rows that point at them."""
    words = tables.Words()
    told = 0
    for kind, records in (
        ("steps", capture.steps),
        ("spans", capture.spans),
        ("counters", capture.counters),
        ("requests", capture.requests),
    ):
        for first in range(0, len(records), _ROWS_PER_BLOCK):
            rows = _pack(kind, records[first : first + _ROWS_PER_BLOCK], words)
            while told < len(words.words):
                yield Block(
                    "words", {"first": told}, tables.words_to_json(words.words[told:][:_WORDS_PER_BLOCK])
                )
                told = min(told + _WORDS_PER_BLOCK, len(words.words))
            columns = [[name, rows.dtype[name].str] for name in rows.dtype.names or ()]
            yield Block(kind, {"first": first, "rows": len(rows), "columns": columns}, rows.tobytes())


def _pack(kind: str, records: list[Any], words: tables.Words) -> tables.Packed:
    if kind == "steps":
        return tables.pack_step_columns(records)
    if kind == "spans":
        return tables.pack_spans(records, words)
    if kind == "requests":
        return tables.pack_requests(records)
    return tables.pack_counters(records, words)


def read_capture(path: str | os.PathLike[str]) -> Capture:
    """Read a capture. What is whole of a damaged one is returned, with ``notices`` that say what is not.

    BadInput if the file cannot be opened, is no capture, or is of a later format than this reads.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise BadInput(f"cannot read the capture {path}", reason, "check the path") from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise BadInput(f"cannot read the capture {path}", "it is not a regular file")
    with open(descriptor, "rb") as file:
        if status.st_size == 0:
            raise BadInput(f"cannot read the capture {path}", "it is empty")
        if status.st_size > _MAX_FILE_BYTES:
            raise BadInput(
                f"cannot read the capture {path}", f"it is larger than {_MAX_FILE_BYTES >> 30} GiB"
            )
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as view:
            contents = read_contents(view, str(path))
    return _assemble(contents)


def _assemble(contents: Contents) -> Capture:
    places = sorted(contents.steps)
    expected: list[float | None] | None = None
    if contents.expected_ms is not None:
        known = contents.expected_ms
        expected = [known[place] if place < len(known) else None for place in places]
    return Capture(
        meta=contents.meta,
        steps=[contents.steps[place] for place in places],
        spans=contents.spans,
        counters=contents.counters,
        requests=contents.requests,
        operators=operator_blocks.joined(contents.operators),
        operator_records=contents.operator_records,
        alerts=contents.alerts,
        verdict=contents.verdict,
        expected_ms=expected,
        notices=contents.notices,
    )
