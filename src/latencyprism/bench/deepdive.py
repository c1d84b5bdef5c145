"""What a deep dive costs the engine and what it sees: windows with and without it, in random order.

Every window, also one without, begins with the same injection, so that only the probes differ. Steps are
compared that decode for all clients and nothing else. PyTorch's own profiler comes last, as the truth for the
number of operators: it holds the engine up.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from latencyprism.bench.overhead import Toggle
from latencyprism.bench.statistics import ratio_interval
from latencyprism.errors import PrismError
from latencyprism.lab import serve
from latencyprism.lab.load import Load
from latencyprism.lab.profiles import Length, Profile
from latencyprism.recorder import read_capture

PAST_S, CAPTURE_S = 33.0, 5.0
WARM_S = 5.0
TARGETS = {
    "step_time_ratio": 1.08, "rss_left_mb": 20.0, "armed_ms_p99": 50.0, "capture_bytes": 10_000_000,
    "past_s": 30.0,
}  # fmt: skip
Row = Sequence[Any]


def run(
    engine: str, pairs: int, window_s: float, clients: int, arms: int, seed: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """``pairs`` pairs of windows; ``arms`` further times armed for the time that takes. Figures as in the
    documentation of ``bench deepdive``."""
    with serve.start(engine) as server:  # type: ignore[arg-type]
        say(f"{engine} serves, started in {server.start_s:.0f} s")
        seconds = PAST_S + CAPTURE_S + pairs * 2 * (window_s + 1.5) + arms * 1.0 + 120.0
        steady = Profile("steady", clients=clients, prompt=Length(16), output=Length(512), duration_s=seconds)
        with tempfile.TemporaryDirectory(prefix="latencyprism-") as folder, Load(server, steady) as load:
            time.sleep(WARM_S)
            toggle = Toggle(server.pid, "deepdive_watched")
            try:
                found = _measure(toggle, Path(folder) / "a.pftrace", pairs, window_s, arms, seed, say)
                load.stop()
                found["written"] = toggle.order("written")
                found["count"] = toggle.order("count")
            finally:
                toggle.close()
            failed = len(load.result().failures)
            figures = result(found, Path(folder) / "a.pftrace", clients)
    return {"engine": engine, "pairs": pairs, "window_s": window_s, **figures, "failed_requests": failed}


def _measure(
    toggle: Toggle, path: Path, pairs: int, window_s: float, arms: int, seed: int, say: Callable[[str], None]
) -> dict[str, Any]:
    found: dict[str, Any] = {"normal": toggle.order(f"watch {PAST_S}")}
    found["rss_before"] = toggle.order("rss")["rss_mb"]
    found["after"] = toggle.order(f"capture {CAPTURE_S} {path}")
    say("normal operation and one capture seen")
    rng = random.Random(seed)
    windows: list[dict[str, Any]] = []
    for pair in range(pairs):
        order = ["on", "off"]
        rng.shuffle(order)
        windows += [{"pair": pair, "order": word, **toggle.order(f"{word} {window_s}")} for word in order]
    found["windows"] = windows
    say(f"{pairs} pairs of windows seen")
    found["arm"] = toggle.order(f"arm {arms}")["armed_ms"]
    found["rss_after"] = toggle.order("rss")["rss_mb"]
    try:
        found["profiled"] = toggle.order("profiled")
    except PrismError as error:
        say(f"no truth for the number of operators: {error.why or error.what}")
        found["profiled"] = None
    return found


def result(found: dict[str, Any], path: Path, clients: int) -> dict[str, Any]:
    """The figures from what was measured; ``met``: which targets, of those that could be looked at."""
    ratios = _ratios(found["windows"], clients)
    median, low, high = ratio_interval(ratios)
    armed = [ms for ms in [*found["arm"], *(w.get("armed_ms") for w in found["windows"])] if ms is not None]
    counts = found["count"]["counts"]
    profiled = found["profiled"] or {}
    left = [found["rss_after"][pid] - before for pid, before in found["rss_before"].items()]
    figures: dict[str, Any] = {
        "step_time_ratio": round(median, 4),
        "step_time_ci": [round(low, 4), round(high, 4)],
        "windows_compared": len(ratios),
        "operators_per_step": _commonest(counts),
        "operators_per_step_least": min(counts) if counts else None,
        "operators_per_step_profiler": profiled.get("per_step"),
        "operators_missed": profiled.get("missed"),
        "operators_profiled": profiled.get("told"),
        "records_lost": found["count"]["lost"],
        "longest_step_normal_ms": _longest(found["normal"]["steps"]),
        "longest_step_during_ms": _longest(
            [s for w in found["windows"] if w["order"] == "on" for s in w["steps"]]
        ),
        "longest_step_after_ms": _longest(found["after"]["steps"]),
        "rss_left_mb": round(max(left), 1) if left else None,
        "armed": len(armed),
        "armed_ms_p50": _quantile(armed, 0.5),
        "armed_ms_p99": _quantile(armed, 0.99),
        **_captured(found["written"], path),
    }
    figures["targets"] = TARGETS
    figures["met"] = _met(figures)
    return figures


def _ratios(windows: list[dict[str, Any]], clients: int) -> list[float]:
    """Of each pair in which both windows have enough alike steps."""
    medians: dict[tuple[int, str], float] = {}
    for window in windows:
        alike = [ns for _, ns, decode, prefill in window["steps"] if decode == clients and not prefill]
        if len(alike) >= 20:
            medians[window["pair"], window["order"]] = float(np.median(alike))
    pairs = sorted({pair for pair, _ in medians})
    ratios = [
        medians[pair, "on"] / medians[pair, "off"]
        for pair in pairs
        if (pair, "on") in medians and (pair, "off") in medians
    ]
    if not ratios:
        raise PrismError("nothing to compare", "no two windows of a pair had 20 steps that decode for all")
    return ratios


def _captured(written: dict[str, Any], path: Path) -> dict[str, Any]:
    """Of the capture's file: its size for each process with operators, and what it holds of the past."""
    if written.get("error") or not path.exists():
        raise PrismError("the capture was not written", str(written.get("error")))
    capture = read_capture(path)
    begun_ns = capture.meta["deep_probe"]["armed_ns"]
    numbers = [step.step for step in capture.steps if step.start_ns < begun_ns]
    first_ns = min((step.start_ns for step in capture.steps), default=begun_ns)
    processes = {calls.track[0] for calls in capture.operators}
    return {
        "capture_bytes": round(written["bytes"] / max(len(processes), 1)),
        "capture_operators": written["operators"],
        "capture_seconds": written["seconds"],
        "past_s": round((begun_ns - first_ns) / 1e9, 2),
        "past_steps_missing": max(numbers) - min(numbers) + 1 - len(numbers) if numbers else None,
        "not_available": capture.meta.get("not_available"),
    }


def _met(figures: dict[str, Any]) -> dict[str, bool | None]:
    met: dict[str, bool | None] = {}
    for name, target in TARGETS.items():
        value = figures[name]
        met[name] = None if value is None else (value >= target if name == "past_s" else value <= target)
    missed, normal = figures["operators_missed"], figures["longest_step_normal_ms"]
    met["operators"] = None if missed is None else missed == 0 and not figures["records_lost"]
    met["longest_step_after_ms"] = (
        None if normal is None else (figures["longest_step_after_ms"] or 0) <= normal
    )
    return met


def _commonest(counts: list[int]) -> int | None:
    return Counter(counts).most_common(1)[0][0] if counts else None


def _longest(steps: Sequence[Row]) -> float | None:
    return round(max(row[1] for row in steps) / 1e6, 2) if steps else None


def _quantile(values: list[float], q: float) -> float | None:
    return round(float(np.quantile(values, q)), 2) if values else None
