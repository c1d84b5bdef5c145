"""The tape of one replica under watch: made at attach, fed by its flight recorder, gone when it ends."""

from __future__ import annotations

import os
import re
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from latencyprism.bpf.waits import INTERVAL_DTYPE, Intervals
from latencyprism.errors import PrismError
from latencyprism.host.processes import thread_name
from latencyprism.recorder.capture import Capture
from latencyprism.recorder.tape import Tape, tape_folder
from latencyprism.recorder.tape_reading import Taped
from latencyprism.records import Alert
from latencyprism.sentinel.below_watch import LEAST_SPAN_NS, socket_inodes
from latencyprism.sentinel.provenance import describe_watch
from latencyprism.timeline.attribution import machine_spans, to_spans
from latencyprism.timeline.clocks import Timeline, read_machine_clocks

if TYPE_CHECKING:
    from latencyprism.sentinel.replica_watch import ReplicaWatch

META_PERIOD_NS = 5_000_000_000


class FlightTape:
    """Hangs itself into the watch's recorder. ``missing``: why there is no tape, in words; None: there is."""

    def __init__(self, watch: ReplicaWatch) -> None:
        self._watch = watch
        self._tape: Tape | None = None
        self._meta_at_ns = 0
        self.missing: str | None = None
        engine = watch.replica
        process = next(m.process for m in engine.members if m.process.pid == engine.engine_pid)
        name = re.sub(r"[^\w.-]", "_", engine.engine)[:40]
        try:
            self._tape = Tape(tape_folder(), f"{name}-{process.identity.pid}-{process.identity.start_ticks}")
        except PrismError as error:
            self.missing = f"flight recorder in shared memory: {error.what}: {error.why}"
            return
        watch.recorder.tape = self._tape
        if watch.below is not None:
            watch.below.on_taken = self._waits
        self.refresh(time.monotonic_ns())

    def refresh(self, now_ns: int) -> None:
        """Call now and again: what says whose records these are is kept up to date."""
        if self._tape is not None and now_ns >= self._meta_at_ns:
            self._meta_at_ns = now_ns + META_PERIOD_NS
            self._tape.write_meta(describe(self._watch))

    def alert(self, alert: Alert, now_ns: int) -> None:
        if self._tape is not None:
            self._tape.add_alert(alert, self._watch.onset_of(alert), now_ns)

    def _waits(self, rows: Intervals) -> None:
        if self._tape is not None:
            packed = np.ascontiguousarray(rows)
            self._tape.add_waits(memoryview(packed.tobytes()), packed.dtype.itemsize)

    def close(self) -> None:
        """The watch ends in order: there is nothing to recover."""
        if self._tape is not None:
            self._watch.recorder.tape = None
            self._tape.close()
            self._tape = None


def describe(watch: ReplicaWatch) -> dict[str, Any]:
    """``meta`` of a capture made from the tape, and what its waits need to become spans."""
    clocks = Timeline("monotonic")
    read_machine_clocks(clocks)
    below = watch.below
    critical = sorted(below.critical) if below is not None else []
    return {
        **describe_watch(watch, clocks),
        "watcher": os.getpid(),
        "wait_threads": {str(tid): thread_name(tid) for tid in critical},
        "wait_sockets": sorted(socket_inodes(below.probe.pids))[:2000] if below is not None else [],
    }


def capture_of(taped: Taped) -> Capture:
    """What a tape holds as a capture, waits of the critical threads among its spans."""
    capture = taped.capture()
    meta = capture.meta
    threads, sockets = meta.pop("wait_threads", None), meta.pop("wait_sockets", None)
    names = _numbers(threads if isinstance(threads, dict) else {})
    rows = [row for row in taped.waits if len(row) % INTERVAL_DTYPE.itemsize == 0]
    found = np.frombuffer(b"".join(rows), dtype=INTERVAL_DTYPE)
    if len(found):
        oldest_ns = min((step.start_ns for step in capture.steps), default=0)
        found = found[found["end_ns"] >= max(oldest_ns, 0)]
        chosen = found[np.isin(found["tid"], list(names))]
        inodes = (
            frozenset(n for n in sockets if isinstance(n, int)) if isinstance(sockets, list) else frozenset()
        )
        capture.spans = [
            *capture.spans,
            *to_spans(chosen, names, LEAST_SPAN_NS),
            *machine_spans(found, inodes),
        ]
    return capture


def _numbers(told: dict[Any, Any]) -> dict[int, str]:
    return {int(tid): str(name) for tid, name in told.items() if str(tid).isdigit()}
