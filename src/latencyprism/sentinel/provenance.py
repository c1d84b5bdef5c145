"""Whose records a capture or a tape holds: the part of ``meta`` that every way of making one has."""

from __future__ import annotations

import platform
import time
from typing import TYPE_CHECKING, Any

from latencyprism import __version__
from latencyprism.sentinel.below_watch import host_tid
from latencyprism.timeline.clocks import Timeline, wall_clock

if TYPE_CHECKING:
    from latencyprism.sentinel.replica_watch import ReplicaWatch


def describe_watch(watch: ReplicaWatch, clocks: Timeline) -> dict[str, Any]:
    """``clocks``: holds at least one reading. ``loop_threads``: those that emitted steps, by their numbers
    here."""
    source = watch.attachment.source
    key = getattr(source, "request_key", None)
    return {
        "engine": watch.replica.engine,
        "host": platform.node(),
        "pids": {role: pid for pid, role in watch.roles.items()},
        "roles": {str(pid): role for pid, role in watch.roles.items()},
        "versions": {
            "latencyprism": __version__,
            watch.replica.engine: watch.replica.version,
            "kernel": platform.release(),
        },
        "clock": wall_clock(clocks, time.monotonic_ns()),
        "loop_threads": [host_tid(*pair) for pair in getattr(source, "step_threads", ())],
        "request_key": key.hex() if key else None,
        "requests_from": getattr(source, "requests_from", None),
        "not_available": [*watch.host.not_available, *getattr(source, "not_available", ())],
    }
