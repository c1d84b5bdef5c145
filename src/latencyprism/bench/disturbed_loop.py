"""A loop of steps, some of them disturbed from below in a known way, that says what was done to it.

``python -m latencyprism.bench.disturbed_loop SPEC``; SPEC: a JSON object with ``cpu``, ``file`` (a path on a
disk), ``hog``, ``asks`` and ``answers`` (descriptors, see ``bench.attribution``), ``group`` (the directory of
a cgroup with a quota, or null) and its ``home``. Each line of standard input names a disturbance; the answer
is a JSON line with ``start_ns``, ``end_ns`` and what was injected in between.
"""

from __future__ import annotations

import json
import mmap
import os
import resource
import sys
import threading
import time
from typing import Any

WAIT_S = 0.005
FAULTS = 200
WORK_NS = 2_000_000
BURN_NS = 40_000_000
PAGE = mmap.PAGESIZE


class Loop:
    def __init__(self, spec: dict[str, Any]) -> None:
        self.spec = spec
        os.sched_setaffinity(0, {spec["cpu"]})
        self.file = os.open(spec["file"], os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.ftruncate(self.file, 0)
        os.pwrite(self.file, os.urandom(FAULTS * PAGE), 0)
        os.fsync(self.file)
        self.pages = mmap.mmap(self.file, FAULTS * PAGE, mmap.MAP_SHARED, mmap.PROT_READ)
        self.pages.madvise(mmap.MADV_RANDOM)
        self.lock = threading.Lock()
        self.lock.acquire()

    def step(self, what: str) -> dict[str, Any]:
        if what == "faults":
            self.drop_pages()
        start_ns = time.monotonic_ns()
        work(WORK_NS)
        injected = getattr(self, "do_" + what)()
        work(WORK_NS)
        return {"what": what, "start_ns": start_ns, "end_ns": time.monotonic_ns(), **injected}

    def do_plain(self) -> dict[str, Any]:
        return {}

    def do_preempted(self) -> dict[str, Any]:
        """The hog wakes at once, because of its priority, and tells for how long it ran."""
        os.write(self.spec["hog"], b"x")
        work(WORK_NS)
        return {}

    def do_futex(self) -> dict[str, Any]:
        self.lock.acquire(timeout=WAIT_S)
        return {"injected_ns": int(WAIT_S * 1e9)}

    def do_read(self) -> dict[str, Any]:
        """Somebody answers after a while, and tells for how long it waited."""
        os.write(self.spec["asks"], b"x")
        os.read(self.spec["answers"], 1)
        return {}

    def do_fsync(self) -> dict[str, Any]:
        """A quick disk is asked again until it has taken long enough. What the call works is no wait."""
        spent = 0
        while spent < WAIT_S * 1e9:
            os.pwrite(self.file, os.urandom(PAGE), FAULTS * PAGE)
            begun, worked = time.monotonic_ns(), time.thread_time_ns()
            os.fsync(self.file)
            spent += time.monotonic_ns() - begun - (time.thread_time_ns() - worked)
        return {"injected_ns": spent}

    def drop_pages(self) -> None:
        """Out of this process's tables, and out of the cache."""
        self.pages.madvise(mmap.MADV_DONTNEED)
        os.fsync(self.file)
        os.posix_fadvise(self.file, 0, FAULTS * PAGE, os.POSIX_FADV_DONTNEED)

    def do_faults(self) -> dict[str, Any]:
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_majflt
        for page in range(FAULTS):
            self.pages[page * PAGE]
        return {"major_faults": resource.getrusage(resource.RUSAGE_THREAD).ru_majflt - before}

    def do_throttled(self) -> dict[str, Any]:
        """Into the group with a quota, burn more than that, and out again."""
        group = self.spec["group"]
        join(group)
        before = throttled_ns(group)
        end = time.thread_time_ns() + BURN_NS
        while time.thread_time_ns() < end:
            pass
        injected = throttled_ns(group) - before
        join(self.spec["home"])
        return {"injected_ns": injected}


def work(ns: int) -> None:
    end = time.thread_time_ns() + ns
    while time.thread_time_ns() < end:
        pass


def join(group: str) -> None:
    with open(os.path.join(group, "cgroup.procs"), "w") as file:
        file.write(str(os.getpid()))


def throttled_ns(group: str) -> int:
    with open(os.path.join(group, "cpu.stat")) as file:
        table = dict(line.split() for line in file)
    return int(table.get("throttled_time", 0)) or 1000 * int(table.get("throttled_usec", 0))


def say(fields: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


def main() -> None:
    loop = Loop(json.loads(sys.argv[1]))
    say({"ready": os.getpid()})
    for line in sys.stdin:
        say(loop.step(line.strip()))


if __name__ == "__main__":
    main()
