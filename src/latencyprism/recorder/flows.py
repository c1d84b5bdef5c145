"""Flows: which slices belong to one request, one step or one collective operation, as numbers that a trace
draws arrows by."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterable

from latencyprism.recorder.launch_flows import launches
from latencyprism.records import Request, Span, Step, Window
from latencyprism.records.device_spans import from_a_window
from latencyprism.timeline.collective_feed import LANE as COLLECTIVES

WORKER_CALLS = ("execute_model", "sample_tokens", "ubatch")
"""Spans that a worker is in for the step in whose time they begin."""


class Flows:
    """``of_step`` and, by its place, ``of_span``: (flows that go through it or begin there, flows that end in
    it)."""

    def __init__(self, window: Window) -> None:
        self._through: dict[tuple[str, int, int], list[int]] = {}
        self._last: dict[tuple[str, int, int], list[int]] = {}
        self._spans: dict[int, int] = {}
        self._begun: dict[int, int] = {}
        held = {(step.engine, step.replica, step.step) for step in window.steps}
        for request in window.requests:
            self._follow(request, held)
        self._launches(window)
        for call, row, pair in launches(window.spans):
            self._begun[call] = self._spans[row] = _number(*pair)

    def _follow(self, request: Request, held: set[tuple[str, int, int]]) -> None:
        if request.arrival_ns is None:
            return
        numbers = dict.fromkeys((request.first_step, request.first_token_step, request.last_step))
        places = [(request.engine, request.replica, number) for number in numbers if number is not None]
        places = [place for place in places if place in held]
        for place in places[:-1]:
            self._through.setdefault(place, []).append(request_flow(request))
        for place in places[-1:]:
            self._last.setdefault(place, []).append(request_flow(request))

    def _launches(self, window: Window) -> None:
        """To the first call of each kind on each track."""
        steps = sorted(window.steps, key=lambda step: step.start_ns)
        starts = [step.start_ns for step in steps]
        seen = set()
        for place, span in enumerate(window.spans):
            if not span.name.startswith(WORKER_CALLS) or from_a_window(span):
                continue
            at = bisect_right(starts, span.start_ns) - 1
            step = steps[at] if at >= 0 and span.start_ns < steps[at].end_ns else None
            if step is not None and (span.track, span.name, step.step) not in seen:
                seen.add((span.track, span.name, step.step))
                flow = _number("step", step.engine, step.replica, step.step, span.track, span.name)
                self._through.setdefault((step.engine, step.replica, step.step), []).append(flow)
                self._spans[place] = flow

    def of_step(self, step: Step) -> tuple[Iterable[int], Iterable[int]]:
        if step.rank != 0:
            return (), ()
        place = (step.engine, step.replica, step.step)
        return tuple(self._through.get(place, ())), tuple(self._last.get(place, ()))

    def of_span(self, place: int, span: Span) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if len(span.track) == 2 and span.track[1] == COLLECTIVES:
            told = dict(span.details)
            operation = told.get("operation")
            through = () if operation is None else (_number("met", told.get("communicator"), operation),)
            return through, ()
        begun, ended = self._begun.get(place), self._spans.get(place)
        return () if begun is None else (begun,), () if ended is None else (ended,)


def request_flow(request: Request) -> int:
    """The flow of a request through its steps."""
    return _number("request", request.engine, request.replica, request.request)


def _number(*parts: object) -> int:
    text = repr(parts).encode("utf-8", "backslashreplace")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") or 1
