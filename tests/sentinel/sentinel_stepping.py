"""A stand-in for an engine's source, and a watch of this process with it: no probe, no engine.

Run as a program it watches itself, begins a capture, and goes on until it is killed:
``python sentinel_stepping.py FOLDER SECONDS_BEFORE_CAPTURE AFTER_S``.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from latencyprism.attach.process import read_process
from latencyprism.engines.discovery import Member, Replica
from latencyprism.records import Alert, Counter, Step, Window
from latencyprism.sentinel.incident_capture import IncidentCapture
from latencyprism.sentinel.replica_watch import ReplicaWatch, utc
from latencyprism.sentinel.targets import Attachment

STEP_NS = 10_000_000


class Stepping:
    """Makes a step each 10 ms of the clock, numbered from 1."""

    engine, lost = "vllm", 0

    def __init__(self) -> None:
        self.pids = (os.getpid(),)
        self._at_ns = time.monotonic_ns()
        self._number = 0

    def fileno(self) -> None:
        return None

    def poll(self) -> Window:
        now_ns, steps = time.monotonic_ns(), []
        while self._at_ns + STEP_NS <= now_ns:
            self._number += 1
            step = Step(
                "vllm", 0, 0, self._number, self._at_ns, self._at_ns + STEP_NS - 50_000, "decode",
                requests=4, decode_requests=4, decode_tokens=4, context_tokens=400, running=4, waiting=0,
            )  # fmt: skip
            steps.append(step)
            self._at_ns += STEP_NS
        return Window(steps)

    def settle(self) -> bool:
        return True

    def wake_beyond(self, usual: object) -> None: ...

    def wake_late(self, typical_1024: int, spare_ns: int) -> bool:
        return False

    def renew(self) -> None: ...

    def arm_deep(self, seconds: float) -> None: ...

    def detached(self) -> None:
        return None

    def notices(self) -> list[str]:
        return []

    def close(self) -> None: ...


def watch_of_this_process(engine: str = "vllm", number: int = 0) -> ReplicaWatch:
    replica = Replica(engine, number, (Member(read_process(os.getpid()), "engine"),), "0.0")
    return ReplicaWatch(Attachment(replica, Stepping(), [], None))


def alert_of(step: Step, identity: str = "5e8b3c1d") -> Alert:
    return Alert(
        id=identity, kind="shift", level="page", engine="vllm", replica=0, rank=0, step=step.step,
        onset_step=step.step, time=utc(step.end_ns), observed_ms=10.0, expected_ms=5.0, excess=1.0,
    )  # fmt: skip


def main(folder: Path, before_s: float, after_s: float) -> None:
    watch = watch_of_this_process()
    print("watching", flush=True)
    begun = time.monotonic()
    capture: IncidentCapture | None = None
    while True:
        time.sleep(0.01)
        watch.poll()
        now_ns = time.monotonic_ns()
        watch.recorder.add_counter(Counter(("machine",), "load", now_ns, 1.0))
        watch.tape.refresh(now_ns)
        if capture is None and time.monotonic() - begun > before_s and watch.last_step is not None:
            alert = alert_of(watch.last_step)
            watch.onset_ns = watch.last_step.start_ns
            watch.tape.alert(alert, now_ns)
            capture = IncidentCapture(
                watch, alert, folder / f"{alert.id}.pftrace", after_s=after_s, deep=False
            )
            print("capturing", flush=True)
        if capture is not None:
            was_open = capture.open
            capture.step(now_ns)
            if was_open and not capture.open:
                print("writing", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]))
