"""Kernels in a capture: they read back, Perfetto draws them with arrows from their launches, SQL sees them,
and nothing that looks at other spans takes them for its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import pytest
import recorder_trace_processor
from recorder_samples import incident

from latencyprism.attach.inject import InjectReport
from latencyprism.cli.main import main
from latencyprism.recorder import Capture, read_capture, write_capture
from latencyprism.recorder.export_tables import tables_of
from latencyprism.recorder.flows import Flows
from latencyprism.records import Span, Window
from latencyprism.sentinel.finish import finish
from latencyprism.timeline.breakdown import SpanIndex
from latencyprism.timeline.device_time import DeviceWindow, with_busy
from latencyprism.xpu.kernel_spans import described, spans_of
from latencyprism.xpu.kernels import KernelCapture, KernelEvent

NOT_HERE = recorder_trace_processor.missing()
WORKER = "Worker 815"
REDUCE = "ncclDevKernel_AllReduce_Sum_bf16_RING_LL"
NAMES = ("gemm", "void sample_tokens_kernel<float>()", "execute_model", REDUCE)


def window_of(started_ns: int, stopping_ns: int) -> KernelCapture:
    """What ``described`` tells of: its events are told apart."""
    moments = {"started": started_ns, "stopping": stopping_ns, "done": stopping_ns + 9_000_000}
    return KernelCapture(815, "torch 9.9", moments, 0, cast(InjectReport, None), [], 0)


def with_kernels(steps: int = 30) -> Capture:
    """In three steps after the onset 40 kernels each, launched by one thread; the last launch of a step has
    two, as that of a graph."""
    capture = incident(steps, steps // 2)
    chosen = capture.steps[steps // 2 + 3 : steps // 2 + 6]
    events = []
    for step in chosen:
        for number in range(40):
            at = step.start_ns + 200_000 + number * 150_000
            correlation = step.step * 100 + number
            name, stream = NAMES[number % 4], 7 if number % 4 else 20
            events.append(KernelEvent("cudaLaunchKernel", "CPU", 815, 815, at - 9000, at - 4000, correlation))
            events.append(KernelEvent(name, "CUDA", 0, stream, at, at + 100_000, correlation))
        events.append(KernelEvent("second", "CUDA", 0, 7, at + 100_000, at + 120_000, correlation))
    events.append(KernelEvent("Memset (Device)", "CUDA", 0, 7, at + 120_000, at + 130_000, 0))
    spans = spans_of(events, WORKER)
    told = window_of(chosen[0].start_ns, chosen[-1].end_ns)
    capture.spans += spans
    window = DeviceWindow.of(*list(told.moments.values())[:2], spans)
    capture.steps[:] = with_busy(capture.steps, [window])
    capture.meta["kernels"] = [described(told, WORKER, spans)]
    return capture


@pytest.fixture
def path(tmp_path: Path) -> Path:
    written = tmp_path / "kernels.pftrace"
    write_capture(written, with_kernels())
    return written


def test_it_reads_back_as_it_was(path: Path) -> None:
    capture, back = with_kernels(), read_capture(path)
    assert back.notices == []
    assert back.spans == capture.spans and back.steps == capture.steps
    assert back.meta["kernels"] == capture.meta["kernels"]
    busy = {step.step: step.xpu_busy_ns for step in back.steps if step.xpu_busy_ns is not None}
    assert busy == {18: 4_020_000, 19: 4_020_000, 20: 4_020_000}


@pytest.mark.skipif(bool(NOT_HERE), reason=NOT_HERE)
def test_the_trace_processor_finds_streams_and_arrows(path: Path) -> None:
    capture = read_capture(path)
    with recorder_trace_processor.opened(path) as processor:
        faults = processor.query(
            "select name from stats where value != 0 and severity in ('error', 'data_loss')"
        )
        assert [row.name for row in faults] == []
        rows = processor.query(
            """
            select track.name as lane, parent.name as device, count(*) as n, sum(slice.dur) as ns from slice
            join track on slice.track_id = track.id join track parent on track.parent_id = parent.id
            where parent.name = 'GPU 0 (Worker 815)' group by 1, 2 order by 1
            """
        )
        drawn = {row.lane: (row.n, row.ns) for row in rows}
        own = [span for span in capture.spans if span.track[0] == "GPU 0 (Worker 815)"]
        lanes = {span.track[1] for span in own}
        assert (
            drawn
            == {
                lane: (
                    sum(span.track[1] == lane for span in own),
                    sum(span.end_ns - span.start_ns for span in own if span.track[1] == lane),
                )
                for lane in lanes
            }
            and len(drawn) == 2
        )
        arrows = processor.query(
            """
            select a.name as source, b.name as target, b.ts - a.ts as ns from flow
            join slice a on flow.slice_out = a.id join slice b on flow.slice_in = b.id
            where a.name = 'cudaLaunchKernel'
            """
        )
        found = [(row.target, row.ns) for row in arrows]
        assert len(found) == 120 and {ns for _, ns in found} == {9000}
        assert {name for name, _ in found} == set(NAMES), "of a graph's kernels the first"
        processes = processor.query("select name, pid from process where pid = 815 or name like 'GPU%'")
        assert {(row.name, row.pid) for row in processes} == {("Worker", 815)}
        collectives = processor.query(
            "select count(*) as n from slice where extract_arg(arg_set_id, 'debug.collective') = 'all_reduce'"
        )
        assert [row.n for row in collectives] == [30]


def test_each_pair_of_call_and_kernel_has_a_flow_of_its_own() -> None:
    capture = with_kernels()
    flows = Flows(capture.window)
    both = [(span, *flows.of_span(place, span)) for place, span in enumerate(capture.spans)]
    begun = [flow for _, begins, _ in both for flow in begins]
    ended = [flow for span, _, ends in both for flow in ends if span.track[0].startswith("GPU")]
    assert len(set(begun)) == len(begun) == 120 and sorted(begun) == sorted(ended)


def test_the_same_correlation_in_another_process_is_another_launch() -> None:
    spans = [
        *spans_of([KernelEvent("k", "CUDA", 0, 7, 10, 20, 5)], "Worker 1"),
        *spans_of(
            [KernelEvent("call", "CPU", 2, 3, 1, 2, 5), KernelEvent("k", "CUDA", 0, 7, 10, 20, 5)], "Worker 2"
        ),
    ]
    flows = Flows(Window([], spans))
    found = [flows.of_span(place, span) for place, span in enumerate(spans)]
    assert [bool(ended) for _, ended in found] == [False, False, True]
    assert [bool(begun) for begun, _ in found] == [False, True, False]


def test_what_looks_at_spans_of_workers_passes_kernels_over() -> None:
    plain, capture = incident(30, 15), with_kernels()
    before, after = Flows(plain.window), Flows(capture.window)
    for step in plain.steps:
        assert before.of_step(step) == after.of_step(step)
    whole, alone = SpanIndex.of(capture.spans), SpanIndex.of(plain.spans)
    assert (whole.runs, whole.calls) == (alone.runs, alone.calls)
    odd = Span(("GPU 0 (Worker 815)", "stream 7"), "sample", 0, 9)
    assert SpanIndex.of([odd]).calls == []


def test_kernels_and_the_steps_beside_the_profiler_are_no_part_of_the_verdict() -> None:
    """The same capture with a step that the profiler held up for two seconds, and with kernels."""
    plain, capture = incident(300, 150), with_kernels(300)
    onset_ns = plain.steps[150].start_ns
    plain.meta["onset_ns"] = capture.meta["onset_ns"] = onset_ns
    end_ns = capture.meta["kernels"][0]["moments"]["done"]
    begin_ns = capture.meta["kernels"][0]["moments"]["started"]
    plain.steps[:] = [s for s in plain.steps if s.end_ns <= begin_ns or s.start_ns >= end_ns]
    held_up = next(place for place, s in enumerate(capture.steps) if s.start_ns == begin_ns)
    capture.steps[held_up] = capture.steps[held_up]._replace(execute_ns=2_000_000_000)
    finish(plain)
    finish(capture)
    assert plain.verdict is not None and capture.verdict is not None
    assert capture.verdict.to_dict() == plain.verdict.to_dict()
    assert len(capture.spans) > len(plain.spans), "the capture itself keeps them"


def test_tables_hold_them_as_spans() -> None:
    spans = next(table for table in tables_of([("x", with_kernels())]) if table.name == "spans")
    rows = [row for row in spans.rows() if row[1] == "GPU 0 (Worker 815)/stream 20"]
    assert len(rows) == 30 and {row[2] for row in rows} == {"gemm"}
    assert set(json.loads(rows[0][-1])) == {"correlation"}


def test_explain_tells_them(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", str(path)]) == 0
    told = capsys.readouterr().out
    assert "KERNELS of Worker 815" in told and "torch 9.9): 123 on GPU 0 (Worker 815)" in told
    assert "of them collective:" in told and "all_reduce" in told
    assert "in the 3 steps wholly inside it the busiest device ran kernels for" in told
    assert main(["explain", str(path), "--step", "18"]) == 0
    told = capsys.readouterr().out
    assert "41 kernels on GPU 0 (Worker 815), the longest" in told and "cudaLaunchKernel" not in told
    assert main(["explain", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["meta"]["kernels"][0]["count"] == 123


@pytest.mark.parametrize(
    "kernels",
    [
        {}, [], "x", 7, [None], [{}],
        [{"longest": 3, "moments": [], "devices": {}, "collectives": [None, 4]}],
        [{"window_ms": "x", "left_out": "y", "longest": [{"total_ms": [], "name": "a\x1b[2J" * 400}],
          "moments": {"started": "a", "stopping": None, "done": 4}, "process": {"a": 1}}],
    ],
)  # fmt: skip
def test_what_a_file_says_of_them_may_be_anything(
    kernels: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capture = incident(30, 15)
    capture.meta |= {"kernels": kernels, "onset_ns": capture.steps[15].start_ns}
    write_capture(tmp_path / "odd.pftrace", capture)
    assert main(["explain", str(tmp_path / "odd.pftrace")]) == 0
    assert "\x1b" not in capsys.readouterr().out
    finish(capture)
