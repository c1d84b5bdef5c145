"""A target of the benchmarks' own: calls functions of ``bpf.stubs`` as it is told, one order a line.

``python -m latencyprism.bench.stub_target FD CPU``; FD: the stubs' file, inherited. Orders: ``run N``,
``rate R S`` (R calls a second for S seconds, in bursts of a millisecond), ``spin`` (until the input closes).
Answers are JSON lines; the first tells where the function lies.
"""

from __future__ import annotations

import json
import os
import select
import sys
import time

from latencyprism.bpf.stubs import StubFile

BURST_S = 0.001


def main() -> None:
    file = StubFile(descriptor=int(sys.argv[1]))
    if sys.argv[2] != "-":
        os.sched_setaffinity(0, {int(sys.argv[2])})
    kind = next(iter(file.stubs))
    _say(address=file.address(file.stubs[kind].offset), kind=kind, calls=0)
    for line in sys.stdin:
        words = line.split()
        if words[0] == "run":
            file.run(kind, int(words[1]))
            _say(calls=int(words[1]))
        elif words[0] == "rate":
            _say(**_rate(file, kind, float(words[1]), float(words[2])))
        elif words[0] == "spin":
            _spin(file, kind)


def _say(**fields: object) -> None:
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


def _rate(file: StubFile, kind: str, per_s: float, seconds: float) -> dict[str, object]:
    """What was due by now is called at once: a burst that came late is made up for."""
    begun = time.monotonic()
    calls = 0
    while (now := time.monotonic()) < begun + seconds:
        due = int((now - begun + BURST_S) * per_s) - calls
        file.run(kind, due)
        calls += due
        left = begun + calls / per_s - time.monotonic()
        if left > 0:
            time.sleep(left)
    return {"calls": calls, "seconds": time.monotonic() - begun}


def _spin(file: StubFile, kind: str) -> None:
    """Says every 10,000 calls or so that it lives, on one line that is written over again and again."""
    calls = 0
    beat = os.memfd_create("beat")
    _say(beat=beat)
    while not select.select([0], [], [], 0)[0]:
        file.run(kind, 10_000)
        calls += 10_000
        os.pwrite(beat, str(calls).encode().ljust(20), 0)


if __name__ == "__main__":
    main()
