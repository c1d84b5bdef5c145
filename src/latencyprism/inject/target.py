"""The process to be disturbed: whose it is, where it runs, whether it may be touched."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

from latencyprism.errors import BadInput, TargetRefused
from latencyprism.host.held import read_once
from latencyprism.host.processes import parse_stat, process_cpu_ns

_KERNEL_THREAD = 0x00200000


@dataclass(frozen=True, slots=True)
class Target:
    """``busiest``: thread id with the most CPU time; ``pinned``: the CPUs that thread may run on."""

    pid: int
    name: str
    busiest: int
    pinned: frozenset[int]
    last_cpu: int

    @property
    def stat_path(self) -> str:
        return f"/proc/{self.pid}/task/{self.busiest}/stat"


def look(pid: int, *, i_know: bool) -> Target:
    """Raises BadInput for a PID that does not exist, TargetRefused for one that must not be disturbed: this
    process and what it lives from, kernel threads, a process that is stopped already, and (without
    ``i_know``) any that this process did not start."""
    stat = parse_stat(read_once(f"/proc/{pid}/stat") or b"") if pid > 0 else None
    if stat is None:
        raise BadInput(f"cannot disturb {pid}", "there is no such process", "look for the engine's PID")
    name, fields = stat
    what = f"cannot disturb {pid} ({name})"
    if int(fields[6]) & _KERNEL_THREAD:
        raise TargetRefused(what, "it is a kernel thread")
    if pid in (1, os.getpid()) or pid in ancestors(os.getpid()):
        raise TargetRefused(what, "this very process depends on it")
    if fields[0] in (b"T", b"t"):
        raise TargetRefused(what, "it is stopped or traced already", "let it run first")
    if fields[0] in (b"Z", b"X"):
        raise TargetRefused(what, "it has ended")
    if not i_know and os.getpid() not in ancestors(pid):
        raise TargetRefused(
            what,
            "it was not started by this process",
            "--i-know disturbs it nevertheless; it will be slowed down",
        )
    busiest = _busiest_thread(pid)
    thread = parse_stat(read_once(f"/proc/{pid}/task/{busiest}/stat") or b"")
    try:
        pinned = frozenset(os.sched_getaffinity(busiest))
    except OSError as error:
        raise TargetRefused(what, f"its CPUs cannot be read: {error.strerror}") from error
    return Target(pid, name, busiest, pinned, int((thread or stat)[1][36]))


def ancestors(pid: int) -> set[int]:
    """The parent, its parent, and so on."""
    found: set[int] = set()
    while pid > 1:
        stat = parse_stat(read_once(f"/proc/{pid}/stat") or b"")
        if stat is None:
            break
        pid = int(stat[1][1])
        if pid in found:
            break
        found.add(pid)
    return found


def cpu_cores(pid: int, seconds: float) -> float:
    """Cores that a process uses at present; takes ``seconds``."""
    before, begun = process_cpu_ns(pid), time.monotonic()
    time.sleep(seconds)
    after, took = process_cpu_ns(pid), time.monotonic() - begun
    if before is None or after is None:
        raise TargetRefused(f"cannot disturb {pid}", "it has ended")
    return (after - before) / 1e9 / took


def wanted_cores(pid: int, seconds: float) -> float:
    """Cores that a process's threads use or wait for, on average; takes ``seconds``."""
    before, begun = _run_and_wait_ns(pid), time.monotonic()
    time.sleep(seconds)
    after, took = _run_and_wait_ns(pid), time.monotonic() - begun
    spent_ns = sum(max(0, now - before.get(tid, now)) for tid, now in after.items())
    return spent_ns / 1e9 / took


def _run_and_wait_ns(pid: int) -> dict[int, int]:
    found = {}
    try:
        tids = [int(name) for name in os.listdir(f"/proc/{pid}/task")]
    except OSError:
        tids = []
    for tid in tids:
        words = (read_once(f"/proc/{pid}/task/{tid}/schedstat", 128) or b"").split()
        if len(words) >= 2:
            found[tid] = int(words[0]) + int(words[1])
    return found


def _busiest_thread(pid: int) -> int:
    best = (-1, pid)
    try:
        tids = [int(name) for name in os.listdir(f"/proc/{pid}/task")]
    except OSError:
        return pid
    for tid in tids:
        words = (read_once(f"/proc/{pid}/task/{tid}/schedstat", 128) or b"").split()
        if words:
            best = max(best, (int(words[0]), tid))
    return best[1]
