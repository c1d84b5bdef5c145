"""Counters of one watched process: its busiest threads one by one, and the process as a whole."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from latencyprism.host.cgroup import CpuMount, GroupChain, parse_membership
from latencyprism.host.held import HeldFile, parse_table, read_once
from latencyprism.host.memory_group import MemoryGroup
from latencyprism.host.network import NetworkCounters
from latencyprism.records import Counter

STATES = "RSDTtXZPI"
"""Value of the counter ``state``: position of the kernel's letter in this string (T: stopped by a signal,
t: stopped by a tracer, D: waiting without being interruptible)."""

MOST_THREADS = 3
_SCANNED_THREADS = 128
_SLOW_EVERY = 10
"""Memory of the group and TCP change slowly and cost more: every tenth sample."""
_UNITS = (("_ns", "ns"), ("_bytes", "bytes"), ("_us", "us"))
_BUSY_SHARE = 0.05


def parse_stat(data: bytes) -> tuple[str, list[bytes]] | None:
    """Thread name and the fields after it, from /proc/PID/stat; the name may hold spaces and parentheses."""
    start, end = data.find(b"("), data.rfind(b")")
    fields = data[end + 1 :].split()
    if start < 0 or end < start or len(fields) < 37:
        return None
    return data[start + 1 : end].decode("utf-8", "replace"), fields


def parse_allowed(status: bytes) -> int | None:
    """On how many CPUs a thread may run, from its /proc status; None where that does not say."""
    at = status.find(b"\nCpus_allowed:")
    mask = status[at + 14 : status.find(b"\n", at + 1)].strip().replace(b",", b"") if at >= 0 else b""
    try:
        return bin(int(mask, 16)).count("1") or None
    except ValueError:
        return None


def process_cpu_ns(pid: int) -> int | None:
    """CPU time of all threads of a process, living and dead, from its CPU clock (see clock_getcpuclockid(3));
    None if there is no such process."""
    try:
        return time.clock_gettime_ns((~pid << 3) | 2)
    except OSError:
        return None


def thread_name(tid: int) -> str:
    """As /proc tells it; ``?`` for a thread that has ended."""
    raw = read_once(f"/proc/{tid}/comm", 64)
    text = (raw or b"?").decode("utf-8", "replace").strip()
    return "".join(c if c.isprintable() else "?" for c in text)


class _Thread:
    def __init__(self, pid: int, tid: int, role: str) -> None:
        self.tid = tid
        base = f"/proc/{pid}/task/{tid}/"
        self._scheduler = HeldFile(base + "schedstat")
        self._stat = HeldFile(base + "stat")
        self._status = HeldFile(base + "status")
        named = parse_stat(self._stat.read() or b"")
        self.track = (f"{role} {pid}", f"{named[0] if named else '?'} {tid}")

    def sample(self, now_ns: int, out: list[Counter]) -> bool:
        """Adds this thread's counters; False when it is gone."""
        stat = parse_stat(self._stat.read() or b"")
        if stat is None:
            return False
        fields, track = stat[1], self.track
        out.append(Counter(track, "state", now_ns, STATES.find(chr(fields[0][0])), "state"))
        out.append(Counter(track, "cpu", now_ns, int(fields[36]), "cpu"))
        out.append(Counter(track, "minor_faults", now_ns, int(fields[7])))
        out.append(Counter(track, "major_faults", now_ns, int(fields[9])))
        words = (self._scheduler.read() or b"").split()
        if len(words) == 3:
            out.append(Counter(track, "cpu_ns", now_ns, int(words[0]), "ns"))
            out.append(Counter(track, "runqueue_ns", now_ns, int(words[1]), "ns"))
            out.append(Counter(track, "timeslices", now_ns, int(words[2])))
        status = self._status.read() or b""
        at = status.rfind(b"voluntary_ctxt_switches:", 0, status.rfind(b"nonvoluntary_ctxt_switches:"))
        numbers = status[at:].split() if at >= 0 else []
        if (allowed := parse_allowed(status)) is not None:
            out.append(Counter(track, "allowed_cpus", now_ns, allowed))
        if len(numbers) >= 4:
            out.append(Counter(track, "voluntary_switches", now_ns, int(numbers[1])))
            out.append(Counter(track, "involuntary_switches", now_ns, int(numbers[3])))
        return True

    def close(self) -> None:
        for held in (self._scheduler, self._stat, self._status):
            held.close()


class ProcessCounters:
    """Samples one process. The main thread is always watched; ``scan`` chooses the busiest others anew."""

    def __init__(
        self, pid: int, role: str, mount: CpuMount | None, memory_mount: CpuMount | None = None
    ) -> None:
        self.pid, self.role = pid, role
        self.track = (f"{role} {pid}", "process")
        self.gone = False
        self._mount, self._memory_mount = mount, memory_mount
        self._memory: MemoryGroup | None = None
        self._network = NetworkCounters(pid)
        self._samples = 0
        base = f"/proc/{pid}/"
        self._stat, self._io = HeldFile(base + "stat"), HeldFile(base + "io")
        self._membership = HeldFile(base + "cgroup")
        self._group_text: bytes | None = None
        self._group: GroupChain | None = None
        self._carried, self._joined = (0, 0), (0, 0)
        self._seen_cpu: dict[int, int] = {}
        self._threads = {pid: _Thread(pid, pid, role)}
        self.scan(0)

    def scan(self, elapsed_ns: int) -> None:
        """Looks at every thread's CPU time and keeps those that burn the most; ``elapsed_ns`` since the last
        scan, 0 for the first (which goes by all their CPU time so far)."""
        try:
            tids = sorted(int(name) for name in os.listdir(f"/proc/{self.pid}/task"))[:_SCANNED_THREADS]
        except OSError:
            return
        total = {tid: self._thread_cpu_ns(tid) for tid in tids}
        spent = {tid: cpu - self._seen_cpu.get(tid, 0) for tid, cpu in total.items() if tid != self.pid}
        self._seen_cpu = total
        busy = sorted(
            (tid for tid in spent if spent[tid] > _BUSY_SHARE * elapsed_ns), key=lambda t: -spent[t]
        )
        for tid in busy[: MOST_THREADS - 1]:
            if tid in self._threads:
                continue
            for loser in [t for t in self._threads if t != self.pid and t not in busy[: MOST_THREADS - 1]][
                :1
            ]:
                self._threads.pop(loser).close()
            if len(self._threads) < MOST_THREADS:
                self._threads[tid] = _Thread(self.pid, tid, self.role)

    def _thread_cpu_ns(self, tid: int) -> int:
        words = (read_once(f"/proc/{self.pid}/task/{tid}/schedstat", 128) or b"").split()
        return int(words[0]) if words else 0

    def missing(self) -> list[str]:
        """The sources that this process does not offer, in words."""
        sources: list[tuple[str, Callable[[], object]]] = [
            ("process state and page faults", lambda: self._stat.read()),
            ("read and written bytes", lambda: self._io.read()),
            ("scheduler statistics", lambda: read_once(f"/proc/{self.pid}/schedstat")),
            ("CPU quota and throttling", lambda: self._throttling()),
            ("memory of its control group", lambda: self._memory is not None and self._memory.read()),
            ("TCP counters", lambda: self._network.read()),
        ]
        name = f"{self.role} {self.pid}"
        return [f"{what} of {name}" for what, read in sources if not read()]

    def sample(self, now_ns: int, out: list[Counter]) -> None:
        stat = parse_stat(self._stat.read() or b"")
        if stat is None:
            self.gone = True
            return
        track, fields = self.track, stat[1]
        out.append(Counter(track, "minor_faults", now_ns, int(fields[7])))
        out.append(Counter(track, "major_faults", now_ns, int(fields[9])))
        if (cpu_ns := process_cpu_ns(self.pid)) is not None:
            out.append(Counter(track, "cpu_ns", now_ns, cpu_ns, "ns"))
        io = parse_table(self._io.read() or b"")
        for key, name, unit in (
            (b"read_bytes", "read_bytes", "bytes"),
            (b"write_bytes", "write_bytes", "bytes"),
            (b"syscr", "read_calls", "count"),
            (b"syscw", "write_calls", "count"),
        ):
            if key in io:
                out.append(Counter(track, name, now_ns, io[key], unit))
        self._sample_group(now_ns, out)
        if self._samples % _SLOW_EVERY == 0:
            self._sample_slow(now_ns, out)
        self._samples += 1
        for tid in [tid for tid, thread in self._threads.items() if not thread.sample(now_ns, out)]:
            self._threads.pop(tid).close()

    def _throttling(self) -> tuple[int, int, float | None] | None:
        """Periods and nanoseconds throttled since the first call, in all groups it was in."""
        text = self._membership.read()
        if text is None or self._mount is None:
            return None
        if text != self._group_text:
            self._join(text)
        now = self._group.read() if self._group is not None else None
        if now is None:
            return None
        # Never backwards: a group whose statistics were reset must not read as negative throttling.
        self._carried = (
            self._carried[0] + max(0, now.periods - self._joined[0]),
            self._carried[1] + max(0, now.throttled_ns - self._joined[1]),
        )
        self._joined = (now.periods, now.throttled_ns)
        return (*self._carried, now.quota_cpus)

    def _join(self, text: bytes) -> None:
        assert self._mount is not None
        path = parse_membership(text.decode("utf-8", "replace"), self._mount.version)
        if self._group is not None:
            self._group.close()
        self._group_text = text
        self._group = GroupChain(self._mount, path) if path is not None else None
        self._join_memory(text.decode("utf-8", "replace"))
        first = self._group.read() if self._group is not None else None
        self._joined = (first.periods, first.throttled_ns) if first is not None else (0, 0)

    def _join_memory(self, text: str) -> None:
        if self._memory is not None:
            self._memory.close()
        mount = self._memory_mount
        path = parse_membership(text, mount.version, "memory") if mount is not None else None
        self._memory = MemoryGroup(mount, path) if mount is not None and path is not None else None

    def _sample_slow(self, now_ns: int, out: list[Counter]) -> None:
        found = dict(self._network.read())
        if self._memory is not None:
            found |= self._memory.read()
        for name, value in found.items():
            unit = next((unit for ending, unit in _UNITS if name.endswith(ending)), "count")
            out.append(Counter(self.track, name, now_ns, value, unit))

    def _sample_group(self, now_ns: int, out: list[Counter]) -> None:
        throttling = self._throttling()
        if throttling is None:
            return
        periods, throttled_ns, quota = throttling
        out.append(Counter(self.track, "throttled_periods", now_ns, periods))
        out.append(Counter(self.track, "throttled_ns", now_ns, throttled_ns, "ns"))
        if quota is not None:
            out.append(Counter(self.track, "quota_cpus", now_ns, quota, "cores"))

    def close(self) -> None:
        for held in (self._stat, self._io, self._membership):
            held.close()
        for thread in self._threads.values():
            thread.close()
        if self._group is not None:
            self._group.close()
        if self._memory is not None:
            self._memory.close()
        self._network.close()
