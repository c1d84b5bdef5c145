from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from latencyprism.cli import explain
from latencyprism.errors import BadInput
from latencyprism.recorder import Capture, read_capture, write_capture
from latencyprism.records import Alert, Span, Step

GOLDEN = Path(__file__).parents[1] / "recorder" / "golden.pftrace"


def run(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    parser = argparse.ArgumentParser()
    explain.add_arguments(parser)
    assert explain.run(parser.parse_args([str(w) for w in words])) == 0
    return capsys.readouterr().out


def told(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is not JSON")

    return json.loads(run(capsys, *words, "--json"), parse_constant=refuse)


def test_the_story_names_alert_expectation_excess_and_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    said = run(capsys, str(GOLDEN))
    for words in (
        "vllm, node-7",
        "ALERT (page, shift)",
        "step 21 took 24.1 ms where 12.0 ms was expected (+101%)",
        "expected: base 8.00 + batch 2.50 + context 1.50 ms",
        "the excess is in: execute",
        "Most of the excess is in execute.",
        "VERDICT Another process takes CPU time from the engine (cpu.neighbour, 87%).",
        "others: unknown 7%, cpu.quota 6%",
        "not looked at: accelerator telemetry: no device found",
        "SLOWEST STEPS (furthest above their expectation)",
        "ui.perfetto.dev",
    ):
        assert words in said, words


def test_json_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    said = told(capsys, str(GOLDEN), "--slowest", "3")
    assert said["steps"] == 30 and said["alerts"][0]["onset_step"] == 15
    assert said["verdict"]["cause"] == "cpu.neighbour"
    shares = {part["name"]: part["share"] for part in said["contrast"]["parts"]}
    assert shares["execute"] > 0.9
    assert len(said["slowest"]) == 3
    excess = [entry["duration_ms"] - entry["expected_ms"] for entry in said["slowest"]]
    assert excess == sorted(excess, reverse=True)


def test_one_step_is_told_with_its_spans_and_what_was_not_seen(capsys: pytest.CaptureFixture[str]) -> None:
    said = run(capsys, str(GOLDEN), "--step", "7")
    assert "step 7 mixed" in said and "256 prefill tokens" in said
    assert "draft_tokens       not seen" in said
    assert "Worker 815 / MainThread 815: execute_model" in said
    found = told(capsys, str(GOLDEN), "--step", "7")
    assert found["steps"][0]["prefill_tokens"] == 256 and found["steps"][0]["xpu_busy_ns"] is None
    assert [span["name"] for span in found["spans"]] == ["execute_model", "forward", "attention"]


def test_a_step_that_is_not_there_and_a_file_that_is_none_are_refused(tmp_path: Path) -> None:
    arguments = argparse.Namespace(
        output=None, capture=GOLDEN, format="capture", step=99, slowest=5, report=None, json=False
    )
    with pytest.raises(BadInput, match="it holds steps 0 to 29"):
        explain.run(arguments)
    arguments.capture = tmp_path / "none"
    with pytest.raises(BadInput, match="No such file"):
        explain.run(arguments)
    (tmp_path / "text").write_text("hello")
    arguments.capture = tmp_path / "text"
    with pytest.raises(BadInput, match="not a LatencyPrism capture"):
        explain.run(arguments)


def test_a_report_is_written_beside_the_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, str(GOLDEN), "--report", str(tmp_path / "r.html"))
    assert "<!doctype html>" in (tmp_path / "r.html").read_text()


def test_a_cut_off_capture_is_explained_with_a_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = tmp_path / "cut.pftrace"
    cut.write_bytes(GOLDEN.read_bytes()[:-2000])
    assert "NOTE: the file is cut off" in run(capsys, str(cut))


@pytest.mark.parametrize("json_too", [False, True])
def test_nothing_hostile_reaches_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], json_too: bool
) -> None:
    evil = "\x1b]0;x\x07\r\n\u202e"
    alert = Alert(
        evil, evil, evil, evil, 0, 0, 1, 1, evil, float("nan"), float("inf"), 0.0, terms={evil: 1.0}
    )
    capture = Capture(
        meta={
            "engine": evil,
            "pids": {evil: evil},
            "not_available": [evil],
            "clock": {"monotonic_ns": 2**70},
        },
        steps=[Step("\x1b[2J", 0, 0, 1, 0, 10)],
        spans=[Span((evil,), evil, 0, 5)],
        alerts=[alert],
    )
    write_capture(tmp_path / "a", capture)
    for words in ([], ["--step", "1"]):
        said = run(capsys, str(tmp_path / "a"), *words, *(["--json"] if json_too else []))
        assert not set(said) & set("\x1b\x07\r\u202e")


def test_captures_with_little_in_them_are_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_capture(tmp_path / "a", Capture())
    said = run(capsys, str(tmp_path / "a"))
    assert "No alert is in this capture." in said and "No diagnosis was made." in said
    assert told(capsys, str(tmp_path / "a"))["contrast"] is None
    assert read_capture(tmp_path / "a") == Capture()
