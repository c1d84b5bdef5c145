"""From an anomalous step to the alert on standard output: delay, completeness, place, and the watcher's cost.

Starts a real engine under steady load, watches it with the command a person would use, and disturbs it: short
stops of the process that does the work, now and then, and a neighbour on its core.
"""

from __future__ import annotations

import json
import os
import queue
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from latencyprism import inject
from latencyprism.bench.watch_meter import Meter, per_step
from latencyprism.errors import PrismError
from latencyprism.lab import serve
from latencyprism.lab.load import Load
from latencyprism.lab.profiles import profile

LEARN_S = 40.0
MATCH_S = 1.5
STOP_MS = 50.0
ATTACH_S = END_S = 60.0


class WatchProcess:
    """`latencyprism watch` as a child; its JSON lines with the time each was received."""

    def __init__(self, pid: int, *arguments: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="latencyprism-bench-")
        self._process = subprocess.Popen(
            [
                sys.executable, "-m", "latencyprism", "watch", "-p", str(pid), "--json", "--no-state",
                *arguments,
            ],
            stdout=subprocess.PIPE, text=True, cwd=self._folder.name,
        )  # fmt: skip
        self.lines: list[tuple[int, dict[str, Any]]] = []
        self._attached: queue.Queue[bool] = queue.Queue()
        self.watched_s = self.ended_in_s = 0.0
        threading.Thread(target=self._read, daemon=True).start()
        if not self._attached.get(timeout=ATTACH_S):
            raise PrismError("the watch did not attach")
        self._begun = time.monotonic()

    @property
    def pid(self) -> int:
        return self._process.pid

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            now = time.monotonic_ns()
            entry = json.loads(line)
            self.lines.append((now, entry))
            if entry.get("event") == "attached":
                self._attached.put(True)
        self._attached.put(False)

    def alerts(self, since_ns: int = 0, until_ns: int = 2**63) -> list[tuple[int, dict[str, Any]]]:
        return [(t, e) for t, e in self.lines if e.get("event") == "alert" and since_ns <= t < until_ns]

    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / float(os.sysconf("SC_CLK_TCK"))

    def rss_mb(self) -> float:
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
        return float("nan")

    def close(self) -> dict[str, Any]:
        """Ends the watch as Ctrl-C would; its last line, empty where it did not end in a minute."""
        self._process.terminate()
        self.watched_s = time.monotonic() - self._begun
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self.ended_in_s = round(time.monotonic() - self._begun - self.watched_s, 1)
        self._folder.cleanup()
        last = self.lines[-1][1] if self.lines else {}
        return last if last.get("event") == "ended" else {}


def run(engine: str, stops: int, seed: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Learn, then ``stops`` stops of 50 ms, then a neighbour that takes half of the core."""
    rng = random.Random(seed)
    with serve.start(engine) as server:  # type: ignore[arg-type]
        say(f"{engine} serves, started in {server.start_s:.0f} s")
        target = server.roles.get("worker", server.pid)
        seconds = LEARN_S + stops * 3.4 + 60
        mixed = profile("mixed").but(clients=6, think_ms=0.0, duration_s=seconds)
        with Load(server, mixed):
            watch = WatchProcess(server.pid)
            try:
                usage = _learn(watch, say)
                quiet_until = time.monotonic_ns()
                truth, cut_short = _stops(target, stops, rng)
                stops_until = time.monotonic_ns()
                say(f"{stops} stops made, neighbour next")
                neighbour = _neighbour(target)
                time.sleep(1.0)
            finally:
                last = watch.close()
    result = _score(watch, truth, quiet_until, stops_until, neighbour, target)
    usage |= per_step(usage["watcher_cpu_share"], last.get("steps"), watch.watched_s)
    result["stops_cut_short"] = cut_short
    return {"engine": engine, **result, **usage, "ended_in_s": watch.ended_in_s, "ended": last}


def _learn(watch: WatchProcess, say: Callable[[str], None]) -> dict[str, Any]:
    time.sleep(5.0)
    meter = Meter(watch)
    time.sleep(LEARN_S - 5.0)
    say(f"watched for {LEARN_S:.0f} s")
    return meter.read()


def _stops(target: int, count: int, rng: random.Random) -> tuple[list[tuple[int, int]], int]:
    """Stops of ``STOP_MS`` at random moments, (start, end) CLOCK_MONOTONIC ns each; and how many more the end
    of their injection cut short, which are none of that length and are not asked for."""
    truth: list[tuple[int, int]] = []
    cut_short = 0
    for _ in range(count):
        time.sleep(0.8 + rng.random())
        with inject.start("peer.stalled", target, duration_s=1.4, stop_ms=STOP_MS, every_s=0.8) as injection:
            injection.wait()
            made = [(start, end) for start, end, _ in injection.truth()]
        whole = [(start, end) for start, end in made if end - start >= STOP_MS * 1e6]
        truth += whole
        cut_short += len(made) - len(whole)
    return truth, cut_short


def _neighbour(target: int) -> dict[str, Any]:
    with inject.start("cpu.neighbour", target, strength=1.0, duration_s=15.0) as injection:
        begun = time.monotonic_ns()
        injection.wait()
        ended = time.monotonic_ns()
        effect = injection.effect_check()
    return {"start": begun, "end": ended, "effect": effect}


def _score(
    watch: WatchProcess, truth: list[tuple[int, int]], quiet_until: int, stops_until: int,
    neighbour: dict[str, Any], target: int,
) -> dict[str, Any]:  # fmt: skip
    during = watch.alerts(quiet_until, stops_until)
    delays = [e["delay_ms"] for _, e in watch.alerts(quiet_until) if e["delay_ms"] is not None]
    hit = [[e for t, e in during if start <= t < end + MATCH_S * 1e9] for start, end in truth]
    located = [any(str(target) in (e["where"] or "") for e in alerts) for alerts in hit if alerts]
    near = watch.alerts(neighbour["start"], neighbour["end"] + 10**9)
    pages = [(t, e) for t, e in near if e["level"] == "page"]
    return {
        "n": len(delays),
        "delay_ms_p50": _quantile(delays, 0.5),
        "delay_ms_p99": _quantile(delays, 0.99),
        "delay_ms_max": max(delays, default=None),
        "stops": len(truth),
        "stops_alerted": sum(bool(alerts) for alerts in hit),
        "stops_located": sum(located),
        "neighbour_alerted": bool(near),
        "neighbour_page_after_s": round((pages[0][0] - neighbour["start"]) / 1e9, 2) if pages else None,
        "neighbour_located": any(str(target) in (e["where"] or "") for _, e in near),
        "neighbour_effect": neighbour["effect"],
        "alerts_before_faults": len(watch.alerts(0, quiet_until)),
        "pages_before_faults": sum(e["level"] == "page" for _, e in watch.alerts(0, quiet_until)),
    }


def _quantile(values: list[float], q: float) -> float | None:
    return round(float(np.quantile(values, q)), 3) if values else None
