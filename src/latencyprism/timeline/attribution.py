"""Waits of threads, joined to the steps in whose time they fall: how long, of which kind, whose, by whom.

A wait that spans several steps is split between them. Waits too short for a record of their own come from
the totals of their thread: what these grew by between two readings, less what the records said, is spread
evenly over that stretch of time. So nothing is left out, records lost to a full ring included.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict, deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from latencyprism.bpf.waits import (
    ASLEEP,
    RUNNABLE,
    STOLEN,
    TOTALS,
    Intervals,
    Kind,
    comm,
    syscall_classes,
    syscall_name,
)
from latencyprism.records import STEP_COLUMNS, Span, Step

LOOP, WORKER, API, OTHER = "engine loop", "worker", "API server", "other"
ROLES = (LOOP, WORKER, API, OTHER)
HORIZON_NS = 20_000_000_000


@dataclass(frozen=True)
class Roles:
    """Which thread does what. ``loop``: those that emit steps; ``workers``: main threads of worker processes;
    ``processes``: {pid: role in words} as ``Replica.roles`` tells it."""

    loop: frozenset[int]
    workers: frozenset[int] = frozenset()
    processes: Mapping[int, str] = field(default_factory=dict)

    @classmethod
    def of(cls, processes: Mapping[int, str], loop: Iterable[int] = ()) -> Roles:
        """Without ``loop``, the main thread of every process that is no worker and no API server."""
        workers = frozenset(pid for pid, role in processes.items() if role.startswith("Worker"))
        known = frozenset(loop) or frozenset(
            pid for pid, role in processes.items() if pid not in workers and role != API
        )
        return cls(known, workers - known, dict(processes))

    @property
    def critical(self) -> frozenset[int]:
        """The threads that a step waits for."""
        return self.loop | self.workers

    def of_thread(self, tid: int, tgid: int) -> str:
        """One of ``ROLES``."""
        if tid in self.loop:
            return LOOP
        if tid in self.workers:
            return WORKER
        return API if self.processes.get(tgid) == API else OTHER


_Shares: TypeAlias = list[float]
"""Of one thread in one step: ns in the run queue, ns throttled, major faults, ns off-CPU."""
_QUEUED, _THROTTLED, _FAULTS, _ASLEEP = range(4)
_NONE = -1
_COLUMN_OF = tuple(
    _THROTTLED if kind == Kind.THROTTLED
    else _QUEUED if kind < Kind.THROTTLED
    else _ASLEEP if kind <= Kind.OTHER
    else _NONE
    for kind in range(TOTALS)
)  # fmt: skip


class _Short(NamedTuple):
    """Waits without a record, spread over a stretch of time: (column, ns)."""

    start_ns: int
    end_ns: int
    ns: tuple[tuple[int, float], ...]


class _Thread:
    """One thread's records (start, end, kind, major faults), and what its totals say beyond them."""

    def __init__(self, since_ns: int, base: np.void | None) -> None:
        self.records: deque[tuple[int, int, int, int]] = deque()
        self.short: deque[_Short] = deque()
        self._recorded = [0] * TOTALS
        self._beyond: list[int] = [0] * TOTALS if base is None else base["ns"].tolist()
        self._read_ns = since_ns

    def add(self, own: Intervals) -> None:
        # Some records a step: plain Python is quicker than arrays of that size.
        columns = (own[name].tolist() for name in ("start_ns", "end_ns", "kind", "culprit_tid"))
        for start, end, kind, faults in zip(*columns):
            if kind < TOTALS:
                self._recorded[kind] += end - start
                self.records.append((start, end, kind, 0))
            elif kind == Kind.FAULTS:
                self.records.append((start, end, kind, faults))

    def read(self, now_ns: int, totals: np.void) -> None:
        """Records are newer than the totals: what they seem to be ahead by is never counted twice."""
        whole: list[int] = totals["ns"].tolist()
        found: list[tuple[int, float]] = []
        for kind, spent in enumerate(whole):
            beyond = spent - self._recorded[kind]
            if beyond > self._beyond[kind]:
                if _COLUMN_OF[kind] != _NONE:
                    found.append((_COLUMN_OF[kind], float(beyond - self._beyond[kind])))
                self._beyond[kind] = beyond
        if found and now_ns > self._read_ns:
            self.short.append(_Short(self._read_ns, now_ns, tuple(found)))
        self._read_ns = now_ns

    def forget(self, before_ns: int) -> None:
        while self.records and self.records[0][1] < before_ns:
            self.records.popleft()
        while self.short and self.short[0].end_ns < before_ns:
            self.short.popleft()

    def shares(self, starts: Sequence[int], ends: Sequence[int]) -> list[_Shares]:
        """For each of the stretches of time, both lists ascending, what fell into it, by column."""
        rows: list[_Shares] = [[0.0, 0.0, 0, 0.0] for _ in starts]
        begin, count = starts[0], len(starts)
        for start, end, kind, faults in reversed(self.records):
            if end < begin:
                break
            if kind == Kind.FAULTS:
                # Where most of it lies, whatever steps are asked about together.
                middle = (start + end) // 2
                at = bisect_right(ends, middle)
                if at < count and starts[at] <= middle:
                    rows[at][_FAULTS] += faults
                continue
            column = _COLUMN_OF[kind]
            if column == _NONE:
                continue
            at = bisect_right(ends, start)
            while at < count and starts[at] < end:
                rows[at][column] += min(end, ends[at]) - max(start, starts[at])
                at += 1
        for stretch in reversed(self.short):
            if stretch.end_ns <= begin:
                break
            at = bisect_right(ends, stretch.start_ns)
            while at < count and starts[at] < stretch.end_ns:
                overlap = min(stretch.end_ns, ends[at]) - max(stretch.start_ns, starts[at])
                part = overlap / (stretch.end_ns - stretch.start_ns)
                for column, spent in stretch.ns:
                    rows[at][column] += spent * part
                at += 1
        return rows


class Attribution:
    """``update`` with what the probe says, then ``fill`` steps that ended before.

    It must get everything from ``since_ns`` on; of steps that began earlier nothing is known, and they stay
    as they are. ``base``: the totals at ``since_ns``, where the probe has run for longer.
    """

    def __init__(self, roles: Roles, since_ns: int, base: Mapping[int, np.void] | None = None) -> None:
        self.roles = roles
        self.since_ns = since_ns
        self._threads = {tid: _Thread(since_ns, (base or {}).get(tid)) for tid in roles.critical}

    @property
    def tids(self) -> list[int]:
        """The threads whose totals ``update`` wants."""
        return list(self._threads)

    def update(self, now_ns: int, totals: Mapping[int, np.void], intervals: Intervals) -> None:
        """``totals`` read at ``now_ns``, ``intervals`` after them."""
        for tid, thread in self._threads.items():
            if len(intervals):
                own = intervals[intervals["tid"] == tid]
                if len(own):
                    thread.add(own)
            if tid in totals:
                thread.read(now_ns, totals[tid])
            thread.forget(now_ns - HORIZON_NS)

    def fill(self, steps: Sequence[Step]) -> list[Step]:
        """The steps with ``runqueue_ns``, ``throttled_ns`` and ``major_faults`` (the engine loop's,
        plus those of the worker that had the most, because a step waits for its slowest), and ``offcpu_ns``
        (the loop's own: it sleeps while workers work)."""
        known = [step for step in steps if step.start_ns >= self.since_ns]
        if not known:
            return list(steps)
        starts = [step.start_ns for step in known]
        ends = [step.end_ns for step in known]
        if starts != sorted(starts) or ends != sorted(ends):  # of several loops
            return [self.fill([step])[0] for step in steps]
        rows = zip(self._most(self.roles.loop, starts, ends), self._most(self.roles.workers, starts, ends))
        filled = (_with_waits(step, *row) for step, row in zip(known, rows))
        return [next(filled) if step.start_ns >= self.since_ns else step for step in steps]

    def _most(self, tids: Iterable[int], starts: Sequence[int], ends: Sequence[int]) -> list[_Shares]:
        """Each column of that thread which had most of it."""
        found = [self._threads[tid].shares(starts, ends) for tid in tids]
        if len(found) == 1:
            return found[0]
        if not found:
            return [[0.0, 0.0, 0, 0.0]] * len(starts)
        return [[max(column) for column in zip(*rows)] for rows in zip(*found)]


_RUNQUEUE, _GC = STEP_COLUMNS.index("runqueue_ns"), STEP_COLUMNS.index("gc_ns")
_AFTER = STEP_COLUMNS.index("major_faults") + 1


def _with_waits(step: Step, loop: _Shares, worker: _Shares) -> Step:
    # In the order of the columns: `_replace` takes several times as long.
    return Step._make((
        *step[:_RUNQUEUE],
        round(loop[_QUEUED]) + round(worker[_QUEUED]), round(loop[_ASLEEP]),
        round(loop[_THROTTLED]) + round(worker[_THROTTLED]), step[_GC],
        int(loop[_FAULTS] + worker[_FAULTS]), *step[_AFTER:],
    ))  # fmt: skip


class Wait(NamedTuple):
    """What of one kind fell into one step, by role of the thread that waited and by who is behind it."""

    step: int
    role: str
    kind: Kind
    ns: int
    culprit_pid: int
    culprit: str
    syscall: str


def by_step(steps: Sequence[Step], intervals: Intervals, roles: Roles) -> list[Wait]:
    """Every recorded wait of any thread, split between the steps it overlaps and added up; the longest of a
    step first. Steps of one engine loop, which do not overlap."""
    ordered = sorted(steps, key=lambda step: step.start_ns)
    starts = np.array([step.start_ns for step in ordered], np.int64)
    ends = np.array([step.end_ns for step in ordered], np.int64)
    sums: dict[tuple[int, str, int, int, str, str], int] = defaultdict(int)
    for row in intervals[intervals["kind"] <= Kind.SYSCALL]:
        begun, ended = int(row["start_ns"]), int(row["end_ns"])
        first = int(np.searchsorted(ends, begun, "right"))
        last = int(np.searchsorted(starts, ended, "left"))
        role = roles.of_thread(int(row["tid"]), int(row["tgid"]))
        kind, who = int(row["kind"]), int(row["culprit_tgid"])
        said = (comm(row["culprit"]) if who else "", syscall_name(int(row["syscall"])))
        for at in range(first, last):
            overlap = min(ended, int(ends[at])) - max(begun, int(starts[at]))
            sums[(ordered[at].step, role, kind, who, *said)] += overlap
    waits = [
        Wait(step, role, Kind(kind), ns, who, name, call)
        for (step, role, kind, who, name, call), ns in sums.items()
    ]
    return sorted(waits, key=lambda wait: (wait.step, -wait.ns))


def to_spans(intervals: Intervals, names: Mapping[int, str], least_ns: int = 0) -> list[Span]:
    """Spans on tracks ``("NAME TID", "sched")``, in the words that the rest of the tool knows:
    ``run-queue (after PID NAME)``, ``run-queue (throttled)``, ``off-CPU (futex)``. What lies over these has
    lanes of its own: ``syscall``, ``interrupts``, ``memory``. ``names``: {tid: thread name}."""
    kinds = intervals["kind"]
    lasting = intervals["end_ns"] - intervals["start_ns"] >= least_ns
    # A system call that is there to wait says nothing more than the wait itself.
    waiting = (kinds == Kind.SYSCALL) & np.isin(_kinds_of(intervals["syscall"]), _WAITING)
    drawn = intervals[(kinds <= Kind.SYSCALL) & lasting & ~waiting]
    drawn = drawn[np.lexsort((drawn["start_ns"], drawn["tid"]))]
    columns = (drawn[name].tolist() for name in _DRAWN)
    spans = []
    for tid, start_ns, end_ns, *told, value in zip(*columns):
        lane, name, details = _words(*told, value if told[0] in _BY_VALUE else 0)
        spans.append(Span((f"{names.get(tid, '?')} {tid}", lane), name, start_ns, end_ns, None, details))
    return spans


_DRAWN = ("tid", "start_ns", "end_ns", "kind", "syscall", "iowait", "culprit_tgid", "culprit", "value")
_BY_VALUE = frozenset(int(kind) for kind in STOLEN)
_WAITING = (Kind.FUTEX, Kind.SLEEP, Kind.POLL, Kind.CHILD)


def _kinds_of(numbers: npt.NDArray[np.int16]) -> npt.NDArray[np.uint8]:
    table = np.frombuffer(syscall_classes(), np.uint8)
    return table[np.clip(numbers, 0, len(table) - 1)]


@lru_cache(maxsize=8192)
def _words(
    number: int, syscall: int, iowait: int, who: int, culprit: bytes, value: int
) -> tuple[str, str, tuple[tuple[str, str | int | float], ...]]:
    """Lane, name and details: tens of thousands of waits are few different ones."""
    kind, said, call = Kind(number), comm(culprit), syscall_name(syscall)
    details: list[tuple[str, str | int | float]] = []
    if call and kind != Kind.SYSCALL:
        details.append(("syscall", call))
    if iowait:
        details.append(("waits_for", "block device"))
    if who and kind in (Kind.PREEMPTED, Kind.YIELDED, Kind.THROTTLED):
        details += [("preempted_by", who), ("preempted_by_comm", said)]
    elif who and kind in ASLEEP:
        details += [("woken_by", who), ("woken_by_comm", said)]
    if kind in RUNNABLE:
        lane, name = "sched", f"run-queue (after {f'{who} {said}' if who else 'idle'})"
    elif kind == Kind.THROTTLED:
        lane, name = "sched", "run-queue (throttled)"
    elif kind == Kind.SYSCALL:
        lane, name = "syscall", call
    elif kind in STOLEN:
        lane, name = "interrupts", said or f"{kind.label} {value}"
    elif kind > Kind.OTHER:
        lane, name = "memory", kind.label
    else:
        lane, name = "sched", f"off-CPU ({kind.label})"
    return lane, name, tuple(details)


def machine_spans(intervals: Intervals, sockets: Collection[int] = ()) -> list[Span]:
    """What happened to the machine, as moments on ``("machine", "events")``: memory given up by killing a
    process, CPU clocks that changed, and TCP segments sent again on one of ``sockets`` (inode numbers)."""
    found = []
    for row in intervals[intervals["kind"] >= Kind.OOM]:
        kind, value = int(row["kind"]), int(row["value"])
        who = int(row["culprit_tgid"])
        if kind == Kind.OOM:
            text = f"out of memory: process {who} {comm(row['culprit'])} is killed".replace("  ", " ")
        elif kind == Kind.FREQUENCY:
            text = f"CPU {int(row['culprit_tid'])} clocked at {value / 1e6:.2f} GHz"
        else:
            if (int(row["culprit_tid"]) & 0xFFFFFFFF) | (who & 0xFFFFFFFF) << 32 not in sockets:
                continue
            text = f"TCP segment sent again, port {value >> 16} to port {value & 0xFFFF}"
        at = int(row["start_ns"])
        found.append(Span(("machine", "events"), text, at, at))
    return found
