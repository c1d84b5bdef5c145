"""Memory of a process's control group, v1 or v2: use, limit, how often the limit was met, and pressure."""

from __future__ import annotations

import os

from latencyprism.host.cgroup import CpuMount, directories
from latencyprism.host.held import HeldFile, parse_table
from latencyprism.host.machine import parse_pressure

_NO_LIMIT = 1 << 60
"""v1 writes "no limit" as the largest multiple of a page."""


class MemoryGroup:
    """Held open until ``close``. Values are the group's own; the limit is its or the tightest ancestor's."""

    def __init__(self, mount: CpuMount, path: str) -> None:
        folders = directories(mount, path)
        own, two = folders[-1], mount.version == 2
        self.path = path
        self._used = HeldFile(os.path.join(own, "memory.current" if two else "memory.usage_in_bytes"))
        limit = "memory.max" if two else "memory.limit_in_bytes"
        self._limits = [HeldFile(os.path.join(folder, limit)) for folder in folders]
        self._events = HeldFile(os.path.join(own, "memory.events" if two else "memory.oom_control"))
        self._failures = None if two else HeldFile(os.path.join(own, "memory.failcnt"))
        # Pressure of a group exists on v2 alone; at the root it is the machine's, which is read elsewhere.
        kinds = ("cpu", "io", "memory") if two and len(folders) > 1 else ()
        self._pressure = {kind: HeldFile(os.path.join(own, f"{kind}.pressure")) for kind in kinds}

    def read(self) -> dict[str, int]:
        """What there is of ``group_memory_bytes``, ``group_memory_limit_bytes``, ``group_memory_limit_hits``,
        ``group_memory_high_hits``, ``group_oom_kills``, ``group_psi_<cpu|io|memory>_<some|full>_ns``."""
        found: dict[str, int] = {}
        used = _number(self._used)
        if used is not None:
            found["group_memory_bytes"] = used
        limits = [
            limit for held in self._limits if (limit := _number(held)) is not None and limit < _NO_LIMIT
        ]
        if limits:
            found["group_memory_limit_bytes"] = min(limits)
        events = parse_table(self._events.read(1024) or b"")
        for key, name in (
            (b"max", "group_memory_limit_hits"),
            (b"high", "group_memory_high_hits"),
            (b"oom_kill", "group_oom_kills"),
        ):
            if key in events:
                found[name] = events[key]
        failures = None if self._failures is None else _number(self._failures)
        if failures is not None:
            found["group_memory_limit_hits"] = failures
        for kind, held in self._pressure.items():
            for level, total_ns in parse_pressure(held.read(512) or b"").items():
                found[f"group_psi_{kind}_{level}_ns"] = total_ns
        return found

    def close(self) -> None:
        held = [self._used, self._events, *self._limits, *self._pressure.values()]
        for each in [*held, *([self._failures] if self._failures is not None else [])]:
            each.close()


def _number(held: HeldFile) -> int | None:
    text = (held.read(64) or b"").strip()
    return int(text) if text.isdigit() else None
