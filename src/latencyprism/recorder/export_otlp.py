"""A capture as OpenTelemetry spans, in OTLP's JSON: a trace for each request, and one of all steps."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any

import latencyprism
from latencyprism.errors import BadInput
from latencyprism.recorder.capture import Capture
from latencyprism.recorder.drawing import clock_pair, hashed, phases_of, request_end_ns
from latencyprism.records import REQUEST_COLUMNS, STEP_COLUMNS, Request, Step

_INTERNAL, _SERVER = 1, 2
_GEN_AI = {
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "output_tokens": "gen_ai.usage.output_tokens",
    "cached_tokens": "gen_ai.usage.cache_read.input_tokens",
}


def otlp(capture: Capture, name: str) -> Iterator[str]:
    """One ``ExportTraceServiceRequest``. BadInput for a capture that does not know the wall time."""
    pair = clock_pair(capture.meta.get("clock"))
    if pair is None:
        raise BadInput(f"cannot write {name} as OTLP", "it does not say which wall time its clock was")
    ahead_ns = pair[1] - pair[0]
    engine = str(capture.meta.get("engine") or "unknown")
    resource = [("service.name", engine), ("host.name", str(capture.meta.get("host") or ""))]
    begin = {
        "resource": {"attributes": _attributes(resource)},
        "scopeSpans": [{"scope": {"name": "latencyprism", "version": latencyprism.__version__}, "spans": []}],
    }
    head, _, tail = json.dumps({"resourceSpans": [begin]}, separators=(",", ":")).partition('"spans":[')
    yield head + '"spans":[\n'
    first = True
    for span in _spans(capture, name, ahead_ns):
        yield ("" if first else ",\n") + json.dumps(span, separators=(",", ":"), allow_nan=False)
        first = False
    yield "\n" + tail + "\n"


def _spans(capture: Capture, name: str, ahead_ns: int) -> Iterator[dict[str, Any]]:
    trace = _identity(16, "steps", name, capture.meta.get("host"), capture.steps[:1])
    places = {(s.engine, s.replica, s.step): _step_identity(trace, s) for s in capture.steps if s.rank == 0}
    raised: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    ends = {(s.engine, s.replica, s.step): s.end_ns for s in capture.steps}
    for alert in capture.alerts:
        key = (alert.engine, alert.replica, alert.step)
        told = [("id", alert.id), ("level", alert.level), ("observed_ms", alert.observed_ms),
                ("expected_ms", alert.expected_ms), ("where", alert.where)]  # fmt: skip
        if capture.verdict is not None:
            told += [("cause", capture.verdict.cause), ("probability", capture.verdict.probability)]
        event = {"timeUnixNano": str(ends.get(key, 0) + ahead_ns), "name": f"{alert.kind} alert"}
        raised.setdefault(key, []).append({**event, "attributes": _attributes(told, "latencyprism.")})
    for step in capture.steps:
        columns = [
            (column, value)
            for column, value in zip(STEP_COLUMNS, step)
            if column not in ("start_ns", "end_ns")
        ]
        kind = f"{step.phase} step" if step.phase else "step"
        span = _span(trace, _step_identity(trace, step), kind, step.start_ns, step.end_ns, ahead_ns)
        span["attributes"] = _attributes(columns, "latencyprism.")
        span["events"] = raised.get((step.engine, step.replica, step.step), []) if step.rank == 0 else []
        yield span
    for request in capture.requests:
        yield from _request(request, trace, places, ahead_ns)


def _request(
    request: Request, step_trace: str, places: dict[tuple[str, int, int], str], ahead_ns: int
) -> Iterator[dict[str, Any]]:
    end_ns = request_end_ns(request)
    if request.arrival_ns is None or end_ns is None:
        return
    trace = _identity(16, "request", request.engine, request.replica, request.request, request.arrival_ns)
    root = _identity(8, trace)
    told: list[tuple[str, Any]] = []
    for column, value in zip(REQUEST_COLUMNS, request):
        if column in ("request", "client_request"):
            value = None if value is None else hashed(value)
        if column != "arrival_ns":
            told.append((_GEN_AI.get(column, f"latencyprism.{column}"), value))
    if request.finish_reason is not None:
        told.append(("gen_ai.response.finish_reasons", request.finish_reason))
    span = _span(trace, root, "request", request.arrival_ns, end_ns, ahead_ns, kind=_SERVER)
    numbers = dict.fromkeys((request.first_step, request.first_token_step, request.last_step))
    carried = [places.get((request.engine, request.replica, n)) for n in numbers if n is not None]
    span["attributes"] = _attributes(told)
    span["links"] = [{"traceId": step_trace, "spanId": place} for place in carried if place is not None]
    yield span
    start_ns = request.arrival_ns
    for phase, length_ns in phases_of(request, end_ns):
        until_ns = min(start_ns + length_ns, end_ns)
        part = _span(trace, _identity(8, trace, phase), phase, start_ns, until_ns, ahead_ns)
        part["parentSpanId"] = root
        yield part
        start_ns = until_ns


def _span(
    trace: str, identity: str, name: str, start_ns: int, end_ns: int, ahead_ns: int, kind: int = _INTERNAL
) -> dict[str, Any]:
    return {
        "traceId": trace, "spanId": identity, "name": name, "kind": kind,
        "startTimeUnixNano": str(max(0, start_ns + ahead_ns)),
        "endTimeUnixNano": str(max(0, start_ns + ahead_ns, end_ns + ahead_ns)),
    }  # fmt: skip


def _step_identity(trace: str, step: Step) -> str:
    return _identity(8, trace, step.engine, step.replica, step.rank, step.step)


def _identity(size: int, *parts: object) -> str:
    text = repr(parts).encode("utf-8", "backslashreplace")
    return hashlib.blake2b(text, digest_size=size).hexdigest()


def _attributes(told: Iterable[tuple[str, Any]], prefix: str = "") -> list[dict[str, Any]]:
    """What was not observed is left out."""
    return [
        {"key": prefix + name, "value": _value(value)}
        for name, value in told
        if value is not None
        and not (isinstance(value, float) and (value != value or abs(value) == float("inf")))
    ]


def _value(value: Any) -> dict[str, Any]:
    if isinstance(value, bool):
        return {"boolValue": value}
    if isinstance(value, int):
        return {"intValue": str(value)}
    if isinstance(value, float):
        return {"doubleValue": value}
    return {"stringValue": str(value)}
