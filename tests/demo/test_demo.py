"""The demonstration, whole: a real engine, a surge without alarm, a fault with its cause."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from latencyprism.recorder.capture import read_capture

KEYS = {
    "engine", "steps", "steps_true", "alerts_normal", "alerts_surge", "alerts_fault", "alert_delay_ms_p50",
    "alert_delay_ms_p99", "fault", "cause", "cause_rank", "capture", "report", "seconds",
}  # fmt: skip


@pytest.mark.engine
@pytest.mark.bpf
@pytest.mark.root
def test_three_acts(tmp_path: Path) -> None:
    for attempt in range(2):
        done = subprocess.run(
            [sys.executable, "-m", "latencyprism", "demo", "--json", "-o", str(tmp_path / str(attempt))],
            capture_output=True, text=True, timeout=200, check=False,
        )  # fmt: skip
        assert done.stderr == ""
        result = json.loads(done.stdout)
        # A shared machine may hold the engine up for real in these 30 s, and that is told; hardly twice.
        if result["alerts_normal"] == 0 and result["alerts_surge"] == 0:
            break
    assert set(result) >= KEYS
    assert result["engine"] == "llama.cpp" and result["seconds"] <= 120
    assert result["steps"] == result["steps_true"] > 1000 and result["lost"] == 0
    assert result["alerts_normal"] == 0 and result["alerts_surge"] == 0, result
    assert result["alerts_fault"] >= 1, result
    assert done.returncode == 0
    capture = read_capture(result["capture"])
    assert capture.verdict is not None and capture.verdict.cause == result["cause"]
    assert capture.notices == [] and len(capture.steps) > 500
    page = Path(result["report"]).read_text()
    assert "<svg" in page and "http://" not in page.replace("http://www.w3.org/2000/svg", "")
