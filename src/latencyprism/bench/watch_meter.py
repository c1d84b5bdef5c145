"""What a watch costs while a benchmark runs, and how much of the machine others took meanwhile."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, Protocol

from latencyprism.lab.serve import descendants

_TICK_S = 1.0 / os.sysconf("SC_CLK_TCK")


class Watched(Protocol):
    """A watch in a process of its own."""

    def cpu_s(self) -> float: ...

    def rss_mb(self) -> float: ...


class Meter:
    """Reads from its making on. Shares are of one core for the watch, of the whole machine for the rest."""

    def __init__(self, watch: Watched) -> None:
        self._watch = watch
        self._begun = time.monotonic()
        self._watch_s = watch.cpu_s()
        self._machine = _machine_s()
        self._own_s = _tree_s()

    def read(self) -> dict[str, Any]:
        """``others_cpu_share``: burnt by processes that this benchmark did not start; ``steal_share``: taken
        by the hypervisor. What they take makes steps slow in truth."""
        seconds = time.monotonic() - self._begun
        busy_s, steal_s, all_s = (now - then for now, then in zip(_machine_s(), self._machine))
        others_s = max(0.0, busy_s - (_tree_s() - self._own_s))
        return {
            "watcher_cpu_share": round((self._watch.cpu_s() - self._watch_s) / seconds, 4),
            "watcher_rss_mb": round(self._watch.rss_mb(), 1),
            "others_cpu_share": round(others_s / all_s, 3) if all_s else None,
            "steal_share": round(steal_s / all_s, 4) if all_s else None,
        }


def per_step(share: float, steps: int | None, seconds: float) -> dict[str, Any]:
    """The same cost by steps: ``steps_per_s`` of the whole watch, ``watcher_us_per_step``."""
    if not steps or seconds <= 0.0:
        return {"steps_per_s": None, "watcher_us_per_step": None}
    rate = steps / seconds
    return {"steps_per_s": round(rate, 1), "watcher_us_per_step": round(share / rate * 1e6, 1)}


def _machine_s() -> tuple[float, float, float]:
    """Seconds of all CPUs since boot: busy, stolen, all."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    user, nice, system, idle, iowait, irq, softirq, steal = (int(field) * _TICK_S for field in fields)
    busy = user + nice + system + irq + softirq
    return busy, steal, busy + steal + idle + iowait


def _tree_s() -> float:
    """CPU seconds of this process, of what it started, and of those of them that have ended."""
    total = 0.0
    for pid in descendants(os.getpid()):
        try:
            fields = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
        except OSError:
            continue
        total += sum(map(int, fields[11:15])) * _TICK_S
    return total
