"""When a process that disturbs has to end, and how it reports."""

from __future__ import annotations

import json
import os
import resource
import select
import sys
import time


class Bounds:
    """Over at ``until_ns`` (CLOCK_MONOTONIC), when standard input closes, or when the parent is gone,
    whichever comes first. The last resort is a limit on CPU time, ``spare_s`` above what that allows."""

    def __init__(self, until_ns: int, spare_s: int = 3) -> None:
        self.until_ns = until_ns
        self.parent = os.getppid()
        seconds = max(1, (until_ns - time.monotonic_ns()) // 1_000_000_000 + spare_s)
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))

    def over(self, wait_s: float = 0.0) -> bool:
        """At once if it is; else after having waited so long for the end."""
        if time.monotonic_ns() >= self.until_ns or os.getppid() != self.parent:
            return True
        # Nothing is ever written to it: readable means closed.
        return bool(select.select([0], [], [], max(0.0, wait_s))[0])


def say(**fields: object) -> None:
    """One JSON line to the injector."""
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()
