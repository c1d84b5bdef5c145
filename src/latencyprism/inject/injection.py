"""Injection: a disturbance under way, and afterwards the truth about it."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from latencyprism.errors import PrismError

_INSIDE = Path(__file__).parent / "inside"
_READY_S = 5.0
_END_S = 5.0


class Interval(NamedTuple):
    """When the target was truly disturbed (CLOCK_MONOTONIC), and how."""

    start_ns: int
    end_ns: int
    detail: str


@dataclass(frozen=True, slots=True)
class Effect:
    """Whether the injection did what it was asked to: a diagnosis must not be judged by one that did not.
    ``measured`` and ``asked`` are in ``unit``."""

    effective: bool
    measured: float
    asked: float
    unit: str
    text: str


Report = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Plan:
    """What one cause starts and how its reports are read. ``script`` is a file in ``inside``; one process per
    entry of ``specs``. ``effect`` is told how many seconds it ran. ``undo`` runs in the injector
    after all of them have ended."""

    script: str
    specs: Sequence[dict[str, Any]]
    intervals: Callable[[Sequence[Report]], list[Interval]]
    effect: Callable[[Sequence[Report], float], Effect]
    pass_fds: tuple[int, ...] = ()
    undo: Callable[[], None] | None = None


class _Helper:
    """One process of an injection; reads its reports as they come, so that it never waits for a reader."""

    def __init__(self, script: str, spec: dict[str, Any], pass_fds: tuple[int, ...]) -> None:
        self.reports: list[Report] = []
        # Nothing from the environment or the user's folder; scripts share what lies beside them.
        command = [sys.executable, "-E", "-s", "-S", str(_INSIDE / script), json.dumps(spec)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            pass_fds=pass_fds,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            try:
                report = json.loads(line)
            except ValueError:
                continue
            if isinstance(report, dict):
                self.reports.append(report)

    def end(self, patience_s: float) -> None:
        """Closes the helper's standard input, by which it ends, and waits."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(patience_s)
        except subprocess.TimeoutExpired:
            # A holder's actor sees its keeper gone and lets the target go.
            self.process.kill()
            self.process.wait()
        self._reader.join(patience_s)
        assert self.process.stdout is not None
        self.process.stdout.close()


class Injection:
    """A context manager: leaving it ends the disturbance. It ends by itself after ``duration_s``, and when
    this process dies, however it dies."""

    def __init__(self, cause: str, pid: int, duration_s: float, plan: Plan) -> None:
        self.cause, self.pid, self.duration_s = cause, pid, duration_s
        self._plan = plan
        self._ended_ns: int | None = None
        self.started_ns = time.monotonic_ns()
        self._helpers: list[_Helper] = []
        try:
            for spec in plan.specs:
                self._helpers.append(_Helper(plan.script, spec, plan.pass_fds))
        except OSError as error:
            self.stop()
            raise PrismError(f"cannot inject {cause}", f"a helper process did not start: {error}") from error

    @property
    def helper_pids(self) -> list[int]:
        """The processes that disturb; for ``cpu.neighbour`` the culprit that a verdict should name."""
        return [helper.process.pid for helper in self._helpers]

    def address(self, timeout_s: float = _READY_S) -> int | None:
        """``net.delay``: the port on 127.0.0.1 that clients have to talk to; None where there is none."""
        end = time.monotonic() + timeout_s
        while True:
            ports = [int(report["port"]) for report in self._reports() if "port" in report]
            if ports or time.monotonic() > end or not self.running:
                return ports[0] if ports else None
            time.sleep(0.005)

    @property
    def running(self) -> bool:
        return any(helper.process.poll() is None for helper in self._helpers)

    def wait(self) -> None:
        """Until the disturbance has ended by itself."""
        for helper in self._helpers:
            helper.process.wait()
        self.stop()

    def stop(self) -> None:
        """Ends it now; does nothing the second time."""
        if self._ended_ns is not None:
            return
        self._ended_ns = time.monotonic_ns()
        for helper in self._helpers:
            helper.end(_END_S)
        if self._plan.undo is not None:
            self._plan.undo()

    def truth(self) -> list[Interval]:
        """When the target was disturbed, as the helpers saw it. Whole only after the end."""
        return sorted(self._plan.intervals(self._reports()))

    def effect_check(self) -> Effect:
        """Whether it took effect. Whole only after the end."""
        ran_ns = (self._ended_ns or time.monotonic_ns()) - self.started_ns
        return self._plan.effect(self._reports(), min(ran_ns / 1e9, self.duration_s))

    def _reports(self) -> list[Report]:
        return [report for helper in self._helpers for report in list(helper.reports)]

    def __enter__(self) -> Injection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
