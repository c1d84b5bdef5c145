"""A capture for other viewers of events: Chrome's trace JSON, speedscope's JSON, folded stacks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import latencyprism
from latencyprism.recorder.capture import Capture
from latencyprism.recorder.drawing import Drawing, draw
from latencyprism.recorder.tracks import Events, Slice, Track

SPEEDSCOPE_SCHEMA = "https://www.speedscope.app/file-format-schema.json"
_MADE_UP = 5_000_000
"""Process and thread numbers from here on are no kernel's: tracks that are none of a process."""


def _drawing(capture: Capture) -> Drawing:
    return draw(
        capture.window, capture.alerts, capture.verdict, capture.expected_ms, capture.meta.get("clock")
    )


def _operator_events(capture: Capture) -> Iterator[tuple[tuple[str, ...], Events]]:
    for calls in capture.operators:
        events: Events = []
        open_ends: list[int] = []
        for start_ns, end_ns, step, name in calls.rows.tolist():
            while open_ends and open_ends[-1] <= start_ns:
                events.append((open_ends.pop(), None))
            inside_ns = min(end_ns, open_ends[-1]) if open_ends else end_ns
            open_ends.append(max(inside_ns, start_ns))
            details = [("step", step)] if step >= 0 else []
            events.append((start_ns, Slice(0, calls.names[name], start_ns, end_ns, details)))
        while open_ends:
            events.append((open_ends.pop(), None))
        yield calls.track, events


# -- Chrome -----------------------------------------------------------------------------------------


def chrome(capture: Capture) -> Iterator[str]:
    """Trace Event Format: microseconds of CLOCK_MONOTONIC, with the nanoseconds behind the point."""
    drawn = _drawing(capture)
    operators = [(drawn.book.track(track), events) for track, events in _operator_events(capture)]
    places = _chrome_places(drawn.book.tracks())
    about = {"clock": capture.meta.get("clock"), "engine": capture.meta.get("engine")}
    yield '{"displayTimeUnit":"ns","otherData":' + _compact(about) + ',"traceEvents":[\n'
    first = True
    for event in _chrome_events(drawn, operators, places):
        yield ("" if first else ",\n") + _compact(event)
        first = False
    yield "\n]}\n"


def _chrome_places(tracks: list[Track]) -> dict[int, tuple[int, int, Track]]:
    """By track its process, thread and root."""
    by_uuid = {track.uuid: track for track in tracks}
    processes: dict[int, int] = {}
    found = {}
    for number, track in enumerate(tracks):
        root = track
        while root.parent is not None:
            root = by_uuid[root.parent]
        pid = processes.setdefault(root.uuid, root.pid or _MADE_UP + len(processes))
        found[track.uuid] = (pid, track.tid or (pid if track is root else _MADE_UP + number), root)
    return found


def _chrome_events(
    drawn: Drawing, operators: list[tuple[int, Events]], places: dict[int, tuple[int, int, Track]]
) -> Iterator[dict[str, Any]]:
    by_uuid = {track.uuid: track for track in drawn.book.tracks()}
    for uuid, (pid, tid, root) in places.items():
        track = by_uuid[uuid]
        if track is root:
            yield {"ph": "M", "name": "process_name", "pid": pid, "tid": pid, "args": {"name": root.name}}
        if track.unit is None:
            yield {"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": track.name}}
    for uuid, events in [*drawn.laid, *operators]:
        pid, tid, _ = places[uuid]
        for time_ns, opened in events:
            at = {"ts": time_ns / 1000, "pid": pid, "tid": tid}
            if opened is None:
                yield {"ph": "E", **at}
            else:
                yield {"ph": "B", "name": opened.name, **at, "args": dict(opened.details)}
                yield from _chrome_flows(opened, at)
    for uuid, time_ns, value in drawn.readings:
        pid, tid, _ = places[uuid]
        track = by_uuid[uuid]
        above = by_uuid.get(track.parent or 0)
        name = f"{above.name} {track.name}" if above is not None and above.parent is not None else track.name
        told = {track.unit or "value": value}
        yield {"ph": "C", "name": name, "ts": time_ns / 1000, "pid": pid, "tid": tid, "args": told}
    for uuid, time_ns, name, details in drawn.marks:
        pid, tid, _ = places[uuid]
        at = {"ts": time_ns / 1000, "pid": pid, "tid": tid}
        yield {"ph": "i", "s": "p", "name": name, **at, "args": dict(details)}


def _chrome_flows(opened: Slice, at: dict[str, Any]) -> Iterator[dict[str, Any]]:
    begins = opened.name.startswith("request ")
    for flow in opened.flows:
        # A step's own flow begins in it; a request's goes through it.
        yield {"ph": "s" if begins else "t", "name": "flow", "cat": "flow", "id": f"{flow:016x}", **at}
    for flow in opened.last_flows:
        yield {"ph": "f", "bp": "e", "name": "flow", "cat": "flow", "id": f"{flow:016x}", **at}


def _compact(value: Any) -> str:
    """JSON as browsers take it: no NaN."""
    try:
        return json.dumps(value, separators=(",", ":"), allow_nan=False, default=str)
    except ValueError:
        return json.dumps(_finite(value), separators=(",", ":"), default=str)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    bad = isinstance(value, float) and (value != value or abs(value) == float("inf"))
    return None if bad else value


# -- stacks -----------------------------------------------------------------------------------------


def _lanes(capture: Capture) -> Iterator[tuple[tuple[str, ...], Events]]:
    """The path of each lane that has slices, and its events."""
    drawn = _drawing(capture)
    by_uuid = {track.uuid: track for track in drawn.book.tracks()}
    for uuid, events in drawn.laid:
        track: Track | None = by_uuid[uuid]
        path: list[str] = []
        while track is not None:
            number = track.tid or track.pid
            path.append(f"{track.name} {number}" if number is not None else track.name)
            track = by_uuid.get(track.parent) if track.parent is not None else None
        yield tuple(reversed(path)), events
    yield from _operator_events(capture)


def speedscope(capture: Capture, name: str) -> Iterator[str]:
    """One evented profile for each lane, in nanoseconds from the first event of the capture on."""
    lanes = [(path, events) for path, events in _lanes(capture) if events]
    begin_ns = min((events[0][0] for _, events in lanes), default=0)
    frames: dict[str, int] = {}
    profiles = []
    for path, events in lanes:
        open_frames: list[int] = []
        told = []
        for time_ns, opened in events:
            if opened is not None:
                open_frames.append(frames.setdefault(opened.name, len(frames)))
            kind, frame = ("O", open_frames[-1]) if opened is not None else ("C", open_frames.pop())
            told.append({"type": kind, "frame": frame, "at": time_ns - begin_ns})
        profiles.append(
            {
                "type": "evented", "name": " / ".join(path), "unit": "nanoseconds",
                "startValue": told[0]["at"], "endValue": told[-1]["at"], "events": told,
            }
        )  # fmt: skip
    yield _compact(
        {
            "$schema": SPEEDSCOPE_SCHEMA,
            "name": name,
            "exporter": f"latencyprism {latencyprism.__version__}",
            "activeProfileIndex": 0,
            "shared": {"frames": [{"name": frame} for frame in frames]},
            "profiles": profiles,
        }
    )
    yield "\n"


def folded(capture: Capture) -> Iterator[str]:
    """Lines ``track;outer;inner NANOSECONDS``: time in a slice and in none inside it, summed up."""
    own: dict[tuple[str, ...], int] = {}
    for path, events in _lanes(capture):
        stack = list(path)
        before_ns = events[0][0] if events else 0
        for time_ns, opened in events:
            if len(stack) > len(path):
                key = tuple(stack)
                own[key] = own.get(key, 0) + time_ns - before_ns
            before_ns = time_ns
            if opened is None:
                stack.pop()
            else:
                stack.append(opened.name)
    for key, spent_ns in sorted(own.items()):
        if spent_ns > 0:
            yield ";".join(_frame(part) for part in key) + f" {spent_ns}\n"


def _frame(name: str) -> str:
    return "".join("_" if c == ";" or not c.isprintable() else c for c in name) or "_"
