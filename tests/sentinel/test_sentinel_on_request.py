"""Captures on request of a watch, its live history in SQL, and what it leaves when it is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from latencyprism.recorder import read_capture


class Watch:
    """A watch of its own process; ``until`` reads its lines."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "latencyprism", "watch", "--json", "--no-state", *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def until(self, event: str, **wanted: Any) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            told: dict[str, Any] = json.loads(line)
            if told["event"] == event and all(told[name] == value for name, value in wanted.items()):
                return told
        raise AssertionError(f"the watch ended without {event}")

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


@pytest.mark.root
def test_asked_for_asked_in_sql_killed_and_salvaged(engine: int, tmp_path: Path) -> None:
    captures = tmp_path / "captures"
    first = Watch("-p", str(engine), "-o", str(captures), "--no-deep", "--listen", "0")
    try:
        first.until("attached")
        url = first.until("listening")["url"]
        time.sleep(2)
        os.kill(first.process.pid, signal.SIGUSR1)
        asked = first.until("asked")
        assert asked["kind"] == "signal" and asked["capture"] and asked["refused"] is None
        request = urllib.request.Request(url, b'{"reason": "while it captures"}', method="POST")
        with urllib.request.urlopen(request, timeout=10) as answer:
            assert answer.status == 202
        assert "under way" in first.until("asked", kind="http")["refused"]
        first.until("capture", path=asked["capture"])
        whole = read_capture(asked["capture"])
        assert whole.steps and whole.meta["trigger"]["kind"] == "signal" and not whole.notices
        newest = asked_in_sql(engine) if find_spec("chdb") else whole.steps[-1].step
        assert newest >= whole.steps[-1].step
        time.sleep(0.3)
        killed_ns = time.monotonic_ns()
        first.end()
        time.sleep(4)  # the lease of the probe that it left
        second = Watch("-p", str(engine), "-o", str(captures), "--no-deep", "-d", "60s")
        try:
            salvaged = second.until("salvaged")
        finally:
            second.end()
    finally:
        first.end()
    back = read_capture(salvaged["path"])
    numbers = [step.step for step in back.steps]
    assert numbers == list(range(numbers[0], numbers[-1] + 1)) and numbers[-1] >= newest
    assert killed_ns - back.steps[-1].end_ns < 3_000_000_000 and back.counters


def asked_in_sql(engine: int) -> int:
    """The newest step on the tape of its watch."""
    command = [sys.executable, "-m", "latencyprism", "query", "--json", "-p", str(engine)]
    sql = "select count() as n, max(step) as newest from steps"
    live = subprocess.run([*command, sql], capture_output=True, check=True)
    (row,) = json.loads(live.stdout)["data"]
    assert row["n"] > 10
    return int(row["newest"])
