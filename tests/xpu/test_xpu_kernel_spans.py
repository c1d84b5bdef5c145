"""What a window told of a process, as spans and in figures."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latencyprism.attach.inject import InjectReport
from latencyprism.errors import TargetRefused
from latencyprism.records import Span
from latencyprism.records.device_spans import from_a_window, is_kernel, is_launch, on_a_device, process_of
from latencyprism.xpu.kernel_spans import described, doubtful_names, spans_of
from latencyprism.xpu.kernels import KernelCapture, KernelEvent

REDUCE = "ncclDevKernel_AllReduce_Sum_bf16_RING_LL"
EVENTS = [
    KernelEvent("cudaLaunchKernel", "CPU", 812, 815, 90, 95, 1),
    KernelEvent("cudaStreamIsCapturing", "CPU", 812, 815, 96, 97, 9),
    KernelEvent("gemm", "CUDA", 1, 7, 100, 200, 1),
    KernelEvent(REDUCE, "CUDA", 1, 20, 150, 450, 2),
    KernelEvent("gemm", "CUDA", 1, 7, 210, 260, 3),
    KernelEvent("Memcpy DtoH (Device -> Pinned)", "CUDA", 1, 7, 300, 320, 4),
    KernelEvent("nccl:all_reduce", "CUDA", 1, 20, 140, 460, 0),
    KernelEvent("mul", "PrivateUse1", 0, 2, 100, 110, 0),
]


def capture_of(rows: list[object], left_out: int = 0) -> KernelCapture:
    lines = [json.dumps(rows).encode()]
    moments = {"preparing": 10, "started": 50, "stopping": 2_000_050, "done": 3_000_000}
    report = InjectReport.__new__(InjectReport)
    return KernelCapture(812, "torch 9.9", moments, left_out, report, lines, 1000)


def test_tracks_are_device_and_stream_and_calls_that_launched_are_on_their_thread() -> None:
    spans = spans_of(EVENTS, "Worker 812")
    assert [span[:4] for span in spans] == [
        (("Worker 812", "launches (thread 815)"), "cudaLaunchKernel", 90, 95),
        (("GPU 1 (Worker 812)", "stream 7"), "gemm", 100, 200),
        (("GPU 1 (Worker 812)", "stream 20"), REDUCE, 150, 450),
        (("GPU 1 (Worker 812)", "stream 7"), "gemm", 210, 260),
        (("GPU 1 (Worker 812)", "stream 7"), "Memcpy DtoH (Device -> Pinned)", 300, 320),
        (("NPU 0 (Worker 812)", "stream 2"), "mul", 100, 110),
    ]
    assert spans[2].details == (("collective", "all_reduce"), ("correlation", 2))
    assert spans[4].details == (("kind", "copy"), ("correlation", 4)) and spans[5].details == ()
    assert [is_launch(span) for span in spans] == [True] + [False] * 5
    assert [is_kernel(span) for span in spans] == [False, True, True, True, False, True]
    assert all(from_a_window(span) and process_of(span) == "Worker 812" for span in spans)


def test_other_spans_are_none_of_these() -> None:
    for track in (("Worker 812",), ("Worker 812", "runtime"), ("a 7", "sched"), ("x (y)", "lane"), ()):
        span = Span(track, "x", 0, 1)
        assert not from_a_window(span) and not is_kernel(span) and not on_a_device(span)


def test_the_ten_that_took_the_most_time_and_the_collectives() -> None:
    many = [KernelEvent(f"k{n}", "CUDA", 1, 7, n * 1000, n * 1000 + n + 1, 0) for n in range(30)]
    told = described(capture_of([], 5), "Worker 812", spans_of([*EVENTS, *many], "Worker 812"))
    assert told["longest"][:2] == [
        {"name": REDUCE, "calls": 1, "total_ms": 0.0}, {"name": "gemm", "calls": 2, "total_ms": 0.0},
    ]  # fmt: skip
    assert [entry["name"] for entry in told["longest"][2:]] == [f"k{n}" for n in range(29, 21, -1)]
    assert told["collectives"] == [{"name": "all_reduce", "calls": 1, "total_ms": 0.0}]
    assert told["count"] == 34 and told["left_out"] == 5 and told["window_ms"] == 2.0
    assert told["devices"] == ["GPU 1 (Worker 812)", "NPU 0 (Worker 812)"]
    assert told["framework"] == "torch 9.9" and told["moments"]["stopping"] == 2_000_050
    json.dumps(told)


def test_names_that_may_be_missing_from_the_list_are_told() -> None:
    events = [KernelEvent("ncclFutureKernel_AllReduce", "CUDA", 0, 7, 0, 1, 0), *EVENTS]
    assert doubtful_names(spans_of(events, "w 1")) == ["ncclFutureKernel_AllReduce"]


def test_rows_become_events_on_the_monotonic_clock() -> None:
    found = capture_of([["b", "CUDA", 0, 7, 3000, -5, 2], ["a", "CUDA", 0, 7, 2000, 10, 1]]).events
    assert found == [
        KernelEvent("a", "CUDA", 0, 7, 1000, 1010, 1), KernelEvent("b", "CUDA", 0, 7, 2000, 2000, 2),
    ]  # fmt: skip


row = st.lists(
    st.none() | st.text(max_size=4) | st.integers() | st.floats() | st.lists(st.integers(), max_size=1),
    min_size=5, max_size=9,
)  # fmt: skip


@given(st.lists(row | st.integers() | st.none(), max_size=4))
def test_rows_that_are_none_are_refused_and_nothing_else_happens(rows: list[object]) -> None:
    try:
        events = capture_of(rows).events
    except TargetRefused as refused:
        assert "not of the expected form" in refused.why
        return
    assert len(events) == len(rows)
    assert all(-(2**63) < event.start_ns <= event.end_ns < 2**63 for event in events)


def test_a_line_that_is_no_json_is_refused() -> None:
    capture = capture_of([])
    capture.lines.append(b"[[1, ")
    with pytest.raises(TargetRefused, match="not of the expected form"):
        _ = capture.events
