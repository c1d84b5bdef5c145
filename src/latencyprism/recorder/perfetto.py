"""Records as a Perfetto trace: protobuf TrackEvent packets, encoded by hand.

Tracks: one process track per replica with ``steps``, ``phases`` and ``alerts`` beneath it and its counters,
and one process track per first part of a span's or counter's track. Timestamps are CLOCK_MONOTONIC; a clock
snapshot ties them to wall time. Field numbers are those of Perfetto's ``trace_packet.proto``,
``track_event.proto``, ``track_descriptor.proto``, ``interned_data.proto`` and ``clock_snapshot.proto``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import datetime, timezone
from typing import Any

from latencyprism.recorder.operator_blocks import drawn
from latencyprism.recorder.tracks import Slice, Track, TrackBook, nest
from latencyprism.recorder.wire import bytes_field, double_field, packet, text_field, uint_field
from latencyprism.records import STEP_COLUMNS, Alert, Step, Verdict, Window
from latencyprism.records.operators import Operators

_REALTIME, _MONOTONIC = 1, 3
_BEGIN, _END, _INSTANT, _COUNTER = 1, 2, 3, 4
_INCREMENTAL_STATE_CLEARED, _NEEDS_INCREMENTAL_STATE = 1, 2

_SEQUENCE = uint_field(10, 1)
_PHASES = ("schedule_ns", "execute_ns", "sample_ns", "update_ns")
_STEP_COUNTERS = ("running", "waiting", "kv_usage", "prefill_tokens", "decode_tokens", "context_tokens")
_SEEN_ELSEWHERE = {"start_ns", "end_ns"}


def clock_packet(clock: object) -> bytes:
    """What says that timestamps are CLOCK_MONOTONIC, and which wall time that was.

    ``clock`` is ``{"monotonic_ns", "realtime_ns"}``, read together; without it the trace has no wall time.
    """
    pair = _clock_pair(clock)
    clocks = [(_MONOTONIC, pair[0] if pair else 0)] + ([(_REALTIME, pair[1])] if pair else [])
    snapshot = b"".join(
        bytes_field(1, uint_field(1, which) + uint_field(2, reading)) for which, reading in clocks
    )
    snapshot += uint_field(2, _MONOTONIC)
    defaults = bytes_field(59, uint_field(58, _MONOTONIC))
    flags = uint_field(13, _INCREMENTAL_STATE_CLEARED)
    return packet(bytes_field(6, snapshot) + _SEQUENCE + flags + defaults + uint_field(87, 1))


def _clock_pair(clock: object) -> tuple[int, int] | None:
    if isinstance(clock, dict):
        monotonic, realtime = clock.get("monotonic_ns"), clock.get("realtime_ns")
        if isinstance(monotonic, int) and isinstance(realtime, int) and min(monotonic, realtime) >= 0:
            return monotonic, realtime
    return None


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

    def slice_begin(
        self, track: int, name: str, time_ns: int, details: Iterable[tuple[str, Any]] = ()
    ) -> bytes:
        return self._named(_BEGIN, track, name, time_ns, details)

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
        self, kind: int, track: int, name: str, time_ns: int, details: Iterable[tuple[str, Any]]
    ) -> bytes:
        definitions: list[bytes] = []
        body = [
            uint_field(9, kind),
            uint_field(11, track),
            uint_field(10, self._events.number(name, definitions)),
        ]
        body += [self._annotation(key, value, definitions) for key, value in details]
        return self._event(b"".join(body), time_ns, definitions)

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
    book, encoder = TrackBook(), _Encoder()
    slices = [*_step_slices(window.steps, expected_ms, book), *_span_slices(window, book)]
    laid = list(nest(slices, book))
    readings = [*_step_readings(window.steps, expected_ms, book), *_counter_readings(window, book)]
    marks = list(_alert_marks(window.steps, alerts, verdict, clock, book))
    lanes = [(calls, book.track(calls.track)) for calls in operators]
    for track in book.tracks():
        yield descriptor_packet(track)
    for uuid, events in laid:
        for time_ns, opened in events:
            if opened is None:
                yield encoder.slice_end(uuid, time_ns)
            else:
                yield encoder.slice_begin(uuid, opened.name, time_ns, opened.details)
    for uuid, time_ns, value in readings:
        yield encoder.counter(uuid, time_ns, value)
    for uuid, time_ns, name, details in marks:
        yield encoder.instant(uuid, name, time_ns, details)
    for number, (calls, uuid) in enumerate(lanes):
        yield from drawn(calls, uuid, number)


def replica_name(engine: str, replica: int, rank: int) -> str:
    """How a replica's track is called, for instance ``vllm replica 0 rank 0``."""
    return f"{engine} replica {replica} rank {rank}"


def _step_slices(
    steps: list[Step], expected_ms: list[float | None] | None, book: TrackBook
) -> Iterator[Slice]:
    for place, step in enumerate(steps):
        owner = replica_name(step.engine, step.replica, step.rank)
        details: list[tuple[str, Any]] = [
            (name, value)
            for name, value in zip(STEP_COLUMNS, step)
            if value is not None and name not in _SEEN_ELSEWHERE
        ]
        expected = expected_ms[place] if expected_ms and place < len(expected_ms) else None
        if expected is not None:
            details.append(("expected_ms", expected))
        name = f"{step.phase} step" if step.phase else "step"
        yield Slice(book.track((owner, "steps"), rank=1), name, step.start_ns, step.end_ns, details)
        # Only lengths are known: they are laid one after the other from the start of the step.
        start_ns = step.start_ns
        for phase in _PHASES:
            length_ns = getattr(step, phase)
            if length_ns is not None and length_ns >= 0:
                end_ns = min(start_ns + length_ns, max(step.end_ns, step.start_ns))
                lane = book.track((owner, "phases"), rank=2)
                yield Slice(lane, phase.removesuffix("_ns"), start_ns, end_ns, [("step", step.step)])
                start_ns = end_ns


def _span_slices(window: Window, book: TrackBook) -> Iterator[Slice]:
    for span in window.spans:
        details: list[tuple[str, Any]] = [] if span.step is None else [("step", span.step)]
        track = book.track(span.track or ("spans",))
        yield Slice(track, span.name, span.start_ns, span.end_ns, [*details, *span.details])


def _step_readings(
    steps: list[Step], expected_ms: list[float | None] | None, book: TrackBook
) -> Iterator[tuple[int, int, float]]:
    last: dict[int, float] = {}
    for place, step in enumerate(steps):
        owner = replica_name(step.engine, step.replica, step.rank)
        lane = book.track((owner, "step time", "counter"), unit="ms", rank=3)
        yield lane, step.end_ns, step.duration_ms
        expected = expected_ms[place] if expected_ms and place < len(expected_ms) else None
        if expected is not None:
            yield (
                book.track((owner, "expected step time", "counter"), unit="ms", rank=4),
                step.end_ns,
                expected,
            )
        for name in _STEP_COUNTERS:
            value = getattr(step, name)
            if value is None:
                continue
            unit = "share" if name == "kv_usage" else "count"
            lane = book.track((owner, name, "counter"), unit=unit, rank=5)
            # A counter track holds its value: the readings that repeat it are left out.
            if last.get(lane) != value:
                last[lane] = value
                yield lane, step.start_ns, value


def _counter_readings(window: Window, book: TrackBook) -> Iterator[tuple[int, int, float]]:
    for counter in window.counters:
        path = (*(counter.track or ("counters",)), counter.name, "counter")
        yield book.track(path, unit=counter.unit), counter.time_ns, counter.value


def _alert_marks(
    steps: list[Step], alerts: Iterable[Alert], verdict: Verdict | None, clock: object, book: TrackBook
) -> Iterator[tuple[int, int, str, list[tuple[str, Any]]]]:
    by_step = {(step.engine, step.replica, step.rank, step.step): step for step in steps}
    for alert in alerts:
        owner = replica_name(alert.engine, alert.replica, alert.rank)
        lane = book.track((owner, "alerts"), rank=0)
        key = (alert.engine, alert.replica, alert.rank)
        details: list[tuple[str, Any]] = [
            (name, getattr(alert, name))
            for name in ("id", "level", "step", "onset_step", "observed_ms", "expected_ms", "excess", "time")
        ]
        details += [(f"expected {term} ms", ms) for term, ms in (alert.terms or {}).items()]
        details += [("where", alert.where)] if alert.where else []
        details += [("verdict", f"{verdict.cause} ({verdict.probability:.0%})")] if verdict else []
        onset = by_step.get((*key, alert.onset_step))
        if onset is not None:
            yield lane, onset.start_ns, "onset", [("id", alert.id)]
        yield (
            lane,
            alert_time_ns(alert, by_step.get((*key, alert.step)), clock, steps),
            f"{alert.kind} alert",
            details,
        )


def alert_time_ns(alert: Alert, step: Step | None, clock: object, steps: list[Step]) -> int:
    """When the alert was raised (CLOCK_MONOTONIC): from its step, else from its wall time, else the last
    step's end."""
    if step is not None:
        delay_ms = alert.delay_ms or 0.0
        return step.end_ns + int(delay_ms * 1e6 if 0 <= delay_ms < 1e9 else 0)
    pair = _clock_pair(clock)
    if pair is not None:
        try:
            told = datetime.fromisoformat(alert.time.replace("Z", "+00:00"))
            since_epoch = told.replace(tzinfo=told.tzinfo or timezone.utc).timestamp()
            return int(since_epoch * 1e9) - pair[1] + pair[0]
        except (ValueError, OverflowError):
            pass  # the time is not one: the last resort below
    return steps[-1].end_ns if steps else 0
