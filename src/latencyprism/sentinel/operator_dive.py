"""Operators of a replica's workers for the window of a capture; a thread arms, copies and disarms."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from latencyprism.agent.operator_build import Build, recognise
from latencyprism.agent.operator_ring import OperatorRecords, TscClock
from latencyprism.agent.operators import OperatorProbe
from latencyprism.agent.record_spool import RecordSpool
from latencyprism.attach.inject import Injector
from latencyprism.engines.discovery import executing
from latencyprism.errors import PrismError, TargetBusy, reason_of
from latencyprism.sentinel.priority import on_time, start_alike

COPY_S = 0.1
"""The ring holds more than two seconds of operators; each turn costs the same whatever it finds."""
ARMING_SWITCH_S = 0.0002
"""Arming makes many calls that give the interpreter's lock away, and beside a thread that computes each waits
as long as this to have it back; the usual 5 ms add up to tenths of a second."""
READY_S, ENDING_S = 5.0, 2.0


class OperatorDives:
    """One a replica: what arming needs and takes long to find out is found out beforehand, in a thread.

    ``roles``: of each process (pid to role). Where there are workers the loop's own process is left alone.
    ``realtime``: arm and copy on time beside engines that spin; each such turn takes milliseconds."""

    def __init__(self, roles: Mapping[int, str], *, realtime: bool = True) -> None:
        self.roles = dict(roles)
        self.pids = executing(roles)
        self.realtime = realtime
        self.ready: dict[int, tuple[Injector, Build, TscClock]] = {}
        self.missing: list[str] = []
        self.busy = threading.Lock()
        self._thread = threading.Thread(target=self._prepare, name="operators", daemon=True)
        self._thread.start()

    def _prepare(self) -> None:
        for pid in self.pids:
            try:
                build = recognise(pid)
                self.ready[pid] = (Injector(pid), build, TscClock())
            except (PrismError, OSError) as error:
                self.missing.append(f"operators: {reason_of(error)}")

    def wait_ready(self, seconds: float = READY_S) -> bool:
        """False where finding out takes longer still."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def begin(self, seconds: float, folder: Path | None = None) -> OperatorDive:
        """``folder``: records are kept in a file there, which has no name; else in memory."""
        return OperatorDive(self, seconds, folder)


class OperatorDive:
    """Begins at once, in a thread of its own. ``finish``, then ``records`` and ``missing``."""

    def __init__(self, dives: OperatorDives, seconds: float, folder: Path | None = None) -> None:
        self._dives = dives
        self._folder = folder
        self._spools: list[RecordSpool] = []
        self.begun_ns = time.monotonic_ns()
        self._until_ns = self.begun_ns + int(seconds * 1e9)
        self._stop = threading.Event()
        self._finished = False
        self.armed_ms: dict[int, float] = {}
        """By process, from the beginning until its operators were recorded."""
        self.records: list[tuple[str, OperatorRecords]] = []
        """By the name of the process, once finished."""
        self.missing: list[str] = []
        self._thread = threading.Thread(target=self._run, name="operators", daemon=True)
        start_alike(self._thread)

    def _run(self) -> None:
        dives = self._dives
        if dives.realtime:
            on_time()
        if not dives.wait_ready(READY_S):
            self.missing.append("operators: what arming them needs was not found out in time")
        self.missing += dives.missing
        if not dives.busy.acquire(blocking=False):
            self.missing.append("operators: another capture has them")
            return
        try:
            # A thread for each: one that is long in coming must not keep the others waiting.
            pids = list(dives.ready)
            threads = [threading.Thread(target=self._serve, args=(pid,), daemon=True) for pid in pids[1:]]
            for thread in threads:
                start_alike(thread)
            for pid in pids[:1]:
                self._serve(pid)
            for thread in threads:
                thread.join()
        finally:
            dives.busy.release()

    def _serve(self, pid: int) -> None:
        """One process: arm, copy, disarm."""
        if self._dives.realtime:
            on_time()
        probe = self._armed(pid)
        if probe is None:
            return
        self.armed_ms[pid] = (probe.armed_ns - self.begun_ns) / 1e6
        try:
            while time.monotonic_ns() < self._until_ns and not self._stop.wait(COPY_S):
                probe.drain()
        finally:
            with contextlib.suppress(OSError):
                probe.close()
            role = self._dives.roles.get(pid, "process")
            self.records.append((f"{role} {pid}", probe.records))

    def _armed(self, pid: int) -> OperatorProbe | None:
        """Asks again while the process is busy; None where it refuses or time is over, which is told."""
        injector, build, clock = self._dives.ready[pid]
        spool = self._spool()
        why = "operators: the window was over before they were armed"
        while (left_s := (self._until_ns - time.monotonic_ns()) / 1e9) > 0 and not self._stop.is_set():
            try:
                with _FAST:
                    return OperatorProbe(injector, build, left_s, clock=clock, spool=spool)
            except (PrismError, OSError) as error:
                why = f"operators: {reason_of(error)}"
                if not isinstance(error, TargetBusy):
                    break
            self._stop.wait(COPY_S)
        self.missing.append(why)
        return None

    def _spool(self) -> RecordSpool | None:
        if self._folder is None:
            return None
        try:
            self._spools.append(RecordSpool(self._folder))
        except OSError:
            return None  # then in memory
        return self._spools[-1]

    @property
    def kept_in(self) -> list[int]:
        """Descriptors that whoever reads ``records`` needs."""
        return [spool.fd for spool in self._spools]

    def forget(self) -> None:
        """Give the records up, once a copy of this process has them."""
        self.records.clear()
        while self._spools:
            self._spools.pop().close()

    def end(self) -> bool:
        """Ask it to disarm and have the last records, and wait for nothing; True: it has."""
        self._stop.set()
        return not self._thread.is_alive()

    def finish(self, within_s: float = ENDING_S) -> None:
        """Disarm and have the last records; waits for that. Harmless twice."""
        if self._finished:
            return
        self._finished = True
        self._stop.set()
        self._thread.join(within_s)
        if self._thread.is_alive():
            self.missing.append("operators: their copying did not come to its end")
            return
        for process, seen in self.records:
            if seen.lost:
                why = f": {seen.refused}" if seen.refused else ""
                self.missing.append(f"operators: {seen.lost} records of {process} were lost{why}")
            if seen.limited:
                self.missing.append(f"operators: {process} reached the limit of records before the end")
            if seen.lapsed:
                self.missing.append(f"operators: those of {process} end early, the lease was not renewed")


class _SwitchingFast:
    """While any thread is inside."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._usual = 0.0

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._usual = sys.getswitchinterval()
                sys.setswitchinterval(ARMING_SWITCH_S)
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                sys.setswitchinterval(self._usual)


_FAST = _SwitchingFast()
