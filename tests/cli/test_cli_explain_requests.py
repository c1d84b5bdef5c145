"""``explain --request`` and the slowest requests of a capture."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from latencyprism.cli import explain
from latencyprism.errors import BadInput
from latencyprism.recorder import Capture, write_capture
from latencyprism.records import Request, Span, Step
from latencyprism.timeline.request_story import request_hash

MS = 1_000_000
KEY = bytes(range(16))
SHORT, LONG = request_hash("cmpl-order-66-0", KEY), request_hash("other", KEY)


@pytest.fixture
def capture(tmp_path: Path) -> Path:
    """A short request that waits for a 12,000-token prompt in two chunks."""
    steps, now = [], 1000 * MS
    work = [(64 * (n % 4), 1 + n % 5) for n in range(60)] + [(8000, 2), (4000, 2), (200, 3)] + [(0, 4)] * 20
    for number, (tokens, decodes) in enumerate(work):
        took = 5 * MS + 100_000 * tokens + 200_000 * decodes
        steps.append(
            Step("vllm", 0, 0, number, now, now + took, "mixed" if tokens else "decode",
                 prefill_requests=int(tokens > 0), decode_requests=decodes, prefill_tokens=tokens,
                 decode_tokens=decodes, schedule_ns=MS, update_ns=MS, execute_ns=took - 2 * MS)
        )  # fmt: skip
        now += took + 50_000
    long = Request("vllm", 0, LONG, steps[60].start_ns - MS, MS, steps[61].end_ns - steps[60].start_ns, None,
                   prompt_tokens=12_000, first_step=60, first_token_step=61, last_step=82)  # fmt: skip
    arrived = steps[60].start_ns + 2 * MS
    short = Request(
        "vllm", 0, SHORT, arrived, steps[62].start_ns - arrived, steps[62].duration_ns,
        steps[62].end_ns - arrived + 3 * MS, 6 * MS, steps[82].end_ns - arrived + 4 * MS, 200, 0, 21,
        max_itl_ns=steps[70].end_ns - steps[69].end_ns, finish_reason="length", first_step=62,
        first_token_step=62, last_step=82, token_steps=21, slowest_step=70, preempted=1,
        client_request=request_hash("order-66", KEY),
    )  # fmt: skip
    meta = {"engine": "vllm", "request_key": KEY.hex(), "loop_threads": [7]}
    worker = ("Worker 9",)
    spans = [Span(worker, "execute_model", s.start_ns + 2 * MS, s.end_ns - 2 * MS) for s in steps]
    path = tmp_path / "c.pftrace"
    write_capture(path, Capture(meta=meta, steps=steps, spans=spans, requests=[long, short]))
    return path


def run(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    parser = argparse.ArgumentParser()
    explain.add_arguments(parser)
    assert explain.run(parser.parse_args(list(words))) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("asked", ["order-66", "cmpl-order-66-0", f"{SHORT:x}"])
def test_a_request_is_found_by_any_name_and_its_time_told(
    capture: Path, capsys: pytest.CaptureFixture[str], asked: str
) -> None:
    said = run(capsys, str(capture), "--request", asked)
    for words in (
        f"request {SHORT:x}: prompt of 200 tokens, 21 output tokens, length, steps 62 to 82",
        "TTFT 1.24 s: 1.21 s behind a 12,000-token prompt of another request",
        "prefill 25.6 ms in 1 step: 25.0 ms own work",
        "decode 117 ms in 20 steps:",
        "preempted once",
        "longest wait for a token 5.85 ms, ended by step 70",
        "output 4.00 ms from the end of its last step to its stream",
    ):
        assert words in said, said


def test_the_same_as_json_adds_up(capture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (told,) = json.loads(run(capsys, str(capture), "--request", "order-66", "--json"))
    assert told["id"] == f"{SHORT:x}" and told["own_prompt_tokens"] == 200
    assert sum(stretch["ns"] for stretch in told["stretches"]) == told["e2e_ns"]
    for stretch in told["stretches"]:
        assert sum(stretch["parts"].values()) == stretch["ns"]
    assert told["stretches"][0]["behind"] == f"{LONG:x}"


def test_the_slowest_are_listed_in_short_and_on_demand_in_full(
    capture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = run(capsys, str(capture))
    assert "SLOWEST REQUESTS" in short and f"request {SHORT:x}" in short and "decode 117 ms" not in short
    full = run(capsys, str(capture), "--slowest", "1")
    assert "decode 117 ms" in full and f"request {LONG:x}" not in full
    told: Any = json.loads(run(capsys, str(capture), "--json", "--slowest", "1"))
    assert told["requests"] == 2 and [one["id"] for one in told["slowest_requests"]] == [f"{SHORT:x}"]


def test_a_step_is_told_in_parts(capture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = run(capsys, str(capture), "--step", "70")
    assert "its parts, which add up to it:" in said and "launch" in said and "unexplained" not in said
    told = json.loads(run(capsys, str(capture), "--step", "70", "--json"))
    assert (
        sum(told["parts"][0]["parts"].values()) == told["steps"][0]["end_ns"] - told["steps"][0]["start_ns"]
    )


@pytest.mark.parametrize("asked", ["nobody", "", "ffff", "\x1b[2J", "x" * 5000])
def test_a_request_that_is_not_there_is_refused_in_words(capture: Path, asked: str) -> None:
    parser = argparse.ArgumentParser()
    explain.add_arguments(parser)
    with pytest.raises(BadInput, match="not in the capture") as refused:
        explain.run(parser.parse_args([str(capture), f"--request={asked}"]))
    assert "\x1b" not in str(refused.value) and len(str(refused.value)) < 500


@pytest.mark.parametrize("key", [None, 5, "zz", "ab" * 200, ""])
def test_a_capture_with_a_strange_key_still_answers_by_hash(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], key: Any
) -> None:
    path = tmp_path / "c"
    write_capture(path, Capture(meta={"request_key": key}, requests=[Request("\x1b[2J", 0, 255, None)]))
    said = run(capsys, str(path), "--request", "ff")
    assert "request ff: nothing is known of it" in said and "\x1b" not in said
    assert "TTFT not seen" in said
