"""A watcher in a process of its own that a benchmark switches on and off.

Reads lines on standard input: ``on`` attaches and watches until the next line, ``off`` attaches and detaches
at once (a placebo with the same injections), ``end`` leaves. Answers each with one JSON line once it is done
(for ``on``: once attached). The interpreter stays warm: a window pays for watching and for nothing else.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import sys
import threading
import time
from typing import Any

from latencyprism.errors import PrismError
from latencyprism.sentinel.sinks import JsonLines
from latencyprism.sentinel.watcher import Watcher, WatchOptions
from latencyprism.timeline.python_source import PythonSource


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("pid", type=int)
    pid = parser.parse_args().pid
    watcher: Watcher | None = None
    runner: threading.Thread | None = None
    for line in sys.stdin:
        order = line.strip()
        answer: dict[str, Any] = {"order": order}
        if watcher is not None and runner is not None:
            answer["health"] = health(watcher)
            watcher.stop()
            runner.join(30)
            watcher = runner = None
        try:
            if order in ("on", "off"):
                watcher = Watcher(WatchOptions(pid=pid, reattach=False), JsonLines(io.StringIO()))
                begun = time.monotonic_ns()
                watcher.attach_all()
                answer["attach_ms"] = (time.monotonic_ns() - begun) / 1e6
                answer["stops"] = stops(watcher)
                if order == "off":
                    watcher.stop()
                    watcher.run()
                    watcher = None
                else:
                    runner = threading.Thread(target=watcher.run)
                    runner.start()
        except PrismError as error:
            answer["error"] = str(error)
            watcher = None
        usage = resource.getrusage(resource.RUSAGE_SELF)
        answer["cpu_s"] = usage.ru_utime + usage.ru_stime
        answer["rss_kb"] = usage.ru_maxrss
        answer["time_ns"] = time.monotonic_ns()
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
        if order == "end":
            os._exit(0)


def health(watcher: Watcher) -> dict[str, Any]:
    """What the probes say of themselves, by pid, and the watch's own counts."""
    found: dict[str, Any] = {"steps": sum(watch.counts.steps for watch in watcher.watches)}
    for watch in watcher.watches:
        source = watch.attachment.source
        if isinstance(source, PythonSource):
            found["probes"] = {str(pid): values for pid, values in source.health().items()}
            found["self_ns"] = list(source.totals.probe_self_ns)
            found["critical_ns"] = list(source.totals.probe_critical_ns)
            found["worker_self_ns"] = list(source.totals.worker_self_ns)
    return found


def stops(watcher: Watcher) -> list[dict[str, Any]]:
    """How long each process was held still by the attach."""
    reports = []
    for watch in watcher.watches:
        source = watch.attachment.source
        if isinstance(source, PythonSource):
            for pid, report in source.attach_reports().items():
                reports.append({"pid": pid, "route": report.route, "stop_us": report.stop_us,
                                "held_us": report.held_us, "ack_ms": report.ack_ms})  # fmt: skip
    return reports


if __name__ == "__main__":
    main()
