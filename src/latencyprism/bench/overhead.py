"""What watching costs: paired windows, on and off in random order, placebo injections in the off windows.

A fixed order lets slow drift of the machine alias into the difference, so each pair is shuffled. The load is
closed-loop and steady; gaps are those the client saw (ITL), cut by the clock into windows.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from latencyprism.bench.statistics import ratio_interval, resolution
from latencyprism.errors import PrismError
from latencyprism.lab import serve
from latencyprism.lab.load import Load
from latencyprism.lab.outcome import Result
from latencyprism.lab.profiles import Length, Profile

SETTLE_S = 2.0
"""From the attach to the window: what a watch does once, in its first second, is no part of what it costs
while it goes on."""


class Toggle:
    """Speaks with ``bench.watched``, or another module that takes the same orders."""

    def __init__(self, pid: int, module: str = "watched") -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"latencyprism.bench.{module}", str(pid)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def order(self, word: str) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(word + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise PrismError("the watcher of the benchmark ended")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PrismError("the watcher of the benchmark failed", answer["error"])
        return answer

    def close(self) -> None:
        if self._process.poll() is None:
            try:
                self.order("end")
            except (PrismError, OSError):
                self._process.kill()
        self._process.wait(10)


def run(
    engine: str,
    pairs: int,
    window_s: float,
    clients: int,
    seed: int,
    say: Callable[[str], None],
    module: str = "watched",
) -> dict[str, Any]:
    """``pairs`` pairs of windows of ``window_s`` seconds on a fresh server; ``module``: what is switched."""
    with serve.start(engine) as server:  # type: ignore[arg-type]
        say(f"{engine} serves, started in {server.start_s:.0f} s")
        seconds = pairs * 2 * (window_s + 2 * SETTLE_S + 1.0) + 20
        steady = Profile("steady", clients=clients, prompt=Length(16), output=Length(512), duration_s=seconds)
        toggle = Toggle(server.pid, module)
        try:
            with Load(server, steady) as running:
                time.sleep(5.0)
                windows, answers = _windows(server, toggle, pairs, window_s, random.Random(seed), say)
                running.stop()
                result = running.result()
        finally:
            toggle.close()
    return _compare(engine, windows, answers, result, window_s)


def _windows(
    server: serve.Server,
    toggle: Toggle,
    pairs: int,
    window_s: float,
    rng: random.Random,
    say: Callable[[str], None],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    windows, answers = [], []
    for pair in range(pairs):
        order = ["on", "off"]
        rng.shuffle(order)
        for word in order:
            answers.append(toggle.order(word))
            time.sleep(SETTLE_S)
            cpu = _engine_cpu_ns(server)
            start = time.monotonic_ns()
            time.sleep(window_s)
            end = time.monotonic_ns()
            windows.append(
                {
                    "pair": pair,
                    "on": word == "on",
                    "start": start,
                    "end": end,
                    "cpu": _engine_cpu_ns(server) - cpu,
                }
            )
        if (pair + 1) % 5 == 0:
            say(f"{pair + 1} of {pairs} pairs")
    answers.append(toggle.order("idle"))
    return windows, answers


def _engine_cpu_ns(server: serve.Server) -> int:
    total = 0
    for pid in server.pids:
        try:
            for task in os.listdir(f"/proc/{pid}/task"):
                with open(f"/proc/{pid}/task/{task}/schedstat") as file:
                    total += int(file.read().split()[0])
        except OSError:
            continue  # a thread that ended between listing and reading
    return total


def _compare(
    engine: str,
    windows: list[dict[str, Any]],
    answers: list[dict[str, Any]],
    result: Result,
    window_s: float,
) -> dict[str, Any]:
    ratios: dict[str, list[float]] = {"itl_p50": [], "itl_p99": [], "throughput": [], "cpu_per_token": []}
    skipped = 0
    seen: list[dict[str, Any]] = []
    for pair in range(len(windows) // 2):
        both = [w for w in windows if w["pair"] == pair]
        on, off = (next(w for w in both if w["on"] is state) for state in (True, False))
        a, b = _figures(on, result), _figures(off, result)
        if a is None or b is None:
            skipped += 1
            continue
        for name, values in ratios.items():
            values.append(a[name] / b[name])
        seen.append({"on": _rounded(a), "off": _rounded(b), "on_first": both[0]["on"]})
    intervals = {name: ratio_interval(values) for name, values in ratios.items()}
    report: dict[str, Any] = {
        "engine": engine,
        "pairs": len(ratios["itl_p50"]),
        "skipped": skipped,
        "window_s": window_s,
    }
    for name, (median, low, high) in intervals.items():
        report[f"{name}_ratio"] = round(median, 4)
        report[f"{name}_ci"] = [round(low, 4), round(high, 4)]
    report["windows"] = seen
    report["resolution_p50"] = round(resolution(intervals["itl_p50"]), 4)
    report["resolution_p99"] = round(resolution(intervals["itl_p99"]), 4)
    report["failed_requests"] = len(result.failures)
    report.update(_probe_figures(answers))
    shares = [answer["below"]["estimated_share"] for answer in answers if answer.get("below")]
    if known := [share for share in shares if share is not None]:
        report["below_estimated_share"] = round(float(np.median(known)), 6)
    return report


def _rounded(figures: dict[str, float]) -> dict[str, float]:
    """ms, tokens, ns of CPU a token: so that a reader can see whether an engine has two speeds."""
    return {name: round(value, 3) for name, value in figures.items()}


def _figures(window: dict[str, Any], result: Result) -> dict[str, float] | None:
    gaps = result.itl_ms(window["start"], window["end"])
    if len(gaps) < 50:
        return None
    p50, p99 = np.quantile(gaps, [0.5, 0.99])
    if p50 <= 0:
        return None
    return {
        "itl_p50": float(p50),
        "itl_p99": float(p99),
        "throughput": float(len(gaps)),
        "cpu_per_token": window["cpu"] / len(gaps),
    }


def _probe_figures(answers: list[dict[str, Any]]) -> dict[str, Any]:
    healths = [answer["health"] for answer in answers if answer.get("health", {}).get("steps")]
    stops = [stop for answer in answers for stop in answer.get("stops", [])]
    figures: dict[str, Any] = {
        "probe_us_per_step": _p50([ns for h in healths for ns in h.get("self_ns", [])]),
        "probe_critical_us_per_step": _p50([ns for h in healths for ns in h.get("critical_ns", [])]),
        "worker_probe_us_per_step": _p50([ns for h in healths for ns in h.get("worker_self_ns", [])]),
        "attaches": len(answers) - 1,
        "stops": len(stops),
    }
    for key in ("held_us", "stop_us", "ack_ms"):
        values = [stop[key] for stop in stops]
        figures[f"{key}_p50"] = round(float(np.quantile(values, 0.5)), 1) if values else None
        figures[f"{key}_p99"] = round(float(np.quantile(values, 0.99)), 1) if values else None
    figures["routes"] = {
        route: sum(s["route"] == route for s in stops) for route in {s["route"] for s in stops}
    }
    return figures


def _p50(values_ns: list[int]) -> float | None:
    return round(float(np.median(values_ns)) / 1e3, 2) if values_ns else None
