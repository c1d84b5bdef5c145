from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latencyprism.recorder import FlightRecorder
from latencyprism.records import Counter, Request, Span, Step, Window

S = 1_000_000_000


def step(number: int, start_ns: int, length_ns: int = 10_000_000) -> Step:
    return Step("vllm", 0, 0, number, start_ns, start_ns + length_ns)


def span(start_ns: int, length_ns: int = 1000) -> Span:
    return Span(("Worker 1",), "execute", start_ns, start_ns + length_ns)


def test_what_is_older_than_the_horizon_is_gone_and_not_counted_as_dropped() -> None:
    recorder = FlightRecorder(horizon_s=10)
    for number in range(100):
        recorder.add_step(step(number, number * S))
    kept = recorder.window(0, 1000 * S).steps
    assert [s.step for s in kept] == list(range(89, 100))
    assert recorder.dropped == 0


def test_a_flood_of_spans_never_pushes_steps_out_and_is_counted() -> None:
    recorder = FlightRecorder(horizon_s=60, max_bytes=1 << 20)
    for number in range(200):
        recorder.add_step(step(number, number * 1000))
    for number in range(20_000):
        recorder.add_span(span(number))
    kept = recorder.window(-S, 1000 * S)
    assert len(kept.steps) == 200
    assert recorder.dropped_spans == 20_000 - len(kept.spans) > 0
    assert recorder.dropped == recorder.dropped_spans


def test_window_returns_what_overlaps_in_order_of_time() -> None:
    recorder = FlightRecorder()
    recorder.add(Window([step(1, S), step(2, 2 * S)], [span(5 * S), span(3 * S)], []))
    recorder.add_counter(Counter(("machine",), "load", 4 * S, 1.0))
    seen = recorder.window(S + 5_000_000, 3 * S)
    assert [s.step for s in seen.steps] == [1, 2]
    assert [s.start_ns for s in seen.spans] == [3 * S]
    assert seen.counters == []
    assert [s.start_ns for s in recorder.window(0, 9 * S).spans] == [3 * S, 5 * S]
    assert recorder.latest_step() == step(2, 2 * S)


def test_requests_are_kept_by_when_they_ended_and_are_bounded() -> None:
    recorder = FlightRecorder(horizon_s=10, max_bytes=1 << 20)
    for number in range(30):
        recorder.add(
            Window([step(number, number * S)], [], [], [Request("vllm", 0, number, (number - 5) * S)])
        )
    assert [r.request for r in recorder.window(0, 100 * S).requests] == list(range(19, 30))
    # One that arrived later than the window, and one that had ended before it.
    assert [r.request for r in recorder.window(25 * S, 22 * S).requests] == [25, 26, 27]
    for number in range(1000):
        recorder.add_request(Request("vllm", 0, number, 29 * S))
    kept = recorder.window(0, 100 * S).requests
    assert len(kept) < 100 and recorder.dropped_requests == 1011 - len(kept)


@given(st.lists(st.integers(0, 100), max_size=200), st.integers(1, 50))
def test_every_record_is_kept_dropped_or_too_old(times: list[int], horizon: int) -> None:
    recorder = FlightRecorder(horizon_s=horizon, max_bytes=40_000)
    for number, time_s in enumerate(times):
        recorder.add_step(step(number, time_s * S))
    kept = recorder.window(-S, 200 * S).steps
    assert {s.step for s in kept} <= set(range(len(times)))
    newest = [number for number, time_s in enumerate(times)][-1:]
    assert set(newest) <= {s.step for s in kept}
    assert len(kept) + recorder.dropped_steps <= len(times)


def test_adding_is_cheap() -> None:
    recorder = FlightRecorder()
    records = [step(number, number * 1_000_000) for number in range(20_000)]
    best = 1.0
    for _ in range(5):
        began = time.thread_time()
        for record in records:
            recorder.add_step(record)
        best = min(best, (time.thread_time() - began) / len(records))
    assert best < 2e-6


def test_sizes_that_make_no_sense_are_refused() -> None:
    for horizon_s, max_bytes in ((0.0, 1), (-1.0, 1), (1.0, 0), (float("nan"), 1)):
        with pytest.raises(ValueError, match="positive"):
            FlightRecorder(horizon_s, max_bytes)
