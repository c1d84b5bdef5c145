"""Three acts on a real engine: normal, a workload surge that must not alert, a fault that must."""

from __future__ import annotations

import io
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from latencyprism import inject
from latencyprism.errors import PrismError
from latencyprism.lab.load import Load
from latencyprism.lab.profiles import profile
from latencyprism.lab.serve import Server
from latencyprism.records import Alert
from latencyprism.sentinel.incident_capture import IncidentCapture
from latencyprism.sentinel.sinks import JsonLines
from latencyprism.sentinel.watcher import Watcher, WatchOptions

LEARN_S, NORMAL_S, SURGE_S, FAULT_S, VERDICT_S = 15.0, 15.0, 18.0, 9.0, 12.0
AFTER_S, LATE_S = 3.0, 45.0
"""How long the load goes on after the fault; and how much later than planned the fault may begin, since the
surge ends only when its last request is answered: without load a fault slows nothing."""
CALM_S = 10.0
"""So long the fault waits for an incident of the machine's own to end: it would be told as part of it."""
FAULT, STRENGTHS = "cpu.neighbour", (1.5, 3.0)
"""The second where the first raised no page: a neighbour slows nothing where others take its CPU time."""
NAMES = ("normal", "surge", "fault")


@dataclass
class Play:
    """What happened. ``acts``: (name, start, end) CLOCK_MONOTONIC ns; ``alerts``: (received, alert)."""

    acts: list[tuple[str, int, int]] = field(default_factory=list)
    alerts: list[tuple[int, Alert]] = field(default_factory=list)
    verdicts: list[IncidentCapture] = field(default_factory=list)
    steps: int = 0
    steps_true: int | None = None
    lost: int = 0
    window: Any = None
    expected: dict[int, float] = field(default_factory=dict)
    roles: dict[int, str] = field(default_factory=dict)
    effect: Any = None
    strength: float = 0.0
    problem: BaseException | None = None

    def during(self, name: str, level: str = "page") -> list[Alert]:
        """Alerts of a level that came in an act (its first second of grace belongs to the act before)."""
        for act, start, end in self.acts:
            if act == name:
                return [alert for at, alert in self.alerts if start <= at < end and alert.level == level]
        return []


@dataclass
class Progress:
    """For the face that shows it: called about four times a second."""

    act: str
    seconds: float
    of_s: float
    steps: int
    step_ms: float | None
    expected_ms: float | None
    pages: int


STEPS_COUNTER = {"llama.cpp": "llamacpp:n_decode_total", "vllm": "vllm:iteration_tokens_total_count"}


def pin(server: Server) -> None:
    """Put the engine on one core, as production does, so that a neighbour on that core is felt."""
    for pid in server.pids:
        for task in os.listdir(f"/proc/{pid}/task"):
            try:
                os.sched_setaffinity(int(task), {min(os.sched_getaffinity(0))})
            except ProcessLookupError:
                continue


def play(server: Server, captures: Path, show: Callable[[Progress], None]) -> Play:
    """Attach, run the acts, detach. Raises what the watch or an act raised."""
    done = Play()
    watcher = Watcher(
        WatchOptions(pid=server.pid, captures=captures, capture_levels=("page",), reattach=False),
        JsonLines(io.StringIO()),
        on_alert=lambda alert: done.alerts.append((time.monotonic_ns(), alert)),
        on_verdict=done.verdicts.append,
    )
    watcher.attach_all()
    watch = watcher.watches[0]
    done.roles = dict(watch.roles)
    before = server.metrics()
    stage = _Stage(server, watcher, done, show, before)
    thread = threading.Thread(target=stage.run, name="acts")
    thread.start()
    try:
        summary = watcher.run()
    finally:
        stage.cancelled = True
        thread.join()
    if done.problem is not None:
        raise done.problem
    done.steps, done.lost = summary.steps, summary.lost
    done.window = watch.recorder.window(0, 2**63 - 1)
    done.expected = dict(watch.expected)
    return done


class _Stage:
    """Runs the acts in a thread; everything heavy is in other processes."""

    def __init__(
        self,
        server: Server,
        watcher: Watcher,
        done: Play,
        show: Callable[[Progress], None],
        before: dict[str, float],
    ) -> None:
        self.server, self.watcher, self.done, self.show, self.before = server, watcher, done, show, before
        self.cancelled = False

    def run(self) -> None:
        try:
            self._acts()
        except (PrismError, OSError) as problem:
            self.done.problem = problem
        finally:
            self.watcher.stop()

    def _acts(self) -> None:
        total_s = LEARN_S + NORMAL_S + SURGE_S + FAULT_S + AFTER_S + LATE_S
        steady = profile("mixed").but(clients=3, duration_s=total_s)
        with ExitStack() as stack:
            base = stack.enter_context(Load(self.server, steady))
            self._wait("learn", LEARN_S)
            with self._act("normal"):
                self._wait("normal", NORMAL_S)
            with self._act("surge"):
                with Load(self.server, profile("surge").but(clients=4, duration_s=SURGE_S - 3)):
                    self._wait("surge", SURGE_S)
                self._wait("surge", CALM_S, until=lambda: not self._incident_is_open())
            with self._act("fault"):
                self._fault()
            self._wait("verdict", AFTER_S)
            base.stop()
        self._wait("verdict", VERDICT_S, until=lambda: self._verdict_is_there())
        self._count()

    def _fault(self) -> None:
        begun = time.monotonic_ns()
        for strength in STRENGTHS:
            with inject.start(FAULT, self.server.pid, strength=strength, duration_s=FAULT_S) as fault:
                self._wait("fault", FAULT_S)
                self.done.effect, self.done.strength = fault.effect_check(), strength
            if any(at >= begun and alert.level == "page" for at, alert in self.done.alerts):
                break

    def _incident_is_open(self) -> bool:
        return any(watch.detector.incident_open for watch in self.watcher.watches)

    @contextmanager
    def _act(self, name: str) -> Iterator[None]:
        start = time.monotonic_ns()
        yield
        self.done.acts.append((name, start, time.monotonic_ns()))

    def _verdict_is_there(self) -> bool:
        return bool(self.done.verdicts) and not self.watcher.capturing

    def _wait(self, act: str, seconds: float, until: Callable[[], bool] = lambda: False) -> None:
        begun = time.monotonic()
        while (gone := time.monotonic() - begun) < seconds and not until():
            if self.cancelled:
                raise PrismError("the demonstration was stopped")
            self.show(self._progress(act, gone, seconds))
            time.sleep(0.25)

    def _progress(self, act: str, gone: float, seconds: float) -> Progress:
        watches = self.watcher.watches
        if not watches:
            raise PrismError("the engine of the demonstration is gone")
        watch = watches[0]
        step = watch.last_step
        return Progress(
            act=act,
            seconds=gone,
            of_s=seconds,
            steps=watch.counts.steps,
            step_ms=step.duration_ms if step else None,
            expected_ms=watch.expected[-1][1] if watch.expected else None,
            pages=watch.counts.page,
        )

    def _count(self) -> None:
        name = STEPS_COUNTER.get(self.server.engine)
        after = self.server.metrics()
        if name is not None and name in after and name in self.before:
            self.done.steps_true = int(after[name] - self.before[name])
