"""What a killed watcher had on tape becomes a capture: at the next watch, or when asked for."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latencyprism.errors import BadInput, PrismError
from latencyprism.recorder import Capture, read_capture
from latencyprism.recorder.deferred import CaptureJob
from latencyprism.recorder.leftovers import Leftover, leftovers
from latencyprism.recorder.tape import tape_folder
from latencyprism.recorder.tape_reading import HeldTape, TapeFile, read_tape, tapes_in
from latencyprism.sentinel.attendant import Attendant, Raised
from latencyprism.sentinel.flight_tape import capture_of
from latencyprism.sentinel.incident_capture import FINISH
from latencyprism.sentinel.replica_watch import ReplicaWatch

STALE_S = 86_400.0
"""A tape that nobody wanted for so long is removed."""


def recovered(path: Path) -> Capture:
    """The capture that the tape of a killed watcher makes. BadInput where nothing was recorded."""
    taped = read_tape(path)
    if not (taped.steps or taped.spans or taped.counters):
        raise BadInput(f"nothing to recover from {path}", "its watcher was killed before the first record")
    capture = capture_of(taped)
    last_ns = capture.steps[-1].end_ns if capture.steps else None
    capture.meta["recovered"] = {"until_ns": last_ns, "left_out": list(taped.notices)}
    missing = capture.meta.get("not_available")
    told = missing if isinstance(missing, list) else []
    capture.meta["not_available"] = [*told, "anything after its watcher was killed"]
    return capture


def wanted(file: TapeFile, engines: Sequence[str], pids: Sequence[int]) -> bool:
    """Of a process that is watched again, or of an engine of the same kind that has ended since."""
    return file.pid in pids or (file.engine in engines and not file.engine_runs)


def sweep(files: Sequence[TapeFile]) -> int:
    """Removes dead tapes that nobody came for in a day; how many."""
    gone = 0
    for file in files:
        try:
            old = time.time() - file.path.stat().st_mtime > STALE_S
        except OSError:
            continue
        held = HeldTape.take(file.path) if old else None
        if held is not None:
            held.close(remove=True)
            gone += 1
    return gone


@dataclass
class _Job:
    job: CaptureJob
    engine: str
    pid: int | None
    done: Callable[[bool], None]
    """With whether it was written."""


class Recovery(Attendant):
    """Once after an attach: tapes of watchers that were killed while they watched this engine, and raw files
    that they left in the folder of captures. Event ``salvaged``."""

    name = "recovery"
    prompt = False

    def __init__(self, captures: Path | None) -> None:
        super().__init__()
        self._folder = captures
        self._engines: list[str] = []
        self._pids: list[int] = []
        self._look = False
        self._jobs: list[_Job] = []

    def attached(self, watch: ReplicaWatch) -> None:
        self._engines.append(re.sub(r"[^\w.-]", "_", watch.replica.engine)[:40])
        self._pids += watch.replica.pids
        self._look = True

    def tick(self, now_ns: int) -> Sequence[Raised]:
        if self._look:
            self._look = False
            self._search()
        for job in list(self._jobs):
            if job.job.poll() is not None:
                self._finish(job)
        return ()

    def _search(self) -> None:
        try:
            files = tapes_in(tape_folder())
        except PrismError:
            return  # no folder that could be used: there are no tapes of ours
        dead = [file for file in files if wanted(file, self._engines, self._pids) and not file.live]
        if self._folder is None:
            if dead:
                self.say(f"{len(dead)} tapes of killed watchers are kept: latencyprism record --recover")
        else:
            for file in dead:
                self._begin(file)
            for left in leftovers(self._folder):
                self._finish_raw(left)
        sweep(files)

    def _begin(self, file: TapeFile) -> None:
        held = HeldTape.take(file.path)
        if held is None or self._folder is None:
            return
        out = self._folder / f"recovered-{file.pid}-{secrets.token_hex(4)}.pftrace"
        job = CaptureJob(out, lambda: recovered(file.path), finish=FINISH)
        # Where the disk was full the tape is kept for another try.
        self._jobs.append(_Job(job, file.engine, file.pid, lambda ok: held.close(remove=ok)))

    def _finish_raw(self, left: Leftover) -> None:
        def done(written: bool) -> None:
            for path in left.rest if written else ():
                path.unlink(missing_ok=True)

        job = CaptureJob(left.out, lambda: _from_raw(left.raw), finish=FINISH)
        self._jobs.append(_Job(job, "", None, done))

    def _finish(self, job: _Job) -> None:
        self._jobs.remove(job)
        result: dict[str, Any] = job.job.result or {"path": None, "error": "it was not written in time"}
        empty = any(text in str(result.get("error")) for text in ("nothing to recover", "it is no tape"))
        job.done(result.get("path") is not None or empty)
        if empty:
            return
        told = {name: value for name, value in result.items() if name not in ("event", "verdict")}
        self.emit("salvaged", engine=job.engine or None, pid=job.pid, **told)
        where = result.get("path") or result.get("error")
        self.say(f"recovered from a watcher that was killed: {where}")

    def close(self) -> None:
        for job in list(self._jobs):
            if job.job.wait(20.0) is None:
                job.job.close()
            self._finish(job)


def _from_raw(path: Path) -> Capture:
    capture = read_capture(path)
    capture.meta["recovered"] = {"left_out": list(capture.notices)}
    return capture
