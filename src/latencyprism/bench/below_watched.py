"""The always-on kernel probes alone, switched on and off by a benchmark; orders as for ``bench.watched``.

``on`` attaches them to the engine of a process and reads them as the watch does; ``off`` and ``idle`` do
nothing.
"""

from __future__ import annotations

import json
import select
import sys
import time
from typing import Any

from latencyprism.engines.discovery import discover
from latencyprism.errors import PrismError
from latencyprism.sentinel.below_watch import BelowWatch

POLL_S = 0.05


def main() -> None:
    roles = discover(int(sys.argv[1]))[0].roles()
    health: dict[str, Any] = {}
    for line in iter(sys.stdin.readline, ""):
        order = line.strip()
        if order == "end":
            break
        if order != "on":
            _tell(order, health)
            continue
        try:
            watch = BelowWatch(roles)
        except PrismError as error:
            _tell(order, {"error": str(error)})
            continue
        _tell(order, health)
        while not select.select([sys.stdin], [], [], POLL_S)[0]:
            watch.tick(time.monotonic_ns())
            watch.drain()
        health = {"below": watch.describe()}
        watch.close()
    _tell("end", health)


def _tell(order: str, fields: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps({"order": order, "time_ns": time.monotonic_ns(), **fields}) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
