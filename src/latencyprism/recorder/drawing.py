"""What of a window is drawn, and where: slices, readings, marks; for every format that has tracks.

Tracks: one process track per replica with ``steps``, ``phases`` and ``alerts`` beneath it and its counters,
``requests`` of a replica on lanes beside each other, and one process track per first part of a span's or
counter's track. Flows go from a request to the first step that carried it, to the one that made its first
token and to its last; from a step to the calls that a worker made for it; from a call that launched work on
a device to the first of it there; and between the ranks' parts in one collective operation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from latencyprism.recorder.flows import Flows, request_flow
from latencyprism.recorder.tracks import Events, Slice, TrackBook, nest
from latencyprism.records import REQUEST_COLUMNS, STEP_COLUMNS, Alert, Request, Step, Verdict, Window

_PHASES = ("schedule_ns", "execute_ns", "sample_ns", "update_ns")
_STEP_COUNTERS = ("running", "waiting", "kv_usage", "prefill_tokens", "decode_tokens", "context_tokens")
_SEEN_ELSEWHERE = {"start_ns", "end_ns"}
_U64 = (1 << 64) - 1


@dataclass(slots=True)
class Drawing:
    """``laid``: by track the events in order; ``readings``: track, time, value; ``marks``: track, time, name,
    details. Times are CLOCK_MONOTONIC ns."""

    book: TrackBook
    laid: list[tuple[int, Events]]
    readings: list[tuple[int, int, float]]
    marks: list[tuple[int, int, str, list[tuple[str, Any]]]]


def draw(
    window: Window, alerts: Iterable[Alert] = (), verdict: Verdict | None = None,
    expected_ms: list[float | None] | None = None, clock: object = None,
) -> Drawing:  # fmt: skip
    """``expected_ms`` is aligned with the steps; ``clock`` as in ``meta`` of a capture."""
    book, flows = TrackBook(), Flows(window)
    slices = [
        *_step_slices(window.steps, expected_ms, book, flows),
        *_request_slices(window, book),
        *_span_slices(window, book, flows),
    ]
    return Drawing(
        book,
        list(nest(slices, book)),
        [*_step_readings(window.steps, expected_ms, book), *_counter_readings(window, book)],
        list(_alert_marks(window.steps, alerts, verdict, clock, book)),
    )


def clock_pair(clock: object) -> tuple[int, int] | None:
    if isinstance(clock, dict):
        monotonic, realtime = clock.get("monotonic_ns"), clock.get("realtime_ns")
        if isinstance(monotonic, int) and isinstance(realtime, int) and min(monotonic, realtime) >= 0:
            return monotonic, realtime
    return None


def replica_name(engine: str, replica: int, rank: int) -> str:
    """How a replica's track is called, for instance ``vllm replica 0 rank 0``."""
    return f"{engine} replica {replica} rank {rank}"


def _step_slices(
    steps: list[Step], expected_ms: list[float | None] | None, book: TrackBook, flows: Flows
) -> Iterator[Slice]:
    yield from _gaps(steps, book)
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
        lane = book.track((owner, "steps"), rank=1)
        yield Slice(lane, name, step.start_ns, step.end_ns, details, *flows.of_step(step))
        # Only lengths are known: they are laid one after the other from the start of the step.
        start_ns = step.start_ns
        for phase in _PHASES:
            length_ns = getattr(step, phase)
            if length_ns is not None and length_ns >= 0:
                end_ns = min(start_ns + length_ns, max(step.end_ns, step.start_ns))
                lane = book.track((owner, "phases"), rank=2)
                yield Slice(lane, phase.removesuffix("_ns"), start_ns, end_ns, [("step", step.step)])
                start_ns = end_ns


def _gaps(steps: list[Step], book: TrackBook) -> Iterator[Slice]:
    """Steps whose numbers are missing between two others."""
    for owner, before, after in step_gaps(steps):
        count = after.step - before.step - 1
        name = f"{count} step{'' if count == 1 else 's'} not recorded"
        yield Slice(book.track((owner, "steps"), rank=1), name, before.end_ns, after.start_ns)


def step_gaps(steps: list[Step]) -> Iterator[tuple[str, Step, Step]]:
    """Whose, the step before and the step after each hole in their numbers."""
    last: dict[str, Step] = {}
    for step in sorted(steps, key=lambda step: step.step):
        owner = replica_name(step.engine, step.replica, step.rank)
        before = last.get(owner)
        if before is not None and step.step > before.step + 1 and step.start_ns >= before.end_ns:
            yield owner, before, step
        last[owner] = step


def _span_slices(window: Window, book: TrackBook, flows: Flows) -> Iterator[Slice]:
    for place, span in enumerate(window.spans):
        details: list[tuple[str, Any]] = [] if span.step is None else [("step", span.step)]
        track = book.track(span.track or ("spans",))
        yield Slice(
            track, span.name, span.start_ns, span.end_ns, [*details, *span.details],
            *flows.of_span(place, span),
        )  # fmt: skip


def _request_slices(window: Window, book: TrackBook) -> Iterator[Slice]:
    """Each with its phases; requests that overlap lie on lanes beside each other."""
    free_ns: dict[str, list[int]] = {}
    for request in sorted(window.requests, key=lambda r: r.arrival_ns or 0):
        end_ns = request_end_ns(request)
        if request.arrival_ns is None or end_ns is None:
            continue
        owner = f"{request.engine} replica {request.replica}"
        lanes = free_ns.setdefault(owner, [])
        lane = next((n for n, until_ns in enumerate(lanes) if until_ns <= request.arrival_ns), len(lanes))
        lanes[lane : lane + 1] = [end_ns]
        uuid = book.track((owner, "requests"), lane=lane)
        details: list[tuple[str, Any]] = [
            (name, hashed(value) if name in ("request", "client_request") else value)
            for name, value in zip(REQUEST_COLUMNS, request)
            if value is not None and name != "arrival_ns"
        ]
        name = f"request {hashed(request.request)}"
        flow = (request_flow(request),)
        yield Slice(uuid, name, request.arrival_ns, end_ns, details, flow)
        start_ns = request.arrival_ns
        for phase, length_ns in phases_of(request, end_ns):
            until_ns = min(start_ns + length_ns, end_ns)
            yield Slice(uuid, phase, start_ns, until_ns)
            start_ns = until_ns


def hashed(request: Any) -> str:
    """A request's hash as people see it everywhere: 16 hexadecimal digits."""
    return f"{int(request) & _U64:016x}"


def phases_of(request: Request, end_ns: int) -> Iterator[tuple[str, int]]:
    """Its phases one after the other, with their lengths in ns, as far as they are known."""
    if request.arrival_ns is None or request.queue_ns is None or request.queue_ns < 0:
        return
    yield "queue", request.queue_ns
    if request.prefill_ns is not None and request.prefill_ns >= 0:
        yield "prefill", request.prefill_ns
        left_ns = end_ns - request.arrival_ns - request.queue_ns - request.prefill_ns
        if left_ns > 0:
            yield "decode and output", left_ns


def request_end_ns(request: Request) -> int | None:
    """The last that is known of it (CLOCK_MONOTONIC); None: nothing is."""
    lengths = [request.e2e_ns, request.ttft_ns, request.queue_ns]
    known = next((length for length in lengths if length is not None and length >= 0), None)
    return None if known is None or request.arrival_ns is None else request.arrival_ns + known


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
    pair = clock_pair(clock)
    if pair is not None:
        try:
            told = datetime.fromisoformat(alert.time.replace("Z", "+00:00"))
            since_epoch = told.replace(tzinfo=told.tzinfo or timezone.utc).timestamp()
            return int(since_epoch * 1e9) - pair[1] + pair[0]
        except (ValueError, OverflowError):
            pass  # the time is not one: the last resort below
    return steps[-1].end_ns if steps else 0
