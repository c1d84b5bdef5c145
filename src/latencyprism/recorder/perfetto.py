"""Records as a Perfetto trace: protobuf TrackEvent packets, encoded by hand.

What is drawn: ``recorder.drawing``. Timestamps are CLOCK_MONOTONIC; a clock
snapshot ties them to wall time. Field numbers are those of Perfetto's ``trace_packet.proto``,
``track_event.proto``, ``track_descriptor.proto``, ``interned_data.proto`` and ``clock_snapshot.proto``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from latencyprism.recorder.drawing import clock_pair, draw
from latencyprism.recorder.operator_blocks import drawn
from latencyprism.recorder.tracks import Slice, Track
from latencyprism.recorder.wire import (
    bytes_field,
    double_field,
    fixed64_field,
    packet,
    text_field,
    uint_field,
)
from latencyprism.records import Alert, Verdict, Window
from latencyprism.records.operators import Operators

_REALTIME, _MONOTONIC = 1, 3
_BEGIN, _END, _INSTANT, _COUNTER = 1, 2, 3, 4
_INCREMENTAL_STATE_CLEARED, _NEEDS_INCREMENTAL_STATE = 1, 2

_SEQUENCE = uint_field(10, 1)


def clock_packet(clock: object) -> bytes:
    """What says that timestamps are CLOCK_MONOTONIC, and which wall time that was.

    ``clock`` is ``{"monotonic_ns", "realtime_ns"}``, read together; without it the trace has no wall time.
    """
    pair = clock_pair(clock)
    clocks = [(_MONOTONIC, pair[0] if pair else 0)] + ([(_REALTIME, pair[1])] if pair else [])
    snapshot = b"".join(
        bytes_field(1, uint_field(1, which) + uint_field(2, reading)) for which, reading in clocks
    )
    snapshot += uint_field(2, _MONOTONIC)
    defaults = bytes_field(59, uint_field(58, _MONOTONIC))
    flags = uint_field(13, _INCREMENTAL_STATE_CLEARED)
    return packet(bytes_field(6, snapshot) + _SEQUENCE + flags + defaults + uint_field(87, 1))


class _Interned:
    """Names said once: the first packet that uses a name also defines its number."""

    def __init__(self, field: int) -> None:
        self._field = field
        self._numbers: dict[str, int] = {}

    def number(self, name: str, definitions: list[bytes]) -> int:
        number = self._numbers.get(name)
        if number is None:
            number = self._numbers[name] = len(self._numbers) + 1
            definitions.append(bytes_field(self._field, uint_field(1, number) + text_field(2, name)))
        return number


class _Encoder:
    """Turns events into packets of one sequence."""

    def __init__(self) -> None:
        self._events = _Interned(2)
        self._details = _Interned(3)

    def slice_begin(self, track: int, opened: Slice, time_ns: int) -> bytes:
        flows = b"".join(fixed64_field(47, flow) for flow in opened.flows)
        flows += b"".join(fixed64_field(48, flow) for flow in opened.last_flows)
        return self._named(_BEGIN, track, opened.name, time_ns, opened.details, flows)

    def instant(self, track: int, name: str, time_ns: int, details: Iterable[tuple[str, Any]]) -> bytes:
        return self._named(_INSTANT, track, name, time_ns, details)

    def slice_end(self, track: int, time_ns: int) -> bytes:
        return self._event(uint_field(9, _END) + uint_field(11, track), time_ns, [])

    def counter(self, track: int, time_ns: int, value: float) -> bytes:
        # An integer stays one, so that large counts are shown exactly.
        whole = isinstance(value, int) and -(2**63) <= value < 2**63
        told = uint_field(30, int(value)) if whole else double_field(44, value)
        return self._event(uint_field(9, _COUNTER) + uint_field(11, track) + told, time_ns, [])

    def _named(
        self, kind: int, track: int, name: str, time_ns: int, details: Iterable[tuple[str, Any]],
        flows: bytes = b"",
    ) -> bytes:  # fmt: skip
        definitions: list[bytes] = []
        body = [
            uint_field(9, kind),
            uint_field(11, track),
            uint_field(10, self._events.number(name, definitions)),
        ]
        body += [self._annotation(key, value, definitions) for key, value in details]
        return self._event(b"".join(body) + flows, time_ns, definitions)

    def _annotation(self, key: str, value: Any, definitions: list[bytes]) -> bytes:
        named = uint_field(1, self._details.number(key, definitions))
        if isinstance(value, bool):
            return bytes_field(4, named + uint_field(2, int(value)))
        if isinstance(value, int) and -(2**63) <= value < 2**63:
            return bytes_field(4, named + uint_field(4, value))
        if isinstance(value, float):
            return bytes_field(4, named + double_field(5, value))
        return bytes_field(4, named + text_field(6, str(value)))

    def _event(self, event: bytes, time_ns: int, definitions: list[bytes]) -> bytes:
        body = uint_field(8, max(0, time_ns)) + bytes_field(11, event) + _SEQUENCE
        if definitions:
            body += bytes_field(12, b"".join(definitions))
        return packet(body + uint_field(13, _NEEDS_INCREMENTAL_STATE))


def descriptor_packet(track: Track) -> bytes:
    """The packet that names ``track`` and hangs it under its parent."""
    body = uint_field(1, track.uuid)
    if track.pid is not None and track.tid is not None:
        thread = uint_field(1, track.pid) + uint_field(2, track.tid) + text_field(5, track.name)
        body += bytes_field(4, thread)
    elif track.pid is not None:
        body += bytes_field(3, uint_field(1, track.pid) + text_field(6, track.name))
    else:
        body += text_field(2, track.name)
    if track.parent is not None:
        body += uint_field(5, track.parent)
    else:
        body += uint_field(11, 3)
    if track.rank is not None:
        body += uint_field(12, track.rank)
    if track.unit is not None:
        known = {"ns": 1, "count": 2, "bytes": 3}.get(track.unit)
        body += bytes_field(8, uint_field(3, known) if known else text_field(6, track.unit))
    return packet(bytes_field(60, body) + _SEQUENCE)


def trace_packets(
    window: Window,
    alerts: Iterable[Alert] = (),
    verdict: Verdict | None = None,
    expected_ms: list[float | None] | None = None,
    clock: object = None,
    operators: Iterable[Operators] = (),
) -> Iterator[bytes]:
    """The packets that draw ``window``, after ``clock_packet``. ``expected_ms`` is aligned with its steps."""
    drawn_here, encoder = draw(window, alerts, verdict, expected_ms, clock), _Encoder()
    book = drawn_here.book
    lanes = [(calls, book.track(calls.track)) for calls in operators]
    for track in book.tracks():
        yield descriptor_packet(track)
    for uuid, events in drawn_here.laid:
        for time_ns, opened in events:
            if opened is None:
                yield encoder.slice_end(uuid, time_ns)
            else:
                yield encoder.slice_begin(uuid, opened, time_ns)
    for uuid, time_ns, value in drawn_here.readings:
        yield encoder.counter(uuid, time_ns, value)
    for uuid, time_ns, name, details in drawn_here.marks:
        yield encoder.instant(uuid, name, time_ns, details)
    for number, (calls, uuid) in enumerate(lanes):
        yield from drawn(calls, uuid, number)
