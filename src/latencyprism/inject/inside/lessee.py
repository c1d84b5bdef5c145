"""Renews the lease of a disturbance inside the target: ``python -E -s -S lessee.py SPEC``, a JSON object.

``file``: descriptor of the shared file (``tenant/base.py`` has its words); ``duration_ns``: how long,
from the moment at which this process has started. The lease is taken back then, when standard input
closes, or when the parent is gone; it runs out by itself where this process is killed, too. One JSON line
when it begins, one when the target says that it has put everything back.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import select
import sys
import time

from bounds import say

W_STATE, W_LEASE_NS, W_UNTIL_NS, W_BEGUN_NS, W_ENDED_NS, W_HARM_NS, W_ROUNDS, W_CPU_NS, W_COUNT, W_THREAD = (
    range(1, 11)
)
LIVE, ENDED = 1, 2
SAY_AT, SAY_BYTES = 256, 512
LEASE_NS = 1_000_000_000
RENEW_S = 0.1
ANSWER_S = 4.0


def renew(words: memoryview, until_ns: int) -> None:
    """Until it is time to end."""
    parent = os.getppid()
    words[W_LEASE_NS] = time.monotonic_ns() + LEASE_NS
    words[W_UNTIL_NS] = until_ns
    while words[W_STATE] == LIVE and os.getppid() == parent:
        now_ns = time.monotonic_ns()
        if now_ns >= until_ns:
            return
        words[W_LEASE_NS] = now_ns + LEASE_NS
        if select.select([0], [], [], min(RENEW_S, (until_ns - now_ns) / 1e9))[0]:
            return


def main() -> None:
    spec = json.loads(sys.argv[1])
    shared = mmap.mmap(spec["file"], 0)
    words = memoryview(shared).cast("q")
    with contextlib.suppress(OSError):
        # To be on time although the machine is busy; it sleeps nearly always.
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(2))
    say(thread=words[W_THREAD])
    renew(words, time.monotonic_ns() + spec["duration_ns"])
    words[W_LEASE_NS] = 0
    end = time.monotonic() + ANSWER_S
    while words[W_STATE] == LIVE and time.monotonic() < end:
        time.sleep(0.005)
    said = shared[SAY_AT : SAY_AT + SAY_BYTES].split(b"\0", 1)[0].decode("utf-8", "replace")
    gone = words[W_STATE] == ENDED
    say(
        begun_ns=words[W_BEGUN_NS],
        ended_ns=words[W_ENDED_NS] if gone else time.monotonic_ns(),
        harm_ns=words[W_HARM_NS],
        rounds=words[W_ROUNDS],
        cpu_ns=words[W_CPU_NS],
        count=words[W_COUNT],
        thread=words[W_THREAD],
        said=said,
        gone=gone,
    )


if __name__ == "__main__":
    main()
