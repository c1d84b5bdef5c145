"""replay: a recorded step log in, one JSON line per firing out."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

from latencyprism.cli.main import main

DATA = Path(os.environ.get("LATENCYPRISM_DATA") or Path(__file__).parents[3] / "shared" / "data")


def write(path: Path, count: int = 1500, slow: range = range(1200, 1260), replicas: int = 1) -> Path:
    """A calm stream at 20 ms with one slow stretch of +40 %."""
    rng, now, rows = random.Random(1), 10**9, ["engine,replica,start_ns,end_ns,decode_tokens,context_tokens"]
    for number in range(count):
        took = int(20e6 * rng.gauss(1.0, 0.01) * (1.4 if number in slow else 1.0))
        rows.extend(f"vllm,{replica},{now},{now + took},8,{1600 + number}" for replica in range(replicas))
        now += took + 100_000
    path.write_text("\n".join(rows) + "\n")
    return path


def lines(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


def test_firings_and_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(write(tmp_path / "log.csv")), "--summary"]) == 0
    *fired, summary = lines(capsys.readouterr().out)
    assert {"step", "level", "kind", "onset_step", "observed_ms", "expected_ms", "incident"} <= set(fired[0])
    assert 1200 <= fired[0]["step"] <= 1203
    assert all(line["onset_step"] <= line["step"] for line in fired)
    assert "page" in {line["level"] for line in fired}
    assert {line["incident"] for line in fired} == {1}
    assert summary["steps"] == 1500
    assert summary["alerts"] == len(fired)
    assert summary["incidents"] == 1
    assert summary["skipped"] == 0
    assert 0 < summary["mape"] < 0.05
    assert summary["within_10pct"] > 0.9
    assert summary["us_per_step"] > 0


def test_replicas_are_judged_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(write(tmp_path / "log.csv", replicas=2)), "--summary"]) == 0
    *fired, summary = lines(capsys.readouterr().out)
    assert {line["replica"] for line in fired} == {0, 1}
    assert summary["incidents"] == 2


def test_fail_on_alert(tmp_path: Path) -> None:
    assert main(["replay", str(write(tmp_path / "a.csv")), "--fail-on-alert", "-o", str(tmp_path / "o")]) == 4
    assert main(["replay", str(write(tmp_path / "b.csv", slow=range(0))), "--fail-on-alert"]) == 0


def test_output_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.jsonl"
    assert main(["replay", str(write(tmp_path / "log.csv")), "--summary", "-o", str(out)]) == 0
    assert capsys.readouterr().out == ""
    assert lines(out.read_text())[-1]["steps"] == 1500
    assert main(["replay", str(tmp_path / "log.csv"), "-o", str(tmp_path / "no" / "such")]) == 2


def test_no_steps_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "log.csv"
    path.write_text("start_ns,end_ns\n")
    assert main(["replay", str(path), "--summary"]) == 0
    (summary,) = lines(capsys.readouterr().out)
    assert summary["steps"] == 0
    assert summary["mape"] is None


def test_bad_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "log.csv", count=50, slow=range(0))
    path.write_text(path.read_text() + "vllm,0,NaN,5,8,1\n")
    assert main(["replay", str(path)]) == 2
    error = capsys.readouterr().err
    assert "row 50" in error
    assert "start_ns" in error
    assert "Traceback" not in error
    assert main(["replay", str(path), "--skip-bad", "--summary"]) == 0
    summary = lines(capsys.readouterr().out)[-1]
    assert (summary["steps"], summary["skipped"]) == (50, 1)


def test_artefact_log(capsys: pytest.CaptureFixture[str]) -> None:
    path = DATA / "steps" / "decode_vllm.csv.gz"
    if not path.exists():
        pytest.skip("needs the reference data decode_vllm.csv.gz; LATENCYPRISM_DATA names its folder")
    assert main(["replay", str(path), "--format", "latencyprism-artefact", "--summary"]) == 0
    summary = lines(capsys.readouterr().out)[-1]
    assert summary["steps"] == 21104
    assert summary["mape"] < 0.01
    assert summary["within_10pct"] > 0.998


def test_bench_detect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng, now = random.Random(1), 0
    rows = ["job_name,start_ts,duration_us,batch_size,avg_input_length,max_input_length,avg_output_length,"
            "max_output_length"]  # fmt: skip
    for number in range(2000):
        took = 30000 * rng.gauss(1.0, 0.01)
        rows.append(f"job{number // 200},{now},{took:.1f},8,128,128,{number % 200},{number % 200}")
        now += int(took) + 500
    path = tmp_path / "log.csv"
    path.write_text("\n".join(rows))
    asked = ["bench", "detect", "--data", str(path), "--splits", "2", "--placements", "1"]
    assert main([*asked, "--fault", "mult_0.3", "--json"]) == 0
    (result,) = lines(capsys.readouterr().out)
    assert result["faults"]["mult_0.3"]["page"]["recall"] == 1.0
    assert result["fault_free"]["page"]["false_episodes"] == 0
    assert main([*asked, "--fault", "mult_0.3"]) == 0
    assert "mult_0.3" in capsys.readouterr().out
