"""Nothing that was started outlives its starter."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from latencyprism.lab.models import INSIDE

# An engine with a child that ignores SIGTERM and sits in a session of its own, as worker processes do.
ENGINE = """
import os, signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import signal, time;"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"],
    start_new_session=True, stdout=subprocess.PIPE)
child.stdout.readline()
open(sys.argv[1], "w").write(str(child.pid))
mode = sys.argv[2]
if mode == "stubborn": signal.signal(signal.SIGTERM, signal.SIG_IGN)
if mode == "crash": os._exit(3)
time.sleep(60)
"""


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def await_number(path: Path) -> int:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if path.exists() and path.read_text():
            return int(path.read_text())
        time.sleep(0.02)
    raise AssertionError(f"nothing in {path}")


@pytest.mark.parametrize("mode", ["obedient", "stubborn", "crash"])
def test_engine_and_its_children_end(tmp_path: Path, mode: str) -> None:
    note = tmp_path / "child"
    guard = subprocess.Popen(
        [
            sys.executable,
            "-I",
            "-S",
            str(INSIDE / "guard.py"),
            "0.5",
            sys.executable,
            "-c",
            ENGINE,
            str(note),
            mode,
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert guard.stdin is not None
    assert guard.stdout is not None
    engine = int(guard.stdout.readline())
    child = await_number(note)
    if mode != "crash":
        assert running(engine)
        assert running(child)
        guard.stdin.close()  # as it closes when the starter dies
    assert guard.wait(10) == 0
    assert not running(engine)
    assert not running(child)
    guard.stdout.close()
    guard.stdin.close()


def test_killed_guard_takes_the_engine_with_it() -> None:
    guard = subprocess.Popen(
        [sys.executable, "-I", "-S", str(INSIDE / "guard.py"), "5", "sleep", "60"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert guard.stdin is not None
    assert guard.stdout is not None
    engine = int(guard.stdout.readline())
    guard.kill()
    guard.wait()
    deadline = time.monotonic() + 5
    while running(engine) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not running(engine)
    guard.stdin.close()
    guard.stdout.close()
