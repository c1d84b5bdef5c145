"""False alarms: a long normal run with workload surges in it must not page anybody."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from latencyprism.bench.alerting import WatchProcess
from latencyprism.lab import serve
from latencyprism.lab.load import Load
from latencyprism.lab.profiles import profile

SURGE_EVERY_S, SURGE_S = 120.0, 20.0


def run(engine: str, seconds: float, say: Callable[[str], None]) -> dict[str, Any]:
    """Mixed load for ``seconds``; every two minutes more clients with longer prompts for 20 s on top."""
    with serve.start(engine) as server:  # type: ignore[arg-type]
        say(f"{engine} serves, started in {server.start_s:.0f} s")
        surges = 0
        with Load(server, profile("mixed").but(duration_s=seconds)):
            watch = WatchProcess(server.pid)
            begun = time.monotonic()
            cpu = watch.cpu_s()
            while (left := begun + seconds - time.monotonic()) > 0:
                if left < SURGE_S + 5:
                    time.sleep(left)
                    break
                time.sleep(min(SURGE_EVERY_S - SURGE_S, left - SURGE_S - 5))
                with Load(server, profile("surge").but(duration_s=SURGE_S)) as surge:
                    surge.wait()
                surges += 1
                say(f"surge {surges}: {len(watch.alerts())} alerts so far")
            share = (watch.cpu_s() - cpu) / (time.monotonic() - begun)
            rss = watch.rss_mb()
            last = watch.close()
    alerts = [entry for _, entry in watch.alerts()]
    return {
        "engine": engine,
        "seconds": seconds,
        "surges": surges,
        "steps": last.get("steps"),
        "lost": last.get("lost"),
        "pages": sum(alert["level"] == "page" for alert in alerts),
        "evidence": sum(alert["level"] == "evidence" for alert in alerts),
        "watcher_cpu_share": round(share, 4),
        "watcher_rss_mb": round(rss, 1),
        "alerts": [
            {k: alert[k] for k in ("kind", "level", "step", "observed_ms", "expected_ms", "where")}
            for alert in alerts
        ],
    }
