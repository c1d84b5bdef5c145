"""A process of its own that searches for the anchor of another whenever it is told to.

Each line on standard input is one search; the answer is one JSON line. The interpreter stays warm: a window
pays for the search and for nothing else.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from latencyprism.errors import PrismError
from latencyprism.sentinel.priority import OnTime
from latencyprism.timeline.anchor_search import search


def main() -> None:
    pid = int(sys.argv[1])
    for _ in sys.stdin:
        answer: dict[str, Any]
        try:
            before = time.process_time()
            with OnTime():  # as the watch does
                found = search(pid)
            answer = {
                "function": found.function.qualname,
                "witness": found.witness.qualname if found.witness is not None else None,
                "confidence": found.confidence,
                "reasons": found.reasons,
                "seconds": found.seconds,
                "stacks": found.stacks,
                "torn": found.torn,
                "own_cpu_s": round(time.process_time() - before, 3),
            }
        except PrismError as error:
            answer = {"error": str(error)}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
