"""Burns a resource in bounds: ``python -E -s -S burner.py SPEC`` with SPEC a JSON object.

``kind``: ``cpu``, ``memory``, ``disk`` or ``reclaim``; ``share``: part of each 10 ms cycle spent burning;
``until_ns`` (CLOCK_MONOTONIC): when to end. It ends at that moment, when its standard input closes, or when
its parent is gone, whichever comes first; a kernel limit on its CPU time is the last resort.

It prints one JSON line when it begins to burn and one when it ends.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import random
import sys
import time
from collections.abc import Callable
from typing import Any

from bounds import Bounds, say

Spec = dict[str, Any]
Work = Callable[[], None]

CYCLE_NS = 10_000_000


def last_cpu(path: str) -> int | None:
    """The CPU that a thread ran on last, from its stat file; None when the thread is gone."""
    try:
        with open(path, "rb") as file:
            data = file.read()
        return int(data[data.rfind(b")") + 1 :].split()[36])
    except (OSError, ValueError, IndexError):
        return None


def place(spec: Spec) -> bool:
    """Real-time priority where it is wanted and allowed, or time that nobody else wants; the CPUs asked for.
    True: real-time."""
    os.sched_setaffinity(0, spec["cpus"])
    if spec.get("yields"):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    if spec.get("realtime"):
        try:
            os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(1))
        except OSError:
            return False
        return True
    return False


def burn_cpu(_spec: Spec) -> Work:
    count = 0

    def work() -> None:
        nonlocal count
        for _ in range(200):
            count += 1

    return work


def burn_memory(spec: Spec) -> Work:
    size = spec.get("bytes", 64 << 20)
    source, target = bytearray(size), bytearray(size)
    piece, offset = 4 << 20, 0
    view = memoryview(source)

    def work() -> None:
        nonlocal offset
        target[offset : offset + piece] = view[offset : offset + piece]
        offset = (offset + piece) % size

    return work


def burn_disk(spec: Spec) -> Work:
    """Synchronous writes to a file that has no name any more: whatever happens, nothing is left behind."""
    flags = os.O_RDWR | os.O_TMPFILE | os.O_SYNC
    file = os.open(spec["directory"], flags, 0o600)
    size, piece = spec.get("bytes", 32 << 20), 1 << 20
    buffer = mmap.mmap(-1, piece)
    offset = 0

    def work() -> None:
        nonlocal offset
        os.pwrite(file, buffer, offset)
        os.fdatasync(file)
        offset = (offset + piece) % size

    return work


PROCESS_MADVISE, MADV_PAGEOUT = 440, 21
PIECE_BYTES = 256 << 10
LOOK_AGAIN_NS = 1_000_000_000


def mapped_files(pid: int) -> list[tuple[int, int]]:
    """(address, bytes) in pieces, of what a process has mapped from files; [] when it is gone."""
    pieces = []
    try:
        with open(f"/proc/{pid}/maps", "rb") as file:
            lines = file.read().splitlines()
    except OSError:
        return []
    for line in lines:
        words = line.split(None, 5)
        if len(words) == 6 and words[4] != b"0" and words[1].startswith(b"r") and words[5].startswith(b"/"):
            start, end = (int(word, 16) for word in words[0].split(b"-"))
            pieces += [(at, min(PIECE_BYTES, end - at)) for at in range(start, end, PIECE_BYTES)]
    return pieces


def major_faults(pid: int) -> int | None:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            data = file.read()
        return int(data[data.rfind(b")") + 1 :].split()[9])
    except (OSError, ValueError, IndexError):
        return None


def reclaim(spec: Spec) -> Work:
    """Has the kernel take back pages of files that the target has mapped, as it does when memory is short:
    the next one to touch them waits for the disk. ``lost``: of the target's time, at ``fault_ns`` a fault."""
    import ctypes  # dear to load, and for nobody else

    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = os.pidfd_open(spec["pid"])
    state: dict[str, Any] = {"at": 0, "pieces": []}
    first, begun_ns = major_faults(spec["pid"]), time.monotonic_ns()

    def work() -> None:
        now_ns, faults = time.monotonic_ns(), major_faults(spec["pid"])
        if faults is None or first is None:
            time.sleep(0.005)
            return
        EXTRA["faults"] = faults - first
        if now_ns >= state["at"]:
            state["at"] = now_ns + LOOK_AGAIN_NS
            state["pieces"] = mapped_files(spec["pid"])
        if (faults - first) * spec["fault_ns"] > spec["lost"] * (now_ns - begun_ns) or not state["pieces"]:
            time.sleep(0.002)
            return
        address, size = random.choice(state["pieces"])
        vector = (ctypes.c_size_t * 2)(address, size)  # struct iovec
        done = libc.syscall(PROCESS_MADVISE, descriptor, ctypes.byref(vector), 1, MADV_PAGEOUT, 0)
        if done > 0:
            EXTRA["bytes"] = EXTRA.get("bytes", 0) + done
        elif ctypes.get_errno() == errno.EPERM:
            EXTRA["refused"] = 1

    return work


EXTRA: dict[str, int] = {}
"""What a kind of work has to report besides."""

KINDS = {"reclaim": reclaim, "cpu": burn_cpu, "memory": burn_memory, "disk": burn_disk}


def main() -> None:
    spec = json.loads(sys.argv[1])
    bounds = Bounds(spec["until_ns"])
    realtime = place(spec)
    work = KINDS[spec["kind"]](spec)
    follow, here = spec.get("follow"), None
    begun_ns, cpu_begun_ns = time.monotonic_ns(), time.process_time_ns()
    say(begun_ns=begun_ns, pid=os.getpid(), realtime=realtime)
    rounds = 0
    while True:
        cycle_ns = time.monotonic_ns()
        if follow is not None:
            cpu = last_cpu(follow)
            if cpu is None:
                break
            if cpu != here:
                os.sched_setaffinity(0, {cpu})
                here = cpu
        stop_ns = cycle_ns + int(spec["share"] * CYCLE_NS)
        while time.monotonic_ns() < stop_ns:
            work()
            rounds += 1
        if bounds.over((cycle_ns + CYCLE_NS - time.monotonic_ns()) / 1e9):
            break
    say(
        begun_ns=begun_ns,
        ended_ns=time.monotonic_ns(),
        cpu_ns=time.process_time_ns() - cpu_begun_ns,
        realtime=realtime,
        rounds=rounds,
        **EXTRA,
    )


if __name__ == "__main__":
    main()
