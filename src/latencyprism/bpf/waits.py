"""What a thread can wait for, as records and as totals: the vocabulary shared with ``below.bpf.c``."""

from __future__ import annotations

import enum
import platform
from functools import cache
from importlib import resources
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from latencyprism.errors import BadInput
from latencyprism.tomlfile import parse_toml

SYSCALLS = 512


class Kind(enum.IntEnum):
    """Why a thread did not run (to ``OTHER``), what took time from it while it had a CPU (to ``COMPACTION``),
    and what else is recorded. Numbers are those of the program."""

    PREEMPTED = 1
    """Ready to run, but another thread got the CPU: the culprit."""
    YIELDED = 2
    QUEUED = 3
    """Woken, waiting for a CPU; the culprit had it until then."""
    THROTTLED = 4
    """Its control group had used up its quota."""
    FUTEX = 5
    """A lock or a condition; from here to ``OTHER`` the culprit is who ended the wait."""
    SLEEP = 6
    POLL = 7
    READ = 8
    WRITE = 9
    SYNC = 10
    FILES = 11
    CHILD = 12
    DEVICE = 13
    MEMORY = 14
    FAULT = 15
    """In no system call: a page is being read, or memory is being made free."""
    STOPPED = 16
    OTHER = 17
    IRQ = 18
    SOFTIRQ = 19
    RECLAIM = 20
    COMPACTION = 21
    SYSCALL = 22
    """A whole system call, waits and work; only at the deep level."""
    FAULTS = 23
    OOM = 24
    FREQUENCY = 25
    RETRANSMIT = 26

    @property
    def label(self) -> str:
        return self.name.lower()


TOTALS = int(Kind.SYSCALL)
RUNNABLE = (Kind.PREEMPTED, Kind.YIELDED, Kind.QUEUED)
"""Ready, without a CPU: run-queue latency."""
ASLEEP = tuple(kind for kind in Kind if Kind.FUTEX <= kind <= Kind.OTHER)
STOLEN = (Kind.IRQ, Kind.SOFTIRQ)

INTERVAL_DTYPE = np.dtype(
    [
        ("start_ns", "<u8"),
        ("end_ns", "<u8"),
        ("tid", "<i4"),
        ("tgid", "<i4"),
        ("kind", "u1"),
        ("iowait", "u1"),
        ("syscall", "<i2"),
        ("value", "<u4"),
        ("culprit_tid", "<i4"),
        ("culprit_tgid", "<i4"),
        ("culprit", "S16"),
    ]
)
"""One wait of at least the threshold; times CLOCK_MONOTONIC ns. ``iowait``: 1 if it was for a block device.
``syscall``: its number, -1 outside of one. ``value``: the CPU; of IRQ and SOFTIRQ the interrupt; of FAULTS
the minor faults (and ``culprit_tid`` the major ones; a moment where they were slept for, else the time on
the CPU in which they fall); of FREQUENCY kHz (and ``culprit_tid`` the CPU); of
RETRANSMIT local and remote port (and the culprit's numbers the socket's inode)."""

TOTALS_DTYPE = np.dtype(
    [
        ("ns", "<u8", (TOTALS,)),
        ("count", "<u8", (TOTALS,)),
        ("iowait_ns", "<u8"),
        ("major_faults", "<u8"),
        ("minor_faults", "<u8"),
    ]
)
"""Since the probe began, of one thread: every wait, whether it became a record or not."""

Intervals = npt.NDArray[np.void]


class SyscallTotals(NamedTuple):
    """Of one thread and one system call: how often, how long in all, the longest."""

    tid: int
    name: str
    calls: int
    total_ns: int
    longest_ns: int


@cache
def _table(machine: str) -> tuple[dict[int, str], dict[int, Kind]]:
    text = resources.files("latencyprism.bpf").joinpath("syscalls.toml").read_text()
    names, kinds = {}, {}
    for kind, by_machine in parse_toml(text, "syscalls.toml").items():
        for name, number in by_machine.get(machine, {}).items():
            if not 0 <= number < SYSCALLS:
                raise BadInput("cannot read syscalls.toml", f"{name} has the number {number}")
            names[number] = name
            kinds[number] = Kind[kind.upper()]
    return names, kinds


def syscall_name(number: int, machine: str | None = None) -> str:
    """``fsync``, or ``syscall 333`` for one that no kind of wait is known of; empty for none."""
    if number < 0:
        return ""
    return _table(machine or platform.machine())[0].get(number, f"syscall {number}")


def syscall_number(name: str, machine: str | None = None) -> int | None:
    """The number of a system call on this machine, None if it has none by that name."""
    names = _table(machine or platform.machine())[0]
    return next((number for number, known in names.items() if known == name), None)


@cache
def syscall_classes(machine: str | None = None) -> bytes:
    """The program's table: kind of wait by number."""
    table = bytearray(SYSCALLS)
    for number, kind in _table(machine or platform.machine())[1].items():
        table[number] = kind
    return bytes(table)


def comm(raw: bytes) -> str:
    """A thread's name as the kernel gave it, made printable."""
    return "".join(c if c.isprintable() else "?" for c in bytes(raw).decode("utf-8", "replace"))
