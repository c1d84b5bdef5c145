"""Records a capture of an engine of the lab that is stopped for a moment, with the deeper probes.

    .venv/bin/python scripts/golden_record.py vllm raw.pftrace

Starts the engine with a model of random weights, of such a size that a step takes some tens of milliseconds,
has two clients ask it, records it with `latencyprism record`, and stops its process for 0.4 s meanwhile, as
`latencyprism inject peer.stalled` does. scripts/golden_trim.py makes a small one of the file.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from latencyprism.attach.process import read_process
from latencyprism.lab.install import ENGINES
from latencyprism.lab.launch import Options
from latencyprism.lab.load import Load
from latencyprism.lab.models import Shape
from latencyprism.lab.profiles import Length, Profile
from latencyprism.lab.serve import Server, start
from latencyprism.recorder import Capture, read_capture, write_capture
from latencyprism.sentinel.claim import holder_of

CALM_S, RECORD_S, BEFORE_S, STOP_S = 8.0, 9.0, 4.5, 0.4
LOAD = Profile(
    "golden", clients=2, prompt=Length(60, 0.6, 16, 400), output=Length(16, 0.4, 6, 30),
    duration_s=120.0, context=1024, seed=5,
)  # fmt: skip
SHAPE = Shape(layers=12, hidden=768, intermediate=2304, heads=12, kv_heads=6)


def record(server: Server, file: Path) -> Capture:
    """With ``stopped_ns`` in its ``meta``: when the stop began."""
    identity = read_process(server.pid).identity
    command = [sys.executable, "-m", "latencyprism", "record", "-p", str(server.pid), "-o", str(file)]
    with Load(server, LOAD):
        time.sleep(CALM_S)
        recording = subprocess.Popen([*command, "-d", f"{RECORD_S}s"], stdout=subprocess.DEVNULL)
        while holder_of(identity) is None and recording.poll() is None:
            time.sleep(0.05)
        time.sleep(BEFORE_S)
        stopped_ns = time.monotonic_ns()
        os.kill(server.pid, signal.SIGSTOP)
        try:
            time.sleep(STOP_S)
        finally:
            os.kill(server.pid, signal.SIGCONT)
        if recording.wait(90) != 0:
            raise SystemExit("it could not be recorded")
    capture = read_capture(file)
    capture.meta["stopped_ns"] = stopped_ns
    return capture


def main() -> int:
    if len(sys.argv) != 3 or sys.argv[1] not in ENGINES:
        print(f"usage: golden_record.py {'|'.join(ENGINES)} FILE", file=sys.stderr)
        return 2
    engine = next(name for name in ENGINES if name == sys.argv[1])
    with (
        tempfile.TemporaryDirectory() as folder,
        start(engine, Options(slots=4, context=1024), shape=SHAPE) as server,
    ):
        write_capture(sys.argv[2], record(server, Path(folder) / "raw.pftrace"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
