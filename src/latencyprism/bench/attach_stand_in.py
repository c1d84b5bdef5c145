"""The stand-in for an engine (``attach_target``) as the benchmark of attaching sees it: started, timed,
ended."""

from __future__ import annotations

import bisect
import json
import mmap
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from latencyprism.bench import attach_target
from latencyprism.bench.attach_target import (
    LOOP_COUNT,
    LOOP_END,
    LOOP_IDLE,
    LOOP_STAMPS,
    LOOP_WRONG,
    STAMPS,
)
from latencyprism.errors import PrismError
from latencyprism.lab.models import INSIDE

_START_S, _END_S = 20.0, 15.0
OWNERS = (("vllm.v1.core.sched.scheduler", "Scheduler"), ("vllm.v1.worker.gpu_worker", "Worker"))


class StandIn:
    """A running stand-in on the interpreter ``python``. Not a child of this process: one is traced by a
    helper, which is not what is to be measured. Raises PrismError when it does not start."""

    def __init__(self, python: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="latencyprism-attach-")
        folder = Path(self._folder.name)
        with open(folder / "loop", "w+b") as file:
            file.truncate(8 * (LOOP_STAMPS + STAMPS))
            self._words = memoryview(mmap.mmap(file.fileno(), 0)).cast("q")
        os.mkfifo(folder / "wake")
        self._wake = os.open(folder / "wake", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(folder / "log", "wb") as log:
            self._guard = subprocess.Popen(
                [
                    sys.executable,
                    "-I",
                    "-S",
                    str(INSIDE / "guard.py"),
                    "1",
                    python,
                    attach_target.__file__,
                    str(folder),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        assert self._guard.stdout is not None
        first = self._guard.stdout.readline().strip()
        if not first.isdigit():
            self.close()
            raise PrismError("the target did not start", f"{python} cannot be run")
        self.pid = int(first)
        try:
            self._await_work()
        except BaseException:
            self.close()
            raise

    def _await_work(self) -> None:
        until = time.monotonic() + _START_S
        while self.iterations < 50:
            if not self.running() or time.monotonic() > until:
                raise PrismError("the target did not start", self.said() or "it does not get on")
            time.sleep(0.02)

    @property
    def iterations(self) -> int:
        """Turns of its loop so far."""
        return self._words[LOOP_COUNT]

    @property
    def wrong(self) -> int:
        """Wrong results of its main thread so far."""
        return self._words[LOOP_WRONG]

    def rest(self, idle: bool) -> None:
        """Make it wait for ``turn`` before each iteration, or let it run again."""
        self._words[LOOP_IDLE] = int(idle)
        if not idle:
            self.turn()

    def turn(self) -> None:
        """Let a resting target do one iteration."""
        os.write(self._wake, b"\0")

    def running(self) -> bool:
        try:
            state = Path(f"/proc/{self.pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()[0]
        except OSError:
            return False
        return state not in "ZX"

    def gets_on(self, limit_s: float = 30.0) -> bool:
        """True when its loop turns within the limit; False for one that hangs or is gone."""
        seen, until = self.iterations, time.monotonic() + limit_s
        if self._words[LOOP_IDLE]:
            self.turn()
        while self.iterations == seen:
            if not self.running() or time.monotonic() > until:
                return False
            time.sleep(0.0005)
        return True

    def gaps_ns(self, windows: list[tuple[int, int]]) -> list[int]:
        """Times between ends of iterations, of those that began within one of the windows (CLOCK_MONOTONIC
        ns)."""
        count = self.iterations
        kept = range(max(0, count - STAMPS + 1), count)
        stamps = [self._words[LOOP_STAMPS + index % STAMPS] for index in kept]
        found, at = [], 0
        for start, end in sorted(windows):
            at = bisect.bisect_left(stamps, start, at)
            while at + 1 < len(stamps) and stamps[at] < end:
                found.append(stamps[at + 1] - stamps[at])
                at += 1
        return found

    def said(self) -> str:
        """The end of what it wrote to standard error."""
        return (Path(self._folder.name) / "log").read_text("utf-8", "replace")[-300:].strip()

    def finish(self) -> dict[str, Any] | None:
        """End it in good order; what it tells of its own results, None when it tells nothing."""
        self._words[LOOP_END] = 1
        self.turn()
        until = time.monotonic() + _END_S
        while self.running() and time.monotonic() < until:
            time.sleep(0.02)
        path = Path(self._folder.name) / "result.json"
        try:
            told = json.loads(path.read_text())
        except (OSError, ValueError):
            return None
        return told if isinstance(told, dict) else None

    def close(self) -> None:
        """End it in any case. Harmless twice."""
        if self._guard.stdin and not self._guard.stdin.closed:
            self._guard.stdin.close()
        try:
            self._guard.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._guard.kill()
            self._guard.wait()
        if self._guard.stdout:
            self._guard.stdout.close()
        if self._wake >= 0:
            os.close(self._wake)
            self._wake = -1
            self._folder.cleanup()

    def __enter__(self) -> StandIn:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
