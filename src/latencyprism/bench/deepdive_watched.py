"""A watch in a process of its own that dives deep when it is told; one JSON line answers each order.

``watch S``; ``on S``: with the deep probes armed; ``off S``: a placebo with the same injection; ``capture S
PATH``; ``written``; ``arm N``: arm and disarm again and again; ``profiled``: PyTorch's own profiler and the
operator probe over the same steps; ``rss``; ``count``; ``end``. Times are CLOCK_MONOTONIC.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from latencyprism.agent.operator_ring import OperatorRecords
from latencyprism.agent.operators import OperatorProbe
from latencyprism.bench.profiler_window import ProfilerWindow, compare
from latencyprism.engines.discovery import discover
from latencyprism.errors import PrismError
from latencyprism.records import NULL, Step
from latencyprism.sentinel.incident_capture import IncidentCapture
from latencyprism.sentinel.operator_dive import OperatorDive, OperatorDives
from latencyprism.sentinel.priority import OnTime
from latencyprism.sentinel.replica_watch import ReplicaWatch
from latencyprism.sentinel.targets import attach
from latencyprism.timeline.operators import operators_of

PERIOD_S = 0.02
AFTER_S = 8.0
PROFILED_S = 0.5


class Diver:
    """One watch and what it was told to do with it."""

    def __init__(self, pid: int) -> None:
        self.watch = ReplicaWatch(attach(discover(pid)[0]), horizon_s=90.0)
        assert self.watch.operators is not None
        self.dives: OperatorDives = self.watch.operators
        self.dives.wait_ready()
        if not self.dives.ready:
            raise PrismError("operators cannot be observed", "; ".join(self.dives.missing))
        self._slow_at = 0.0
        self.steps: list[Step] = []
        self.seen: list[OperatorRecords] = []
        self.lost = 0
        self.capture: IncidentCapture | None = None

    def look(self, seconds: float) -> None:
        """Keep the watch going for so long."""
        end = time.monotonic() + seconds
        while True:
            self.watch.settle()
            self.steps += self.watch.poll()[0].steps
            now = time.monotonic()
            if now >= self._slow_at:
                self._slow_at = now + 0.2
                self.watch.sample_host(time.monotonic_ns())
                self.watch.attachment.source.renew()
                if self.watch.below is not None:
                    self.watch.below.drain()
                if self.capture is not None:
                    self.capture.step(time.monotonic_ns())
            if now >= end:
                return
            time.sleep(min(PERIOD_S, max(end - now, 0.0)))

    def window(self, seconds: float) -> dict[str, Any]:
        """``look``, and the steps that lay in it."""
        begun = time.monotonic_ns()
        self.look(seconds)
        ended = time.monotonic_ns()
        return {"begun_ns": begun, "ended_ns": ended, "steps": self.between(begun, ended)}

    def between(self, begun_ns: int, ended_ns: int) -> list[list[int | None]]:
        """[start, duration, requests that decode, prefill tokens] of each whole step in that time."""
        return [
            [step.start_ns, step.duration_ns, step.decode_requests, step.prefill_tokens]
            for step in self.steps
            if step.start_ns >= begun_ns and step.end_ns <= ended_ns
        ]

    # -- orders ----------------------------------------------------------------------------------

    def on(self, seconds: float) -> dict[str, Any]:
        dive, armed_ms = self._deeper(seconds + 2.0)
        found = self.window(seconds)
        self._back(dive)
        self.seen += [seen for _, seen in dive.records]
        self.lost += sum(seen.lost for _, seen in dive.records)
        return {**found, "armed_ms": armed_ms, "missing": dive.missing}

    def off(self, seconds: float) -> dict[str, Any]:
        for injector, build, clock in self.dives.ready.values():
            OperatorProbe(injector, build, 0.0, clock=clock).close()
        self.look(0.3)
        return self.window(seconds)

    def arm(self, times: int) -> dict[str, Any]:
        armed = []
        for _ in range(times):
            dive, armed_ms = self._deeper(5.0)
            self._back(dive)
            armed.append(armed_ms)
            self.look(0.3)
        return {"armed_ms": armed}

    def _deeper(self, seconds: float) -> tuple[OperatorDive, float | None]:
        """As a capture does it; ms until all were armed, None if the operators were not."""
        begun_ns = time.monotonic_ns()
        dive = self.dives.begin(seconds)
        self.watch.attachment.source.arm_deep(seconds)
        if self.watch.below is not None:
            self.watch.below.go_deep()
        rest_ms = (time.monotonic_ns() - begun_ns) / 1e6
        self.look(0.3)
        slowest = [*dive.armed_ms.values()] if len(dive.armed_ms) == len(self.dives.ready) else None
        return dive, None if slowest is None else round(max([rest_ms, *slowest]), 3)

    def _back(self, dive: OperatorDive) -> None:
        dive.finish()
        self.watch.attachment.source.arm_deep(0.0)
        if self.watch.below is not None:
            self.watch.below.go_back()

    def begin_capture(self, seconds: float, path: Path) -> dict[str, Any]:
        """A capture as an alert begins it, and what steps were like while its file was written."""
        self.capture = IncidentCapture(self.watch, None, path, after_s=seconds)
        self.look(seconds + 0.3)
        return self.window(AFTER_S)

    def written(self) -> dict[str, Any]:
        assert self.capture is not None
        self.capture.abandon()
        return dict(self.capture.result or {})

    def profiled(self) -> dict[str, Any]:
        """Both over the same steps of the first process; nothing where the profiler cannot be entered."""
        pid, (injector, _, _) = next(iter(self.dives.ready.items()))
        dive = self.dives.begin(60.0)
        self.look(0.5)
        with ProfilerWindow(injector) as window:
            self.look(PROFILED_S)
        self.look(0.5)
        dive.finish()
        self.look(0.1)
        own = next((seen for _, seen in dive.records if seen.pid == pid), None)
        return compare(window.names, own, self.steps)

    def rss(self) -> dict[str, Any]:
        return {"rss_mb": {str(pid): round(rss_mb(pid), 1) for pid in self.dives.ready}}

    def count(self) -> dict[str, Any]:
        """Operators of each whole step of all ``on`` windows."""
        counts: list[int] = []
        for seen in self.seen:
            rows = [calls.rows["step"] for calls in operators_of(seen, "", self.steps, most=10**9)]
            if not rows:
                continue
            steps, found = np.unique(np.concatenate(rows), return_counts=True)
            inside = found[steps != NULL].tolist()
            counts += inside[1:-1]  # the first and the last were not seen whole
        return {"counts": counts, "lost": self.lost}

    def close(self) -> None:
        self.watch.close()


def rss_mb(pid: int) -> float:
    """Resident memory of a process, with its part of shared memory."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("pid", type=int)
    diver = Diver(parser.parse_args().pid)
    orders: dict[str, Callable[..., dict[str, Any]]] = {
        "watch": lambda s: diver.window(float(s)), "on": lambda s: diver.on(float(s)),
        "off": lambda s: diver.off(float(s)), "arm": lambda n: diver.arm(int(n)),
        "capture": lambda s, path: diver.begin_capture(float(s), Path(path)), "written": diver.written,
        "profiled": diver.profiled, "rss": diver.rss, "count": diver.count,
    }  # fmt: skip
    try:
        with OnTime():
            for words in lines(diver):
                try:
                    answer = orders[words[0]](*words[1:])
                except PrismError as error:
                    answer = {"error": str(error)}
                sys.stdout.write(json.dumps(answer) + "\n")
                sys.stdout.flush()
    finally:
        diver.close()
    sys.stdout.write("{}\n")
    sys.stdout.flush()


def lines(diver: Diver) -> Any:
    """Orders as they come; the watch goes on in between."""
    import select

    while True:
        diver.look(0.0)
        if select.select([sys.stdin], [], [], PERIOD_S)[0]:
            words = sys.stdin.readline().split(" ", 2)
            words = [word.strip() for word in words if word.strip()]
            if not words or words[0] == "end":
                return
            yield words


if __name__ == "__main__":
    main()
