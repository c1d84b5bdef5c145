"""Operators of a replica's workers for the window of a capture; a thread arms, copies and disarms."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Mapping, Sequence

from latencyprism.agent.operators import Build, OperatorProbe, OperatorRecords, recognise
from latencyprism.attach.inject import Injector
from latencyprism.errors import PrismError
from latencyprism.records import Span, Step
from latencyprism.timeline.operators import operator_spans

COPY_S = 0.02


class OperatorDives:
    """One a replica: what arming needs and takes long to find out is found out beforehand, in a thread.

    ``roles``: of each process (pid to role). Where there are workers the loop's own process is left alone."""

    def __init__(self, roles: Mapping[int, str]) -> None:
        workers = [pid for pid, role in roles.items() if role.lower().startswith("worker")]
        self.roles = dict(roles)
        self.pids = workers or [pid for pid, role in roles.items() if role != "API server"]
        self.ready: dict[int, tuple[Injector, Build]] = {}
        self.missing: list[str] = []
        self.busy = threading.Lock()
        self._thread = threading.Thread(target=self._prepare, name="operators", daemon=True)
        self._thread.start()

    def _prepare(self) -> None:
        for pid in self.pids:
            try:
                build = recognise(pid)
                self.ready[pid] = (Injector(pid), build)
            except (PrismError, OSError) as error:
                self.missing.append(f"operators: {getattr(error, 'why', '') or error}")

    def wait_ready(self) -> None:
        self._thread.join(5.0)

    def begin(self, seconds: float) -> OperatorDive:
        return OperatorDive(self, seconds)


class OperatorDive:
    """Begins at once, in a thread of its own. ``finish``, then ``spans`` and ``missing``."""

    def __init__(self, dives: OperatorDives, seconds: float) -> None:
        self._dives = dives
        self.begun_ns = time.monotonic_ns()
        self._until_ns = self.begun_ns + int(seconds * 1e9)
        self._stop = threading.Event()
        self.armed_ms: dict[int, float] = {}
        self.records: list[OperatorRecords] = []
        self.missing: list[str] = []
        self._thread = threading.Thread(target=self._run, name="operators", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        dives = self._dives
        dives.wait_ready()
        self.missing += dives.missing
        if not dives.busy.acquire(blocking=False):
            self.missing.append("operators: another capture has them")
            return
        probes: list[OperatorProbe] = []
        try:
            for pid, (injector, build) in dives.ready.items():
                left = (self._until_ns - time.monotonic_ns()) / 1e9
                try:
                    probe = OperatorProbe(injector, build, max(left, 0.0))
                except (PrismError, OSError) as error:
                    self.missing.append(f"operators: {getattr(error, 'why', '') or error}")
                    continue
                self.armed_ms[pid] = (probe.armed_ns - self.begun_ns) / 1e6
                probes.append(probe)
            while probes and time.monotonic_ns() < self._until_ns and not self._stop.wait(COPY_S):
                for probe in probes:
                    probe.drain()
        finally:
            for probe in probes:
                with contextlib.suppress(OSError):
                    probe.close()
                self.records.append(probe.records)
            dives.busy.release()

    def finish(self) -> None:
        """Disarm and have the last records. Harmless twice; takes milliseconds."""
        self._stop.set()
        self._thread.join(2.0)
        for seen in self.records:
            if seen.lost:
                self.missing.append(f"{seen.lost} records of operators were lost")
            if seen.limited:
                self.missing.append("operators: the limit of records was reached before the end")

    def spans(self, steps: Sequence[Step]) -> list[Span]:
        """What was seen, with names and steps. Takes seconds: for the process that writes."""
        found: list[Span] = []
        for seen in self.records:
            role = self._dives.roles.get(seen.pid, "process")
            found += operator_spans(seen, f"{role} {seen.pid}", steps)
        return found
