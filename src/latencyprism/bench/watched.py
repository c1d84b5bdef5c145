"""A watcher in a process of its own that a benchmark switches on and off.

Reads lines on standard input: ``on`` attaches and watches until the next line, ``off`` attaches and detaches
at once (a placebo with the same injections), ``end`` leaves. Answers each with one JSON line once it is done
(for ``on``: once attached). The interpreter stays warm: a window pays for watching and for nothing else.
"""

from __future__ import annotations

import argparse
import io
import json
import queue
import resource
import sys
import threading
import time
from typing import Any

from latencyprism.errors import PrismError
from latencyprism.sentinel.sinks import JsonLines
from latencyprism.sentinel.watcher import Watcher, WatchOptions
from latencyprism.timeline.python_source import PythonSource


class Orders:
    """Lines of standard input, read by a thread; one that arrives stops the watch under way."""

    def __init__(self) -> None:
        self._lines: queue.Queue[str | None] = queue.Queue()
        self.watcher: Watcher | None = None
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in sys.stdin:
            self._lines.put(line.strip())
            if self.watcher is not None:
                self.watcher.stop()
        self._lines.put(None)

    def next(self) -> str | None:
        return self._lines.get()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("pid", type=int)
    pid = parser.parse_args().pid
    orders = Orders()
    before: dict[str, Any] = {}
    while (order := orders.next()) is not None and order != "end":
        answer: dict[str, Any] = {"order": order, **before}
        before = {}
        watcher: Watcher | None = None
        try:
            if order in ("on", "off"):
                begun = time.monotonic_ns()
                watcher = Watcher(WatchOptions(pid=pid, reattach=False), JsonLines(io.StringIO()))
                watcher.attach_all()
                answer["attach_ms"] = (time.monotonic_ns() - begun) / 1e6
                answer["stops"] = stops(watcher)
        except PrismError as error:
            answer["error"] = str(error)
            watcher = None
        if watcher is not None and order == "off":
            watcher.stop()
            watcher.run()
            watcher = None
        _tell(answer)
        if watcher is not None:
            orders.watcher = watcher
            before = {"health": _watch(watcher)}
            orders.watcher = None
    _tell({"order": "end", **before})


def _watch(watcher: Watcher) -> dict[str, Any]:
    """In the main thread, as the command does: with its priority and its signals."""
    sources = [watch.attachment.source for watch in watcher.watches]
    watcher.run()
    found: dict[str, Any] = {"steps": watcher.summary.steps, "lost": watcher.summary.lost}
    for source in sources:
        if isinstance(source, PythonSource):
            found["self_ns"] = list(source.totals.probe_self_ns)
            found["critical_ns"] = list(source.totals.probe_critical_ns)
            found["worker_self_ns"] = list(source.totals.worker_self_ns)
    return found


def _tell(answer: dict[str, Any]) -> None:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    answer["cpu_s"] = usage.ru_utime + usage.ru_stime
    answer["rss_kb"] = usage.ru_maxrss
    answer["time_ns"] = time.monotonic_ns()
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


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
