"""Records a capture of an engine of the lab: one alert, with the seconds around it and the deeper probes.

    .venv/bin/python scripts/golden_record.py vllm raw.pftrace

Starts the engine with a model of random weights, of such a size that a step takes some tens of milliseconds,
has two clients ask it, watches it for twenty seconds, and stops its process for 0.4 s, as `latencyprism
inject peer.stalled` does. What `latencyprism watch` captures then is written to the path given;
scripts/golden_trim.py makes a small one of it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from latencyprism.lab.install import ENGINES
from latencyprism.lab.launch import Options
from latencyprism.lab.load import Load
from latencyprism.lab.models import TINY, Shape
from latencyprism.lab.profiles import Length, Profile
from latencyprism.lab.serve import Server, start
from latencyprism.recorder import Capture, read_capture, write_capture

CALM_S, STOP_S, AFTER_S = 20.0, 0.4, 7.0
LOAD = Profile(
    "golden", clients=2, prompt=Length(60, 0.6, 16, 400), output=Length(16, 0.4, 6, 30),
    duration_s=120.0, context=1024, seed=5,
)  # fmt: skip
SHAPES = {"llama.cpp": Shape(layers=16, hidden=1024, intermediate=3072, heads=16, kv_heads=8)}
"""Of the others the tiny model is slow enough."""


def record(server: Server, folder: Path) -> Capture:
    """The capture that has the stop in it; ``stopped_ns`` in its ``meta`` says when that was."""
    watch = subprocess.Popen(
        [sys.executable, "-m", "latencyprism", "watch", "--json", "--no-state", "-p", str(server.pid),
         "-o", str(folder)],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert watch.stdout is not None
    try:
        with Load(server, LOAD):
            time.sleep(CALM_S)
            stopped_ns = time.monotonic_ns()
            os.kill(server.pid, signal.SIGSTOP)
            try:
                time.sleep(STOP_S)
            finally:
                os.kill(server.pid, signal.SIGCONT)
            time.sleep(1.0)
            watch.send_signal(signal.SIGUSR1)  # refused where the alert has begun a capture already
            time.sleep(AFTER_S)
    finally:
        watch.send_signal(signal.SIGTERM)
        told, _ = watch.communicate(timeout=60)
    events = [json.loads(line) for line in told.splitlines()]
    found = [e["path"] for e in events if e["event"] == "capture" and e.get("path")]
    for path in reversed(found):
        capture = read_capture(path)
        if any(step.start_ns < stopped_ns < step.end_ns for step in capture.steps):
            capture.meta["stopped_ns"] = stopped_ns
            return capture
    raise SystemExit(f"no capture of the stop was written: {events}")


def main() -> int:
    if len(sys.argv) != 3 or sys.argv[1] not in ENGINES:
        print(f"usage: golden_record.py {'|'.join(ENGINES)} FILE", file=sys.stderr)
        return 2
    engine = next(name for name in ENGINES if name == sys.argv[1])
    with (
        tempfile.TemporaryDirectory() as folder,
        start(engine, Options(slots=4, context=1024), shape=SHAPES.get(engine, TINY)) as server,
    ):
        write_capture(sys.argv[2], record(server, Path(folder)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
