"""What is seen below one replica's interpreter while it is watched: always on within a budget, deeper while a
capture is open, joined to its steps."""

from __future__ import annotations

import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import cache, lru_cache
from typing import Any

import numpy as np

from latencyprism.bpf.below import BelowProbe
from latencyprism.bpf.budget import ALWAYS_SHARE, DEEP_SHARE, BelowBudget
from latencyprism.bpf.prices import measure_tracepoints
from latencyprism.bpf.waits import INTERVAL_DTYPE, Intervals, SyscallTotals
from latencyprism.errors import PrismError
from latencyprism.host.held import read_once
from latencyprism.host.processes import thread_name
from latencyprism.records import Span, Step
from latencyprism.sentinel.runtime_dive import RuntimeDive, RuntimeDives
from latencyprism.timeline.attribution import API, Attribution, Roles, machine_spans, to_spans

HORIZON_NS = 60_000_000_000
MOST_KEPT = 400_000
MOST_CALLS = 40
LOOK_PERIOD_NS = 2_000_000_000
RETRY_NS = 60_000_000_000
LEAST_SPAN_NS = 100_000


@cache
def _prices() -> dict[str, float]:
    """Once in the life of a watch: some tenths of a second."""
    return measure_tracepoints()


def prepare() -> None:
    """Find out beforehand what takes long to find out, so that an engine's steps do not wait for it."""
    with suppress(PrismError):  # said where a BelowWatch is made
        _prices()


class BelowWatch:
    """``fill`` gives steps what was seen below; ``tick`` about once a second keeps the budget.

    Raises PrismError where the kernel or the rights do not suffice. ``roles`` as ``Replica.roles`` tells it:
    the API server, for which no step waits, is looked at while a capture is open, and its sockets count.
    """

    def __init__(self, roles: Mapping[int, str]) -> None:
        prices = _prices()
        self._processes = dict(roles)
        watched = [pid for pid, role in roles.items() if role != API]
        self.probe = BelowProbe(watched)
        self.on_taken: Callable[[Intervals], None] | None = None
        """Gets each batch of records as it comes."""
        self._kept: deque[Intervals] = deque()
        self._rows = 0
        self._deep = 0
        self._calls_before: dict[tuple[int, str], SyscallTotals] = {}
        self._calls: list[dict[str, Any]] = []
        self._looked_ns = self._retry_ns = 0
        self.probe.start()
        self._roles = Roles.of(self._processes)
        self._attribution = Attribution(self._roles, time.monotonic_ns())
        self.runtimes = RuntimeDives({pid: role for pid, role in roles.items() if role != API})
        self._runtime: RuntimeDive | None = None
        self._always = BelowBudget(self.probe, prices, ALWAYS_SHARE)
        self._deeper = BelowBudget(self.probe, prices, DEEP_SHARE)

    # -- steps -----------------------------------------------------------------------------------

    def fill(self, steps: list[Step], threads: Iterable[tuple[int, int]] = ()) -> list[Step]:
        """The steps with what is known of them; unchanged where nothing is. ``threads``: (process, thread) of
        the loops that emit them, in the target's own numbers, where the source can tell."""
        if not steps or "scheduler" not in self.probe.attached:
            return steps
        self._follow(frozenset(host_tid(*pair) for pair in threads))
        self._update()
        return self._attribution.fill(steps)

    def _follow(self, loops: frozenset[int]) -> None:
        """A loop that is another thread than was thought: from now on it is the one."""
        if not loops or loops == self._roles.loop:
            return
        self._begin(Roles.of(self._processes, loops))

    def _update(self) -> None:
        now_ns = time.monotonic_ns()
        self._take(now_ns, self._totals(self._attribution.tids))

    def _totals(self, tids: Iterable[int]) -> dict[int, np.void]:
        found = ((tid, self.probe.thread_totals(tid)) for tid in tids)
        return {tid: row for tid, row in found if row is not None}

    # -- keeping ---------------------------------------------------------------------------------

    def drain(self) -> None:
        """Take new records over from the ring; they are kept for a minute. Call at least once a second."""
        self._take(time.monotonic_ns(), {})

    def _take(self, now_ns: int, totals: Mapping[int, np.void]) -> None:
        found = self.probe.read()
        self._attribution.update(now_ns, totals, found)
        if len(found):
            self._kept.append(found)
            if self.on_taken is not None:
                self.on_taken(found)
            self._rows += len(found)
            oldest_ns = int(found["end_ns"][-1]) - HORIZON_NS
            while self._kept and (self._rows > MOST_KEPT or int(self._kept[0]["end_ns"][-1]) < oldest_ns):
                self._rows -= len(self._kept.popleft())

    def tick(self, now_ns: int) -> None:
        """Keep the ring from filling up and the probes within their budget."""
        if now_ns - self._looked_ns < LOOK_PERIOD_NS:
            return
        self._looked_ns = now_ns
        self._update()
        if self._deep:
            self._deeper.look(now_ns)
        elif self._always.look(now_ns):
            self._retry_ns = now_ns + RETRY_NS
        elif self._always.budget.given_up and now_ns >= self._retry_ns:
            self._take_back()

    def _take_back(self) -> None:
        """Groups given up for the budget are tried again; what threads did meanwhile is not known."""
        if "scheduler" in self._always.take_back():
            self._begin(self._roles)

    def _begin(self, roles: Roles) -> None:
        """Attribute from now on, for these roles."""
        self.drain()
        self._roles = roles
        base = self._totals(roles.critical)
        self._attribution = Attribution(roles, time.monotonic_ns(), base)

    # -- deeper ----------------------------------------------------------------------------------

    def go_deep(self) -> None:
        """Shorter waits and system calls, and what was given up for the smaller budget, until as many
        ``go_back`` were called."""
        self._deep += 1
        if self._deep == 1:
            self._take_back()
            self._calls_before = {(c.tid, c.name): c for c in self.probe.syscalls()}
            self.probe.aim(self._processes)  # the API server, too, for as long as that lasts
            self.probe.go_deep()
            self._runtime = self.runtimes.begin()

    def go_back(self) -> None:
        self._deep -= 1
        if self._deep == 0:
            self.probe.go_back()
            self.probe.aim(self.probe.pids)
            if self._runtime is not None:
                self._runtime.finish()
            self._calls = self._calls_since()

    def _calls_since(self) -> list[dict[str, Any]]:
        """System calls of the deep look by thread, those that took the most time first."""
        found = []
        for call in self.probe.syscalls():
            before = self._calls_before.get((call.tid, call.name))
            calls = call.calls - (before.calls if before else 0)
            spent_ns = call.total_ns - (before.total_ns if before else 0)
            if calls > 0:
                found.append((spent_ns, calls, call))
        found.sort(key=lambda item: -item[0])
        return [
            {
                "tid": call.tid,
                "thread": thread_name(call.tid),
                "syscall": call.name,
                "calls": calls,
                "total_ms": round(spent_ns / 1e6, 3),
                "longest_ms": round(call.longest_ns / 1e6, 3),
            }
            for spent_ns, calls, call in found[:MOST_CALLS]
        ]

    # -- telling ---------------------------------------------------------------------------------

    @property
    def critical(self) -> frozenset[int]:
        """Threads that steps wait for."""
        return frozenset(self._roles.critical)

    def intervals(self, since_ns: int, until_ns: int) -> Intervals:
        """What was kept and overlaps that time."""
        kept = np.concatenate(list(self._kept)) if self._kept else np.empty(0, INTERVAL_DTYPE)
        return kept[(kept["end_ns"] >= since_ns) & (kept["start_ns"] <= until_ns)]

    def spans(self, since_ns: int, until_ns: int, deep_ns: int) -> list[Span]:
        """For a capture: waits of the threads that steps wait for, from ``since_ns`` on; of all others, and
        system calls, from ``deep_ns`` on; what happened to the machine; calls into accelerator runtimes."""
        found = self.intervals(since_ns, until_ns)
        critical = np.isin(found["tid"], list(self._roles.critical))
        chosen = found[critical | (found["end_ns"] >= deep_ns)]
        names = {int(tid): thread_name(int(tid)) for tid in np.unique(chosen["tid"]) if tid}
        sockets = socket_inodes(self._processes)
        calls = [] if self._runtime is None else self._runtime.spans()
        calls = [span for span in calls if span.end_ns >= since_ns and span.start_ns <= until_ns]
        return [*to_spans(chosen, names, LEAST_SPAN_NS), *machine_spans(found, sockets), *calls]

    def describe(self) -> dict[str, Any]:
        """What it cost and what it missed: the running estimate as a share of all CPUs."""
        always, deeper = self._always.budget.share, self._deeper.budget.share
        # A short recording is deep all the time.
        share = deeper if self._deep or always is None else always
        return {
            "estimated_share": None if share is None else round(share, 6),
            "budget": ALWAYS_SHARE,
            "attached": list(self.probe.attached),
            "lost": self.probe.lost,
            "untracked": self.probe.untracked,
            "syscalls": self._calls,
            "runtime_calls": [] if self._runtime is None else self._runtime.calls,
        }

    @property
    def missing(self) -> list[str]:
        """What this kernel does not offer, and what was given up for the budget."""
        calls = self.runtimes.missing + ([] if self._runtime is None else self._runtime.missing)
        return [f"below: {text}" for text in (*self.probe.missing, *calls)]

    def close(self) -> None:
        self.probe.stop()


@lru_cache(maxsize=256)
def host_tid(pid: int, tid: int) -> int:
    """The thread that process ``pid`` calls ``tid``, as it is called here: another number in a container."""
    own = read_once(f"/proc/{pid}/status", 4096) or b""
    inside = re.search(rb"^NSpid:\s+(\d+)((?:\s+\d+)*)$", own, re.MULTILINE)
    if inside is None or not inside[2].strip():
        return tid
    try:
        tasks = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return tid
    for task in tasks:
        status = read_once(f"/proc/{pid}/task/{task}/status", 4096) or b""
        found = re.search(rb"^NSpid:.*\s(\d+)$", status, re.MULTILINE)
        if found is not None and int(found[1]) == tid:
            return int(task)
    return tid


def socket_inodes(pids: Iterable[int]) -> frozenset[int]:
    """Numbers of the sockets that processes hold open."""
    found = set()
    for pid in pids:
        try:
            names = os.listdir(f"/proc/{pid}/fd")
        except OSError:
            continue
        for name in names:
            try:
                target = os.readlink(f"/proc/{pid}/fd/{name}")
            except OSError:
                continue
            if target.startswith("socket:["):
                found.add(int(target[8:-1]))
    return frozenset(found)
