"""Operators in a capture: our own table, packed small, and the packets that draw them.

Hundreds of thousands of calls must fit beside a minute of records. The table is columns of differences, each
laid out byte by byte (all lowest bytes, then the next ones), which deflates to some four bytes a call. In the
drawing a thread has a packet sequence of its own, on which it says its track, its clock and each name once,
then only time since the event before, and which name.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from latencyprism.agent.operator_ring import OperatorRecords
from latencyprism.recorder.blocks import Block
from latencyprism.recorder.wire import TRACE_PACKET, bytes_field, packet, text_field, uint_field, varint
from latencyprism.records import NULL
from latencyprism.records.operators import OPERATOR_DTYPE, Operators

KIND, RAW_KIND = "operators", "operator_records"
_ROWS_PER_BLOCK = 500_000
_RAW_ROWS_PER_BLOCK = 20_000
"""A watcher at real-time priority writes them: a millisecond each."""
_COLUMNS = (("start_delta_ns", "<i8"), ("length_ns", "<i8"), ("step_delta", "<i8"), ("name", "<u4"))
_FIRST_SEQUENCE = 1000
_MONOTONIC, _INCREMENTAL = 3, 64
_BEGIN, _END = 1, 2
_CLEARED, _NEEDED = 1, 2


def operator_blocks(found: list[Operators]) -> Iterator[Block]:
    """The calls as blocks that ``read_operators`` takes."""
    for calls in found:
        for first in range(0, max(len(calls.rows), 1), _ROWS_PER_BLOCK):
            rows = calls.rows[first : first + _ROWS_PER_BLOCK]
            header = {
                "track": list(calls.track), "names": calls.names, "every": calls.every, "rows": len(rows),
                "columns": [list(column) for column in _COLUMNS],
            }  # fmt: skip
            yield Block(KIND, header, b"".join(_packed(rows)))


def _packed(rows: npt.NDArray[np.void]) -> Iterator[bytes]:
    step = np.where(rows["step"] == NULL, -1, rows["step"])
    columns = (
        np.diff(rows["start_ns"], prepend=0), rows["end_ns"] - rows["start_ns"],
        np.diff(step, prepend=0), rows["name"],
    )  # fmt: skip
    for (_, kind), column in zip(_COLUMNS, columns):
        plain = np.ascontiguousarray(column, dtype=kind)
        yield plain.view(np.uint8).reshape(-1, plain.itemsize).T.tobytes()


def read_operators(block: Block) -> Operators:
    """The inverse. ValueError, TypeError or KeyError if the block is not what it says."""
    header = block.header
    track, names, every, count = (header[name] for name in ("track", "names", "every", "rows"))
    told = [(str(name), str(kind)) for name, kind in header["columns"]]
    if told != list(_COLUMNS):
        raise ValueError("its columns are not those known here")
    if not all(isinstance(word, str) for word in [*track, *names]) or not isinstance(count, int):
        raise ValueError("its head is not that of operators")
    sizes = [np.dtype(kind).itemsize * count for _, kind in _COLUMNS]
    if count < 0 or sum(sizes) != len(block.data) or not isinstance(every, int) or every < 1:
        raise ValueError("it holds another number of rows than it says")
    data = np.frombuffer(block.data, dtype=np.uint8)
    columns, at = [], 0
    for size, (_, kind) in zip(sizes, _COLUMNS):
        planes = data[at : at + size].reshape(np.dtype(kind).itemsize, count)
        columns.append(np.ascontiguousarray(planes.T).reshape(-1).view(kind))
        at += size
    rows = np.empty(count, OPERATOR_DTYPE)
    rows["start_ns"] = np.cumsum(columns[0])
    rows["end_ns"] = rows["start_ns"] + columns[1]
    step = np.cumsum(columns[2])
    rows["step"] = np.where(step == -1, NULL, step)
    rows["name"] = columns[3]
    if count and int(rows["name"].max()) >= len(names):
        raise ValueError("a row names an operator that is not there")
    return Operators(tuple(track), list(names), rows, every)


def joined(found: list[Operators]) -> list[Operators]:
    """Blocks of one thread as one again."""
    whole: dict[tuple[str, ...], Operators] = {}
    for calls in found:
        before = whole.get(calls.track)
        if before is None or before.names != calls.names:
            whole[calls.track] = calls
        else:
            before.rows = np.concatenate((before.rows, calls.rows))
    return list(whole.values())


# -- raw records, on their way to the writing process ------------------------------------------------


def raw_blocks(found: list[tuple[str, OperatorRecords]]) -> Iterator[Block]:
    """Records as they were copied, by the name of their process, in small pieces; ``read_raw`` takes them."""
    for process, seen in found:
        header: dict[str, Any] = {
            "process": process, "pid": seen.pid, "names": list(seen.names.items()),
            "threads": list(seen.threads.items()), "readings": seen.readings,
        }  # fmt: skip
        for chunk in seen.chunks:
            for first in range(0, len(chunk), _RAW_ROWS_PER_BLOCK):
                yield Block(RAW_KIND, header, chunk[first : first + _RAW_ROWS_PER_BLOCK].tobytes())
                header = {"process": process, "pid": seen.pid, "names": [], "threads": [], "readings": []}


def read_raw(block: Block) -> tuple[str, OperatorRecords]:
    """ValueError, TypeError or KeyError if the block is not what it says."""
    header = block.header
    rows = np.frombuffer(block.data, dtype="<i8").reshape(-1, 4)
    return str(header["process"]), OperatorRecords(
        pid=int(header["pid"]),
        chunks=[rows],
        names={int(schema): str(name) for schema, name in header["names"]},
        threads={int(pointer): int(thread) for pointer, thread in header["threads"]},
        readings=[(int(ticks), int(time_ns)) for ticks, time_ns in header["readings"]],
    )


# -- drawing -------------------------------------------------------------------------------------------


def drawn(calls: Operators, track: int, number: int) -> Iterator[bytes]:
    """Packets for the calls of one thread on track ``track``; ``number``: of this thread in the file."""
    if not len(calls.rows):
        return
    sequence = uint_field(10, _FIRST_SEQUENCE + number)
    begun_ns = int(calls.rows["start_ns"][0])
    yield _opening(calls, track, sequence, begun_ns)
    yield from _events(calls, sequence, begun_ns)


def _opening(calls: Operators, track: int, sequence: bytes, begun_ns: int) -> bytes:
    """What holds for all events: clock of the differences, track, names."""
    clocks = bytes_field(1, uint_field(1, _MONOTONIC) + uint_field(2, begun_ns))
    clocks += bytes_field(1, uint_field(1, _INCREMENTAL) + uint_field(2, 0) + uint_field(3, 1))
    defaults = uint_field(58, _INCREMENTAL) + bytes_field(11, uint_field(11, track))
    names = b"".join(
        bytes_field(2, uint_field(1, place + 1) + text_field(2, name))
        for place, name in enumerate(calls.names)
    )
    first = packet(
        bytes_field(6, clocks) + sequence + uint_field(13, _CLEARED) + bytes_field(59, defaults)
        + uint_field(87, 1)
    )  # fmt: skip
    return first + packet(sequence + uint_field(13, _NEEDED) + bytes_field(12, names))


def _events(calls: Operators, sequence: bytes, begun_ns: int) -> list[bytes]:
    """Begins and ends in order of time. Calls nest, so that a stack of ends is all it takes."""
    flags = sequence + uint_field(13, _NEEDED)
    begins = [
        bytes_field(11, uint_field(9, _BEGIN) + uint_field(10, place + 1)) + flags
        for place in range(len(calls.names))
    ]
    end = bytes_field(11, uint_field(9, _END)) + flags
    tag, time_tag = varint(TRACE_PACKET << 3 | 2), varint(8 << 3)
    small = [time_tag + varint(ns) for ns in range(1 << 14)]
    last_ns = begun_ns
    out: list[bytes] = []
    open_ends: list[int] = []

    def add(at_ns: int, rest: bytes) -> None:
        nonlocal last_ns
        since = max(at_ns - last_ns, 0)
        last_ns += since
        body = (small[since] if since < 1 << 14 else time_tag + varint(since)) + rest
        out.append(tag + bytes((len(body),)) + body)  # always shorter than 128 bytes

    for start_ns, end_ns, _, name in calls.rows.tolist():
        while open_ends and open_ends[-1] <= start_ns:
            add(open_ends.pop(), end)
        add(start_ns, begins[name])
        # The clock's steps can put an end a nanosecond past the outer one's.
        open_ends.append(min(end_ns, open_ends[-1]) if open_ends else end_ns)
    while open_ends:
        add(open_ends.pop(), end)
    return out
