"""Does the breakdown of a step add up, and how much of it stays unexplained? On captures of a real engine."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from latencyprism.engines.discovery import discover
from latencyprism.errors import PrismError
from latencyprism.lab import serve
from latencyprism.lab.load import Load
from latencyprism.lab.profiles import profile
from latencyprism.recorder import Capture, read_capture
from latencyprism.sentinel.incident_capture import IncidentCapture
from latencyprism.sentinel.replica_watch import ReplicaWatch
from latencyprism.sentinel.targets import attach
from latencyprism.timeline.breakdown import PARTS, Breakdown, SpanIndex, break_down
from latencyprism.timeline.overlap import overlaps

TARGET_MEDIAN, TARGET_P95 = 0.05, 0.10
PERIOD_S = 0.05


def run(
    engine: str, seconds: float, clients: int, say: Callable[[str], None], keep: Path | None = None
) -> dict[str, Any]:
    """Two captures under mixed load, without and with the deep dive's functions wrapped; the figures at the
    top are those of the worse of the two. ``keep``: a folder for the captures."""
    with serve.start(engine) as server:  # type: ignore[arg-type]
        say(f"{engine} serves, started in {server.start_s:.0f} s")
        mixed = profile("mixed").but(clients=clients)
        with Load(server, mixed.but(duration_s=3.0)) as warm:
            warm.wait()
        with tempfile.TemporaryDirectory(prefix="latencyprism-") as folder:
            found = {}
            for name, deep in (("always", False), ("deep", True)):
                path = (keep or Path(folder)) / f"{engine}-{name}.pftrace"
                load = Load(server, mixed.but(duration_s=seconds + 30, seed=deep + 1))
                capture = record(server.pid, path, seconds, deep, load)
                client = load.result().summary()
                found[name] = {**told(capture), "requests": client["requests"], "failed": client["failed"]}
                say(f"{name}: {found[name]}")
    return result(engine, found)


def record(pid: int, path: Path, seconds: float, deep: bool, load: Load) -> Capture:
    """A capture of ``seconds`` under ``load`` as ``record`` makes it, read back."""
    watch = ReplicaWatch(attach(discover(pid)[0]), horizon_s=seconds + 30)
    try:
        load.start()
        _watch(watch, 1.5)
        capture = IncidentCapture(watch, None, path, after_s=seconds, deep=deep)
        _watch(watch, seconds, capture)
        load.stop()
        capture.abandon()
    finally:
        load.stop()
        watch.close()
    if not capture.result or capture.result.get("error"):
        raise PrismError("the capture was not written", str(capture.result))
    return read_capture(path)


def _watch(watch: ReplicaWatch, seconds: float, capture: IncidentCapture | None = None) -> None:
    end = time.monotonic() + seconds
    renewed = 0.0
    while (now := time.monotonic()) < end:
        watch.settle()
        time.sleep(PERIOD_S)
        watch.poll()
        if now >= renewed + 0.2:
            renewed = now
            watch.sample_host(time.monotonic_ns())
            watch.attachment.source.renew()
            if capture is not None:
                capture.step(time.monotonic_ns())


def told(capture: Capture) -> dict[str, Any]:
    """``steps`` broken down; ``unexplained_*`` shares of a step's duration; ``shares`` of all time in steps;
    ``states`` of the threads that had the step, where the scheduler was seen; ``largest_sum_error_ns``: by
    how much the parts of any step miss its duration (0); ``gap_share``, ``idle_share`` of the time before
    steps, relative to the time in them; ``overlap_share``: the loop's work beside another execution."""
    threads = capture.meta.get("loop_threads") or [None]
    steps = [step for step in capture.steps if step.phase is not None and step.duration_ns > 0]
    found = break_down(steps, SpanIndex.of(capture.spans, threads[0]))
    if not found:
        raise PrismError("nothing to break down", "no step with work in it was seen")
    unexplained = np.array([one.unexplained_share for one in found])
    whole = sum(one.step.duration_ns for one in found)
    with_states = [one for one in found if one.states is not None]
    states: dict[str, int] = {}
    for one in with_states:
        for name, ns in (one.states or {}).items():
            states[name] = states.get(name, 0) + ns
    seen_ns = sum(one.step.duration_ns for one in with_states)
    hidden = [one.overlap_ns for one in overlaps(found) if one.overlap_ns is not None]
    return {
        "steps": len(found),
        "step_ms_p50": round(float(np.median([one.step.duration_ms for one in found])), 3),
        "unexplained_median": round(float(np.median(unexplained)), 5),
        "unexplained_p95": round(float(np.quantile(unexplained, 0.95)), 5),
        "unexplained_max": round(float(unexplained.max()), 5),
        "shares": {name: share for name in PARTS if (share := _share(found, name, whole)) is not None},
        "states": {name: round(ns / seen_ns, 5) for name, ns in sorted(states.items())} if seen_ns else None,
        "gap_share": round(sum(one.gap_ns or 0 for one in found) / whole, 5),
        "idle_share": round(sum(one.idle_ns or 0 for one in found) / whole, 5),
        "overlap_share": round(sum(hidden) / whole, 5) if hidden else None,
        "gc_share": _column(found, "gc_ns", whole),
        "major_faults": _total(found, "major_faults"),
        "largest_sum_error_ns": max(abs(sum(one.sums.values()) - one.step.duration_ns) for one in found),
    }


def result(engine: str, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The worse of the captures on top, all of them below."""
    worst = {
        name: max(one[name] for one in found.values()) for name in ("unexplained_median", "unexplained_p95")
    }
    return {
        "engine": engine,
        **worst,
        "target": {"unexplained_median": TARGET_MEDIAN, "unexplained_p95": TARGET_P95},
        "met": worst["unexplained_median"] <= TARGET_MEDIAN and worst["unexplained_p95"] <= TARGET_P95,
        **found,
    }


def _share(found: Sequence[Breakdown], name: str, whole: int) -> float | None:
    """None: no step has such a part."""
    seen = [ns for one in found if (ns := one.sums.get(name)) is not None]
    return round(sum(seen) / whole, 5) if seen else None


def _total(found: Sequence[Breakdown], column: str) -> int | None:
    seen = [value for one in found if (value := getattr(one.step, column)) is not None]
    return sum(seen) if seen else None


def _column(found: Sequence[Breakdown], column: str, whole: int) -> float | None:
    total = _total(found, column)
    return None if total is None else round(total / whole, 5)
