"""Always-on: what keeps the threads of some processes from running, with who did it.

Everything is added up in the kernel. A wait of at least ``min_ns`` also becomes a record, in a ring that is
polled and wakes nobody. The deep level lowers that threshold and follows system calls.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from latencyprism.bpf import kernel
from latencyprism.bpf.btf import TYPEDEF, kernel_type
from latencyprism.bpf.loader import LoadedObject, read_object
from latencyprism.bpf.ring import RingBuffer
from latencyprism.bpf.waits import (
    INTERVAL_DTYPE,
    TOTALS_DTYPE,
    Intervals,
    Kind,
    SyscallTotals,
    syscall_classes,
    syscall_name,
)
from latencyprism.errors import BadInput, PrismError

MIN_NS, DEEP_MIN_NS = 50_000, 5_000
NEVER_NS = 1 << 62
RING_BYTES = 2 << 20
_MAX_TARGETS = 250
_INITIAL_PID_NAMESPACE = 0xEFFFFFFC


class Group(NamedTuple):
    """Tracepoints that are attached together. ``hit``: where the program counts them; ``raw``: those whose
    argument's type differs between kernels."""

    tracepoints: tuple[str, ...]
    hit: int
    raw: tuple[str, ...] = ()


GROUPS: dict[str, Group] = {
    "scheduler": Group(("sched_switch", "sched_waking"), 0),
    "interrupts": Group(("irq_handler_entry", "irq_handler_exit", "softirq_entry", "softirq_exit"), 3),
    "reclaim": Group(
        (
            "mm_vmscan_direct_reclaim_begin",
            "mm_vmscan_direct_reclaim_end",
            "mm_vmscan_memcg_reclaim_begin",
            "mm_vmscan_memcg_reclaim_end",
        ),
        4,
    ),
    "compaction": Group(("mm_compaction_begin", "mm_compaction_end"), 4),
    "oom": Group((), 4, ("mark_victim",)),
    "network": Group(("tcp_retransmit_skb",), 4),
    "frequency": Group(("cpu_frequency",), 4),
    "syscalls": Group(("sys_enter", "sys_exit"), 5),
}
ALWAYS = tuple(name for name in GROUPS if name != "syscalls")
HITS = ("switch", "mine", "waking", "interrupt", "rare", "syscall")
"""What the program counts of itself; ``mine``: switches of a watched thread, which do more."""
_HIT_SLOTS = 8
_FILTER_BYTES = 8192
_HIT_OF = {point: HITS[group.hit] for group in GROUPS.values() for point in (*group.tracepoints, *group.raw)}
_HIT_OF["sched_waking"] = "waking"


@cache
def _types_of(points: tuple[str, ...]) -> dict[str, int]:
    """Type number of each tracepoint that this kernel has; read once, because it takes a while."""
    found = kernel_type(TYPEDEF, [f"btf_trace_{point}" for point in points])
    return {name.removeprefix("btf_trace_"): number for name, number in found.items()}


class BelowProbe:
    """``start`` attaches, ``read`` hands over records, ``totals`` what adds up, ``stop`` detaches; also a
    context manager. One reader.

    Raises PrismError with a remedy when the scheduler cannot be traced. What else this kernel does not offer
    is named in ``missing`` and is then absent.
    """

    def __init__(
        self,
        pids: Iterable[int],
        *,
        min_ns: int = MIN_NS,
        ring_bytes: int = RING_BYTES,
        groups: Iterable[str] = ALWAYS,
    ) -> None:
        self.pids = tuple(dict.fromkeys(pids))
        if not 0 < len(self.pids) <= _MAX_TARGETS or min(self.pids) <= 0:
            raise BadInput(
                "cannot trace the scheduler", f"1 to {_MAX_TARGETS} processes, not {len(self.pids)}"
            )
        self.groups = tuple(dict.fromkeys(("scheduler", *groups)))
        self.missing: list[str] = []
        self._min_ns = min_ns
        self._ring_bytes = ring_bytes
        self._object: LoadedObject | None = None
        self._ring: RingBuffer | None = None
        self._links: dict[str, list[int]] = {}
        self._types: dict[str, int] = {}
        self._programs: dict[str, int] = {}
        self._aimed: set[int] = set()
        self._elements: dict[int, kernel.Element] = {}

    def __enter__(self) -> BelowProbe:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # -- life ------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Load what ``start`` will attach; about 0.1 s, most of it reading the kernel's type information."""
        if self._ring is not None:
            return
        if os.stat("/proc/self/ns/pid").st_ino != _INITIAL_PID_NAMESPACE:
            raise PrismError(
                "cannot trace the scheduler",
                "this process is in a pid namespace of its own",
                "Run on the host, or in a container with the host's pid namespace (--pid=host).",
            )
        classes = int.from_bytes(syscall_classes(), "little")
        self._object = LoadedObject(read_object("below"), {"classes": classes}, {"ring": self._ring_bytes})
        try:
            self._ring = RingBuffer(self._object.maps["ring"].descriptor, self._ring_bytes)
            points = [point for group in GROUPS.values() for point in group.tracepoints]
            self._types = _types_of(tuple(points))
            self._set_limits(self._min_ns, NEVER_NS)
            for name in (*self.groups, "syscalls"):
                self._load_group(name)
        except BaseException:
            self.stop()
            raise

    def aim(self, pids: Iterable[int]) -> None:
        """Make these processes the targets, and no others."""
        if self._object is None:
            return
        bits, wanted = bytearray(_FILTER_BYTES), set(pids)
        for pid in wanted:
            bits[pid >> 3 & _FILTER_BYTES - 1] |= 1 << (pid & 7)
            self._object.maps["targets"][pid] = bytes(4)
        self._object.maps[".data"][0] = bytes(bits)
        for pid in self._aimed - wanted:
            del self._object.maps["targets"][pid]
        self._aimed = wanted

    def _load_group(self, name: str) -> None:
        """A group that this kernel cannot have is named in ``missing``; the scheduler's must be there."""
        try:
            for point in GROUPS[name].tracepoints:
                if point not in self._types:
                    raise PrismError("cannot trace the kernel", f"this kernel has no tracepoint {point}")
                self._load(f"tp_btf/{point}", point, self._types[point])
            for point in GROUPS[name].raw:
                self._load(f"raw_tp/{point}", point, 0)
        except PrismError as error:
            if name == "scheduler":
                raise
            self.groups = tuple(kept for kept in self.groups if kept != name)
            self.missing.append(f"{name}: {error.why or error.what}")

    def _load(self, section: str, point: str, number: int) -> None:
        if point in self._programs or self._object is None:
            return
        if number:
            self._programs[point] = self._object.load(
                section, kernel.PROG_TRACING, kernel.ATTACH_RAW_TP, attach_btf_id=number
            )
        else:
            self._programs[point] = self._object.load(section, kernel.PROG_RAW_TRACEPOINT)

    def start(self) -> None:
        """Attach and check; some milliseconds once prepared."""
        self.prepare()
        if self._links or self._object is None:
            return
        own = os.getpid()
        try:
            self._set_limits(0, NEVER_NS)
            self.aim([own])
            self._attach("scheduler")
            self._check_relocation()
            self.aim([])
            self.forget([own])
            self.read()
            self._set_limits(self._min_ns, NEVER_NS)
            self.aim(self.pids)
            for name in [name for name in self.groups if name != "scheduler"]:
                self.attach(name)
        except BaseException:
            self.stop()
            raise

    def attach(self, name: str) -> bool:
        """Attach a group, such as ``syscalls``; False, and named in ``missing``, if the kernel refuses."""
        if name in self._links or self._object is None:
            return name in self._links
        if name == "scheduler":
            # What was known of waits when it was detached is no longer true.
            self.forget(self.totals())
        before = len(self.missing)
        if name not in self.groups:
            self._load_group(name)
        if len(self.missing) > before:
            return False
        try:
            self._attach(name)
        except PrismError as error:
            self.missing.append(f"{name}: {error.why or error.what}")
            return False
        return True

    def _attach(self, name: str) -> None:
        links = self._links[name] = []
        try:
            group = GROUPS[name]
            links.extend(kernel.link_tracing(self._programs[p], p) for p in group.tracepoints)
            links.extend(kernel.link_raw_tracepoint(self._programs[p], p) for p in group.raw)
        except BaseException:
            self.detach(name)
            raise

    def detach(self, name: str) -> None:
        """Take one group's tracepoints away; what it counted stays readable."""
        for link in self._links.pop(name, []):
            with suppress(OSError):
                os.close(link)

    @property
    def attached(self) -> tuple[str, ...]:
        return tuple(self._links)

    def _check_relocation(self) -> None:
        """Our own sleep must come out as ours and as a sleep: wrong offsets would show something else."""
        for _ in range(5):
            time.sleep(0.001)
            seen = self.read()
            mine = seen[seen["tgid"] == os.getpid()]
            if np.any((mine["kind"] == Kind.SLEEP) & (mine["end_ns"] > mine["start_ns"])):
                return
        raise PrismError(
            "cannot trace the scheduler",
            "the program does not see its own process sleep: its structure offsets are wrong",
            kernel.KERNEL,
        )

    def stop(self) -> Intervals:
        """Detach, hand over the rest and give everything back; safe to repeat."""
        for name in list(self._links):
            self.detach(name)
        rest = self.read()
        if self._ring is not None:
            self._ring.close()
            self._ring = None
        if self._object is not None:
            self._object.close()
        return rest

    # -- level -----------------------------------------------------------------------------------

    def go_deep(self, min_ns: int = DEEP_MIN_NS, syscalls: bool = True) -> None:
        """Record shorter waits, and with ``syscalls`` follow the targets' system calls. That slows every
        system call on the machine by some 100 ns, so it is for seconds."""
        self._set_limits(min_ns, min_ns if syscalls else NEVER_NS)
        if syscalls:
            self.attach("syscalls")

    def go_back(self) -> None:
        """Return to the always-on level."""
        self.detach("syscalls")
        self._set_limits(self._min_ns, NEVER_NS)

    def _set_limits(self, min_ns: int, syscall_min_ns: int) -> None:
        if self._object is not None:
            value = min_ns.to_bytes(8, "little") + syscall_min_ns.to_bytes(8, "little")
            self._object.maps["settings"][0] = value

    # -- reading ---------------------------------------------------------------------------------

    @property
    def lost(self) -> int:
        """Records that found the ring full: they are in the totals all the same."""
        return self._object.counter("lost") if self._object else 0

    @property
    def untracked(self) -> int:
        """Waits of threads for which the program had no room."""
        return self._object.counter("untracked") if self._object else 0

    def read(self) -> Intervals:
        """Records since the last call, as an array of INTERVAL_DTYPE; those of the machine have tgid 0."""
        return self._ring.array(INTERVAL_DTYPE) if self._ring is not None else np.empty(0, INTERVAL_DTYPE)

    def thread_totals(self, tid: int) -> np.void | None:
        """The totals of one thread; None if it was not seen yet. One system call."""
        if self._object is None or self._ring is None:
            return None
        element = self._elements.get(tid)
        if element is None:
            threads = self._object.maps["threads"]
            key = tid.to_bytes(4, "little")
            element = self._elements[tid] = kernel.Element(threads.descriptor, key, threads.value_size)
        if not element.read():
            return None
        found: np.void = np.frombuffer(element.value, TOTALS_DTYPE, 1).copy()[0]
        return found

    def totals(self) -> dict[int, np.void]:
        """{tid: totals} of all threads seen, in a few system calls."""
        if self._object is None or self._ring is None:
            return {}
        threads = self._object.maps["threads"]
        keys, values = kernel.map_all(threads.descriptor, 4, threads.value_size, threads.entries)
        if not keys:
            return {}
        tids = np.frombuffer(keys, "<i4")
        rows = np.frombuffer(values, np.uint8).reshape(len(tids), threads.value_size)
        packed = np.ascontiguousarray(rows[:, : TOTALS_DTYPE.itemsize]).view(TOTALS_DTYPE)[:, 0]
        return dict(zip(tids.tolist(), packed))

    def forget(self, tids: Iterable[int]) -> None:
        """Drop what is known of threads."""
        if self._object is not None:
            for tid in tids:
                del self._object.maps["threads"][tid]

    def syscalls(self) -> list[SyscallTotals]:
        """System calls of the targets by thread since the deep level was first entered."""
        if self._object is None or self._ring is None:
            return []
        calls = self._object.maps["calls"]
        keys, values = kernel.map_all(calls.descriptor, 8, 24, calls.entries)
        pairs = np.frombuffer(keys, "<u4").reshape(-1, 2).tolist()
        sums = np.frombuffer(values, "<u8").reshape(-1, 3).tolist()
        return [SyscallTotals(tid, syscall_name(n), *row) for (tid, n), row in zip(pairs, sums)]

    def run_times(self) -> dict[str, tuple[int, int]]:
        """{name in HITS: (ns, runs)} by the kernel's clock, while ``kernel.run_time_statistics`` is on."""
        found: dict[str, tuple[int, int]] = {}
        for point, program in self._programs.items():
            name = _HIT_OF.get(point, "")
            ns, runs = kernel.run_time(program)
            known = found.get(name, (0, 0))
            found[name] = (known[0] + ns, known[1] + runs)
        return found

    def hits(self) -> Mapping[str, int]:
        """How often each part of the program ran, since the start, on all CPUs; by the names in HITS."""
        if self._object is None or self._ring is None:
            return {}
        cpus = self._object.maps["cpus"]
        each = cpus.value_size + 7 & ~7
        data = kernel.map_lookup(cpus.descriptor, bytes(4), each * kernel.possible_cpus()) or b""
        rows: npt.NDArray[np.uint8] = np.frombuffer(data, np.uint8).reshape(-1, each)
        counted = np.ascontiguousarray(rows[:, : 8 * _HIT_SLOTS]).view("<u8").sum(axis=0)
        return dict(zip(HITS, (int(count) for count in counted)))
