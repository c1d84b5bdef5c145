"""The flight recorder: the last minute of records, in memory, cheap enough to be always on."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from latencyprism.recorder.tape import Tape
from latencyprism.records import Counter, Request, Span, Step, Window

STEP_COST_BYTES, SPAN_COST_BYTES, COUNTER_COST_BYTES, REQUEST_COST_BYTES = 1300, 450, 200, 1000
"""What one record keeps alive in CPython on 64 bit, rounded up: the tuple and the integers in it."""

_SHARES = (0.3, 0.42, 0.22, 0.06)


class FlightRecorder:
    """Keeps what was seen in the last ``horizon_s`` seconds, within about ``max_bytes`` of memory.

    Each kind of record has its own share of the memory, so a flood of spans never pushes the steps out.
    Time is that of the records (CLOCK_MONOTONIC ns), so a replay behaves like the live thing. Each
    ``add_*`` costs well under 2 us. One thread adds; ``window`` may be called from another. ``tape``, where
    one is set, gets the same records, for the case that this process is killed.
    """

    def __init__(self, horizon_s: float = 60.0, max_bytes: int = 64 << 20) -> None:
        if not horizon_s > 0 or max_bytes <= 0:
            raise ValueError("horizon_s and max_bytes must be positive")
        self.horizon_ns = int(horizon_s * 1e9)
        self.tape: Tape | None = None
        steps, spans, counters, requests = (int(max_bytes * share) for share in _SHARES)
        self._steps: deque[Step] = deque(maxlen=max(1, steps // STEP_COST_BYTES))
        self._spans: deque[Span] = deque(maxlen=max(1, spans // SPAN_COST_BYTES))
        self._counters: deque[Counter] = deque(maxlen=max(1, counters // COUNTER_COST_BYTES))
        self._requests: deque[tuple[int, Request]] = deque(maxlen=max(1, requests // REQUEST_COST_BYTES))
        self.dropped_steps = self.dropped_spans = self.dropped_counters = self.dropped_requests = 0

    @property
    def dropped(self) -> int:
        """Records given up for lack of memory while still inside the horizon."""
        return self.dropped_steps + self.dropped_spans + self.dropped_counters + self.dropped_requests

    def add_step(self, step: Step, expected_ms: float | None = None) -> None:
        """``expected_ms`` is for the tape."""
        kept = self._steps
        oldest_ns = step.end_ns - self.horizon_ns
        while kept and kept[0].end_ns < oldest_ns:
            kept.popleft()
        if len(kept) == kept.maxlen:
            self.dropped_steps += 1
        kept.append(step)
        if self.tape is not None:
            self.tape.add_step(step, expected_ms)

    def add_span(self, span: Span) -> None:
        kept = self._spans
        oldest_ns = span.end_ns - self.horizon_ns
        while kept and kept[0].end_ns < oldest_ns:
            kept.popleft()
        if len(kept) == kept.maxlen:
            self.dropped_spans += 1
        kept.append(span)
        if self.tape is not None:
            self.tape.add_span(span)

    def add_counter(self, counter: Counter) -> None:
        kept = self._counters
        oldest_ns = counter.time_ns - self.horizon_ns
        while kept and kept[0].time_ns < oldest_ns:
            kept.popleft()
        if len(kept) == kept.maxlen:
            self.dropped_counters += 1
        kept.append(counter)
        if self.tape is not None:
            self.tape.add_counter(counter)

    def add_request(self, request: Request) -> None:
        """One that has ended: its time is that of the newest step."""
        kept = self._requests
        now_ns = self._steps[-1].end_ns if self._steps else (request.arrival_ns or 0)
        while kept and kept[0][0] < now_ns - self.horizon_ns:
            kept.popleft()
        if len(kept) == kept.maxlen:
            self.dropped_requests += 1
        kept.append((now_ns, request))
        if self.tape is not None:
            self.tape.add_request(request)

    def add(self, window: Window, expected_ms: Mapping[int, float] | None = None) -> None:
        """Everything in ``window``, as a source's ``poll`` hands it over; ``expected_ms`` by step."""
        known = expected_ms or {}
        for step in window.steps:
            self.add_step(step, known.get(step.step))
        for span in window.spans:
            self.add_span(span)
        for counter in window.counters:
            self.add_counter(counter)
        for request in window.requests:
            self.add_request(request)

    def window(self, since_ns: int, until_ns: int) -> Window:
        """What overlaps ``[since_ns, until_ns]``, each list in order of its start; requests of their ends."""
        return Window(
            steps=sorted(
                (s for s in self._steps.copy() if s.end_ns >= since_ns and s.start_ns <= until_ns),
                key=lambda s: s.start_ns,
            ),
            spans=sorted(
                (s for s in self._spans.copy() if s.end_ns >= since_ns and s.start_ns <= until_ns),
                key=lambda s: s.start_ns,
            ),
            counters=sorted(
                (c for c in self._counters.copy() if since_ns <= c.time_ns <= until_ns),
                key=lambda c: c.time_ns,
            ),
            requests=[
                request
                for ended_ns, request in self._requests.copy()
                if ended_ns >= since_ns and (request.arrival_ns is None or request.arrival_ns <= until_ns)
            ],
        )

    def latest_step(self) -> Step | None:
        """The step added last, or None."""
        return self._steps[-1] if self._steps else None
