"""False alarms: a long normal run with workload surges in it must not page anybody."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from latencyprism.bench.alerting import WatchProcess
from latencyprism.bench.watch_meter import Meter, per_step
from latencyprism.lab import serve
from latencyprism.lab.load import Load
from latencyprism.lab.profiles import profile

TOLD = ("kind", "level", "step", "onset_step", "observed_ms", "expected_ms", "where")
SURGE_EVERY_S, SURGE_S = 120.0, 20.0
WARM_S = 15.0
"""Load before the watch begins: an engine's first seconds, in which it compiles and fills caches, are not its
normal run. The watch itself gets no grace."""


def run(engine: str, seconds: float, steps: Path | None, say: Callable[[str], None]) -> dict[str, Any]:
    """Mixed load for ``seconds``; every two minutes more clients with longer prompts for 20 s on top.
    ``steps``: a new file for the log of all steps."""
    logged = () if steps is None else ("--steps", str(steps.absolute()))
    with serve.start(engine) as server:  # type: ignore[arg-type]
        say(f"{engine} serves, started in {server.start_s:.0f} s")
        surges = 0
        with Load(server, profile("mixed").but(duration_s=WARM_S + seconds)):
            time.sleep(WARM_S)
            watch = WatchProcess(server.pid, *logged)
            begun = time.monotonic()
            meter = Meter(watch)
            while (left := begun + seconds - time.monotonic()) > 0:
                if left < SURGE_S + 5:
                    time.sleep(left)
                    break
                time.sleep(min(SURGE_EVERY_S - SURGE_S, left - SURGE_S - 5))
                with Load(server, profile("surge").but(duration_s=SURGE_S)) as surge:
                    surge.wait()
                surges += 1
                say(f"surge {surges}: {len(watch.alerts())} alerts so far")
            usage = meter.read()
            last = watch.close()
    return _told(engine, seconds, surges, watch, usage, last)


def _told(
    engine: str, seconds: float, surges: int, watch: WatchProcess, usage: dict[str, Any], last: dict[str, Any]
) -> dict[str, Any]:
    alerts = [(time_ns, entry) for time_ns, entry in watch.alerts()]
    first_ns = next((time_ns for time_ns, entry in watch.lines if entry.get("event") == "attached"), 0)
    return {
        "engine": engine,
        "seconds": seconds,
        "surges": surges,
        "steps": last.get("steps"),
        "lost": last.get("lost"),
        "pages": sum(alert["level"] == "page" for _, alert in alerts),
        "evidence": sum(alert["level"] == "evidence" for _, alert in alerts),
        **usage,
        **per_step(usage["watcher_cpu_share"], last.get("steps"), watch.watched_s),
        "alerts": [
            {
                "after_s": round((time_ns - first_ns) / 1e9, 1),
                **{name: alert[name] for name in TOLD},
            }
            for time_ns, alert in alerts
        ],
    }
