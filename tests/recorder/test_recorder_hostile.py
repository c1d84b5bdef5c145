"""Captures as the world makes them: out of order, with holes, with clocks that jump, on bad disks."""

from __future__ import annotations

import os
import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from recorder_samples import incident, requests_of

from latencyprism.cli.main import main
from latencyprism.errors import PrismError
from latencyprism.recorder import Capture, FlightRecorder, read_capture, write_capture, write_raw
from latencyprism.recorder.blocks import Block, write_block
from latencyprism.recorder.deferred import CaptureJob
from latencyprism.recorder.drawing import draw
from latencyprism.recorder.export import FORMATS, export
from latencyprism.records import Counter, Span, Step
from latencyprism.records.operators import OPERATOR_DTYPE, Operators

CLOCK = {"monotonic_ns": 5_000_000_000_000, "realtime_ns": 1_790_000_000_000_000_000}


def told(path: Path, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    assert main(["explain", str(path), *more]) == 0
    return capsys.readouterr().out


def test_records_out_of_order_are_told_and_drawn_as_if_in_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ordered = incident(120)
    ordered.requests = requests_of(ordered.steps)
    mixed = Capture(meta=ordered.meta, alerts=ordered.alerts, verdict=ordered.verdict)
    dice = random.Random(5)
    places = list(range(120))
    dice.shuffle(places)
    mixed.steps = [ordered.steps[place] for place in places]
    mixed.expected_ms = [(ordered.expected_ms or [])[place] for place in places]
    mixed.spans, mixed.counters = ordered.spans[:], ordered.counters[:]
    mixed.requests = ordered.requests[:]
    for records in (mixed.spans, mixed.counters, mixed.requests):
        dice.shuffle(records)  # type: ignore[arg-type]
    paths = [tmp_path / "ordered.pftrace", tmp_path / "mixed.pftrace"]
    for path, capture in zip(paths, (ordered, mixed)):
        write_capture(path, capture)
    laid = [
        {
            uuid: [(at, opened and opened.name) for at, opened in events]
            for uuid, events in draw(c.window).laid
        }
        for c in (ordered, mixed)
    ]
    assert laid[0] == laid[1]
    words = [told(path, capsys, "--slowest", "3").replace(path.name, "x") for path in paths]
    assert "Traceback" not in words[1] and ("spikes" in words[0]) == ("spikes" in words[1])
    for kind in ("folded", "speedscope"):
        outs = [tmp_path / f"{kind}{n}" for n in range(2)]
        for capture, out in zip((ordered, mixed), outs):
            export(capture, "x", kind, out)
        assert sorted(outs[0].read_text()) == sorted(outs[1].read_text())


def test_steps_that_are_missing_are_drawn_and_told_as_a_gap(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = incident(100)
    holed = Capture(meta=whole.meta, steps=[*whole.steps[:40], *whole.steps[55:70], *whole.steps[71:]])
    path = tmp_path / "holed.pftrace"
    write_capture(path, holed)
    gaps = [
        (opened.name, at, opened.end_ns)
        for _, events in draw(holed.window).laid
        for at, opened in events
        if opened is not None and "not recorded" in opened.name
    ]
    assert gaps == [
        ("15 steps not recorded", whole.steps[39].end_ns, whole.steps[55].start_ns),
        ("1 step not recorded", whole.steps[69].end_ns, whole.steps[71].start_ns),
    ]
    assert "16 steps between the first and the last are not recorded" in told(path, capsys)
    write_capture(path, whole)
    assert "not recorded" not in told(path, capsys)


@pytest.mark.parametrize("jump_ns", [-(10**9), -(10**15), 10**12, 10**18])
def test_times_that_jump_are_shown_as_they_are_and_break_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], jump_ns: int
) -> None:
    capture = incident(80)
    capture.requests = requests_of(capture.steps)
    for place in range(40, 80):
        step = capture.steps[place]
        capture.steps[place] = step._replace(start_ns=step.start_ns + jump_ns, end_ns=step.end_ns + jump_ns)
    capture.steps[20] = capture.steps[20]._replace(end_ns=capture.steps[20].start_ns - 5)
    capture.meta["clock"] = CLOCK
    path = tmp_path / "jump.pftrace"
    write_capture(path, capture)
    assert read_capture(path).steps == capture.steps
    for more in (
        (),
        ("--json",),
        ("--slowest", "20"),
        ("--step", "41"),
        ("--report", str(tmp_path / "r.html")),
    ):
        assert told(path, capsys, *more)
    for kind in FORMATS:
        export(capture, "x", kind, tmp_path / kind)
    recorder = FlightRecorder(horizon_s=60)
    for step in capture.steps:
        recorder.add_step(step)
    assert recorder.latest_step() == capture.steps[-1]


def test_ten_million_events_stay_within_the_bytes_of_the_recorder() -> None:
    recorder = FlightRecorder(horizon_s=60, max_bytes=8 << 20)
    span, counter = Span(("p 1", "t 2"), "call", 10, 20), Counter(("m",), "c", 10, 1.0)
    recorder.add_step(Step("vllm", 0, 0, 1, 5, 9))
    for _ in range(5_000_000):
        recorder.add_span(span)
        recorder.add_counter(counter)
    kept = recorder.window(0, 100)
    assert len(kept.steps) == 1 and len(kept.spans) + len(kept.counters) < 20_000
    assert recorder.dropped == 10_000_000 - len(kept.spans) - len(kept.counters)


def test_ten_million_events_in_a_file_are_read_or_refused_in_seconds(tmp_path: Path) -> None:
    rows = np.zeros(10_000_000, OPERATOR_DTYPE)
    rows["start_ns"] = np.arange(len(rows)) * 1000
    rows["end_ns"] = rows["start_ns"] + 900
    capture = Capture(steps=incident(5).steps, operators=[Operators(("Worker 1", "ops"), ["aten::mm"], rows)])
    path = tmp_path / "large.pftrace"
    began = time.monotonic()
    write_raw(path, capture)
    back = read_capture(path)
    assert sum(len(calls.rows) for calls in back.operators) == len(rows) and not back.notices
    assert time.monotonic() - began < 120
    foreign = tmp_path / "foreign.pftrace"
    foreign.write_bytes(b"\x0a\x04\x40\x01\x50\x01" * 1_000_000)
    with pytest.raises(PrismError, match="not a LatencyPrism capture"):
        read_capture(foreign)


def test_a_capture_of_a_later_version_is_refused_with_a_remedy_by_every_verb(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "later.pftrace"
    path.write_bytes(write_block(Block("capture", {"format": 99, "meta": {}})))
    for command in (
        ["explain", str(path)],
        ["explain", str(path), "--format", "chrome"],
        ["query", "select 1", str(path)],
    ):
        assert main(command) == 2
        said = capsys.readouterr().err
        assert "format 99" in said and "remedy: read it with the version" in said


@pytest.fixture()
def read_only(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "read_only"
    folder.mkdir()
    if os.geteuid() != 0:
        folder.chmod(0o500)
        yield folder
        folder.chmod(0o700)
        return
    command = ["mount", "-t", "tmpfs", "-o", "ro,size=1m", "none", str(folder)]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_folder_that_cannot_be_written_is_said_by_whoever_writes(
    read_only: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capture = incident(5)
    with pytest.raises(PrismError, match=r"Read-only|denied"):
        write_capture(read_only / "a.pftrace", capture)
    job = CaptureJob(read_only / "a.pftrace", lambda: capture)
    result = job.poll()
    assert result is not None and ("Read-only" in result["error"] or "denied" in result["error"])
    write_capture(tmp_path / "a.pftrace", capture)
    for kind in FORMATS:
        if kind == "parquet":
            pytest.importorskip("pyarrow")
        assert main(
            ["explain", str(tmp_path / "a.pftrace"), "--format", kind, "-o", str(read_only / kind)]
        ) in (1, 2)
        said = capsys.readouterr().err
        assert ("Read-only" in said or "denied" in said) and "Traceback" not in said
