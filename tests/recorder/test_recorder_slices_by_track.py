"""The script that asks Perfetto's trace processor counts what the capture holds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import recorder_trace_processor

from latencyprism.recorder import read_capture

NOT_HERE = recorder_trace_processor.missing()
GOLDEN = Path(__file__).parent / "golden.pftrace"
SCRIPT = Path(__file__).parents[2] / "scripts" / "slices_by_track.py"


def run(path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), str(path)], capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.skipif(bool(NOT_HERE), reason=NOT_HERE)
def test_slices_of_every_track_and_no_faults() -> None:
    done = run(GOLDEN)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    by_track = {track["track"]: track["slices"] for track in told["tracks"]}
    capture = read_capture(GOLDEN)
    assert by_track["steps"] == len(capture.steps) > 0
    assert told["slices"] == sum(by_track.values()) and told["faults"] == {}


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    done = run(tmp_path / "none.pftrace")
    assert done.returncode == 2 and "usage" in done.stderr
