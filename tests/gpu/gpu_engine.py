"""Starts the engine and the co-tenant of these tests, and collects the engine's steps in a thread."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from latencyprism.detect.detector import Detector
from latencyprism.engines.discovery import discover
from latencyprism.records import Step
from latencyprism.timeline.python_source import PythonSource

HERE = Path(__file__).parent


class Child:
    """A script of this folder that is spoken to in lines. ``said``: every line it sent, as read."""

    def __init__(self, script: str, *arguments: str, log: Path, python: str = sys.executable) -> None:
        self._log = log.open("wb")
        self.process = subprocess.Popen(
            [python, str(HERE / script), *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, bufsize=1,
        )  # fmt: skip
        self.pid = self.process.pid
        self.said: list[dict[str, Any]] = []
        self._lines: queue.Queue[dict[str, Any]] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith("{"):
                value = json.loads(line)
                self.said.append(value)
                self._lines.put(value)

    def wait_for(self, event: str, timeout_s: float) -> dict[str, Any]:
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            try:
                line = self._lines.get(timeout=0.2)
            except queue.Empty:
                if self.process.poll() is not None and self._lines.empty():
                    raise RuntimeError(f"it ended with {self.process.returncode}: {self.tail()}") from None
                continue
            if line["event"] == event:
                return line
        raise RuntimeError(f"no {event} within {timeout_s} s: {self.tail()}")

    def order(self, text: str, event: str | None = None, timeout_s: float = 30.0) -> dict[str, Any]:
        assert self.process.stdin
        self.process.stdin.write(text + "\n")
        return self.wait_for(event or text, timeout_s)

    def tail(self) -> str:
        self._log.flush()
        return Path(self._log.name).read_text("utf-8", "replace")[-1500:]

    def close(self) -> None:
        if self.process.poll() is None:
            assert self.process.stdin
            self.process.stdin.close()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._log.close()


class Collector:
    """Polls the probe of ``pid``'s engine in a thread and runs a detector over its steps.

    ``firings``: (when it was known, the step's end, level, kind, excess), times CLOCK_MONOTONIC ns."""

    def __init__(self, pid: int) -> None:
        self.replica = discover(pid)[0]
        begun = time.monotonic()
        self.source = PythonSource(self.replica)
        self.attach_ms = (time.monotonic() - begun) * 1e3
        self.steps: list[Step] = []
        self.firings: list[tuple[int, int, str, str, float]] = []
        self.detector = Detector()
        self.error: str | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._collect, daemon=True)
        self._thread.start()

    def _collect(self) -> None:
        try:
            renewed = 0.0
            while not self._stop.is_set():
                now = time.monotonic()
                if now - renewed > 0.5:
                    self.source.renew()
                    renewed = now
                    gone = self.source.detached()
                    if gone is not None:
                        said = [health["message"] for health in self.source.health().values()]
                        self.error = f"the probe is gone ({gone}): {'; '.join(map(str, said))}"
                        return
                self._take()
                time.sleep(0.001)
            self._take()
        except Exception as error:  # noqa: BLE001  told in the result
            self.error = repr(error)

    def _take(self) -> None:
        for step in self.source.poll().steps:
            self.steps.append(step)
            fired = self.detector.observe(step)
            if fired is not None:
                told = (time.monotonic_ns(), step.end_ns, fired.level, fired.kind, fired.excess)
                self.firings.append(told)

    def between(self, start_ns: int, end_ns: int) -> list[Step]:
        """Steps that lie within."""
        return [step for step in list(self.steps) if step.start_ns >= start_ns and step.end_ns <= end_ns]

    def close(self) -> None:
        self._stop.set()
        self._thread.join(5)
        self.source.close()


def quantile(values: list[float], share: float) -> float | None:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None


def step_times(steps: list[Step]) -> dict[str, Any]:
    """p50, p90, p99 and largest duration in ms of the decode steps, and how many there were."""
    times = [step.duration_ms for step in steps if step.phase == "decode"]
    return {
        "decode_steps": len(times),
        "steps": len(steps),
        "p50_ms": quantile(times, 0.5),
        "p90_ms": quantile(times, 0.9),
        "p99_ms": quantile(times, 0.99),
        "max_ms": max(times, default=None),
        "max_any_ms": max((step.duration_ms for step in steps), default=None),
    }
