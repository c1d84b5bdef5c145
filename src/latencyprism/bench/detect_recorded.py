"""Real faults on a real engine: its steps recorded by the watch, then judged by every detector alike.

Mixed load; a clean part, short stops of the process that does the work, and a neighbour on its core, half of
the time and all of it. What the injectors themselves measured is the truth.
"""

from __future__ import annotations

import random
import shutil
import tempfile
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from latencyprism import inject
from latencyprism.bench.alerting import WatchProcess
from latencyprism.bench.rivals import rivals
from latencyprism.detect import Detector
from latencyprism.detect.graded import LEVELS, MERGE
from latencyprism.detect.steplog import StepLog
from latencyprism.errors import PrismError
from latencyprism.lab import serve
from latencyprism.lab.load import Load
from latencyprism.lab.profiles import profile
from latencyprism.records.step import Step

SETTLE_S, CLEAN_S, STOPS, STOP_MS = 10.0, 60.0, 15, 50.0
NEIGHBOURS = ((0.5, 8.0), (1.0, 8.0))
REST_S = 5.0
LATE_NS, GRACE_NS = 1_000_000_000, 3_000_000_000
"""A fault is found up to so long after it; what is told so long after it is not held false."""
LEARNING = 200
"""Steps at the beginning whose error is not counted."""


class Event(NamedTuple):
    """One fault, CLOCK_MONOTONIC ns."""

    kind: str
    start_ns: int
    end_ns: int


def run(engine: str, seed: int, say: Callable[[str], None], keep: Path | None = None) -> dict[str, Any]:
    """About three minutes. ``keep``: where the step log shall stay."""
    with tempfile.TemporaryDirectory(prefix="latencyprism-detect-") as folder:
        log = Path(folder) / "steps.csv"
        events, effects, faults_ns, live = _record(engine, seed, log, say)
        steps = list(StepLog(log))
        if keep is not None:
            shutil.copyfile(log, keep)
    if len(steps) < 2 * LEARNING:
        raise PrismError(f"only {len(steps)} steps were recorded", "the engine was too slow", "run it again")
    return {
        "engine": engine,
        "seed": seed,
        **judged(steps, events, faults_ns),
        "effects": effects,
        "live": live,
    }


def _record(
    engine: str, seed: int, log: Path, say: Callable[[str], None]
) -> tuple[list[Event], dict[str, Any], int, dict[str, Any]]:
    rng = random.Random(seed)
    events: list[Event] = []
    effects: dict[str, Any] = {}
    with serve.start(engine) as server:  # type: ignore[arg-type]
        say(f"{engine} serves, started in {server.start_s:.0f} s")
        target = server.roles.get("worker", server.pid)
        with Load(server, profile("mixed").but(clients=6, think_ms=0.0, duration_s=300.0, seed=seed)):
            time.sleep(SETTLE_S)
            watch = WatchProcess(server.pid, "--no-capture", "--steps", str(log))
            try:
                time.sleep(CLEAN_S)
                faults_ns = time.monotonic_ns()
                say(f"{CLEAN_S:.0f} s of normal load; {STOPS} stops of {STOP_MS:.0f} ms next")
                events += _stops(target, rng)
                for strength, seconds in NEIGHBOURS:
                    time.sleep(REST_S)
                    name = f"neighbour_{strength:g}"
                    say(f"neighbour at {strength:g} of the core for {seconds:.0f} s")
                    event, effects[name] = _neighbour(target, name, strength, seconds)
                    events.append(event)
                time.sleep(REST_S)
            finally:
                last = watch.close()
    alerts = watch.alerts()
    live = {level: sum(e["level"] == level for _, e in alerts) for level in LEVELS}
    live["pages_before_faults"] = sum(e["level"] == "page" for t, e in alerts if t < faults_ns)
    live["lost"] = last.get("lost")
    return events, effects, faults_ns, live


def _stops(target: int, rng: random.Random) -> list[Event]:
    found = []
    for _ in range(STOPS):
        time.sleep(0.5 + rng.random())
        with inject.start("peer.stalled", target, duration_s=0.9, stop_ms=STOP_MS, every_s=0.8) as injection:
            injection.wait()
            found += [Event("stop", start, end) for start, end, _ in injection.truth()]
    return found


def _neighbour(target: int, name: str, strength: float, seconds: float) -> tuple[Event, dict[str, Any]]:
    with inject.start("cpu.neighbour", target, strength=strength, duration_s=seconds) as injection:
        begun = time.monotonic_ns()
        injection.wait()
        ended = time.monotonic_ns()
        effect = injection.effect_check()
    told = {"effective": effect.effective, "measured": effect.measured, "unit": effect.unit}
    return Event(name, begun, ended), told


def judged(steps: Sequence[Step], events: Sequence[Event], faults_ns: int) -> dict[str, Any]:
    """All detectors over one recorded stream; ours learns from nothing, the others are trained on what lies
    before ``faults_ns``. Positions are rows of ``steps``."""
    fired: dict[str, list[int]] = {level: [] for level in LEVELS}
    errors: dict[str, list[float]] = {"decode": [], "mixed": []}
    detector = Detector()
    for at, step in enumerate(steps):
        firing = detector.observe(step)
        expected = detector.last
        if firing is not None:
            fired["evidence"].append(at)
            if firing.level == "page":
                fired["page"].append(at)
        elif expected is not None and at >= LEARNING and step.end_ns < faults_ns:
            kind = "mixed" if step.prefill_tokens else "decode"
            errors[kind].append(abs(expected.ms - step.duration_ms) / step.duration_ms)
    clean = [step for step in steps if step.end_ns < faults_ns]
    fired.update({name: told(steps) for name, told in rivals(clean, steps).items()})
    hours = sum(step.duration_ns for step in steps) / 3.6e12
    clean_hours = sum(step.duration_ns for step in clean) / 3.6e12
    return {
        "steps": len(steps),
        "mixed_steps": sum(1 for step in steps if step.prefill_tokens),
        "hours": round(hours, 4),
        "noise": {"step_to_step": round(detector.noise.near, 4), "drift": round(detector.noise.wander, 4)},
        "detectable": detector.detectable(),
        "error": _error(errors),
        "detectors": {
            name: _score(steps, alerts, events, len(clean), clean_hours) for name, alerts in fired.items()
        },
    }


def _error(errors: dict[str, list[float]]) -> dict[str, float | None]:
    """Of the expectation made before each step, outside of incidents and faults."""
    found: dict[str, float | None] = {}
    for kind, values in errors.items():
        found[f"{kind}_mean"] = round(float(np.mean(values)), 4) if values else None
        found[f"{kind}_median"] = round(float(np.median(values)), 4) if values else None
    decode, mixed = found["decode_mean"], found["mixed_mean"]
    found["mixed_to_decode"] = round(mixed / decode, 3) if mixed is not None and decode else None
    return found


def _score(
    steps: Sequence[Step], alerts: Sequence[int], events: Sequence[Event], clean: int, clean_hours: float
) -> dict[str, Any]:
    ends = [step.end_ns for step in steps]
    told_ns = [ends[at] for at in alerts]
    by_kind: dict[str, list[bool]] = {}
    for event in events:
        place = bisect_left(told_ns, event.start_ns)
        found = place < len(told_ns) and told_ns[place] <= event.end_ns + LATE_NS
        by_kind.setdefault(event.kind, []).append(found)
    false, last = 0, -MERGE - 1
    clean_false = 0
    for at in alerts:
        if any(event.start_ns <= ends[at] <= event.end_ns + GRACE_NS for event in events):
            continue
        if at - last >= MERGE:
            false += 1
            clean_false += at < clean
        last = at
    hits, total = sum(map(sum, by_kind.values())), len(events)
    told = 2 * hits + false + (total - hits)
    return {
        "found": {kind: f"{sum(found)} of {len(found)}" for kind, found in by_kind.items()},
        "false_episodes": false,
        "false_before_faults_per_hour": round(clean_false / clean_hours, 1) if clean_hours else None,
        "f1": round(2 * hits / told, 3) if told else None,
    }
