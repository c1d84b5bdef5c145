"""Who else burns CPU on this machine, and on which CPU: so that a culprit can be named."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from typing import NamedTuple

from latencyprism.host.container import container_of_path, group_paths, short_cgroup
from latencyprism.host.held import read_once
from latencyprism.host.processes import parse_stat, process_cpu_ns
from latencyprism.records import Counter

SEEN = "neighbours_looked_ns"
"""Machine counter, cumulative: time covered by neighbour readings; a neighbour without a reading in a covered
stretch burnt less than ``least_share``."""

_MOST_NAMED = 8
_MOST_THREADS = 64


class Neighbour(NamedTuple):
    """``share``: cores burnt since the last look; ``cpus``: the same by CPU (where its threads were last);
    ``cgroup`` as ``short_cgroup`` names it."""

    pid: int
    name: str
    cgroup: str
    share: float
    cpus: dict[int, float]


class Neighbours:
    """Call ``sample`` once or twice a second: one system call a process, and details only for the few that
    burnt at least ``least_share`` of a core. At most ``budget_ns`` is spent on a call; on a machine with
    very many processes the rest are looked at on the following calls."""

    def __init__(
        self, exclude: Iterable[int] = (), least_share: float = 0.02, budget_ns: int = 10_000_000
    ) -> None:
        self._exclude = frozenset(exclude)
        self._least, self._budget_ns = least_share, budget_ns
        self._seen: dict[int, tuple[int, int]] = {}
        self._thread_ticks: dict[tuple[int, int], int] = {}
        self._looked_ns = 0
        self._last_ns: int | None = None
        self._resume_after = -1
        self.sample(time.monotonic_ns())

    def sample(self, now_ns: int) -> list[Neighbour]:
        """Those who burnt the most since the last look, most first."""
        burnt: list[tuple[float, int]] = []
        pids = self._pids()
        deadline = time.perf_counter_ns() + self._budget_ns
        for pid in pids:
            cpu_ns = process_cpu_ns(pid)
            if cpu_ns is None:
                continue
            before = self._seen.get(pid)
            if before is None and self._last_ns is not None and self._resume_after < 0:
                before = (self._last_ns, 0)  # born since: all it has burnt, it burnt since
            self._seen[pid] = (now_ns, cpu_ns)
            if before is not None and now_ns > before[0] and cpu_ns > before[1]:
                burnt.append(((cpu_ns - before[1]) / (now_ns - before[0]), pid))
            if time.perf_counter_ns() > deadline:
                self._resume_after = pid
                break
        else:
            self._resume_after = -1
            living = set(pids)
            self._seen = {pid: entry for pid, entry in self._seen.items() if pid in living}
        if self._last_ns is not None:
            self._looked_ns += now_ns - self._last_ns
        self._last_ns = now_ns
        burnt.sort(reverse=True)
        named = [self._describe(pid, share) for share, pid in burnt[:_MOST_NAMED] if share >= self._least]
        kept = {neighbour.pid for neighbour in named}
        self._thread_ticks = {key: ticks for key, ticks in self._thread_ticks.items() if key[0] in kept}
        return named

    def counters(self, now_ns: int) -> list[Counter]:
        """``sample`` as counters: tracks ``("neighbour <pid>", "<name>", "<cgroup>")``, names
        ``cpu<n>_share`` in cores, plus the machine's ``SEEN``."""
        found = self.sample(now_ns)
        out = [Counter(("machine",), SEEN, now_ns, self._looked_ns, "ns")]
        for neighbour in found:
            track = (f"neighbour {neighbour.pid}", neighbour.name, neighbour.cgroup)
            out += [
                Counter(track, f"cpu{cpu}_share", now_ns, s, "cores") for cpu, s in neighbour.cpus.items()
            ]
        return out

    def _pids(self) -> list[int]:
        """Every process but the excluded, beginning behind where the last call ran out of time."""
        pids = sorted(int(name) for name in os.listdir("/proc") if name.isdigit())
        pids = [pid for pid in pids if pid not in self._exclude]
        after = [pid for pid in pids if pid > self._resume_after]
        return after + pids[: len(pids) - len(after)]

    def _describe(self, pid: int, share: float) -> Neighbour:
        stat = parse_stat(read_once(f"/proc/{pid}/stat") or b"")
        name = stat[0] if stat else "?"
        weights = self._ticks_by_cpu(pid)
        total = sum(weights.values())
        if total > 0:
            cpus = {cpu: share * ticks / total for cpu, ticks in weights.items() if ticks > 0}
        else:
            cpus = {int(stat[1][36]): share} if stat else {}
        return Neighbour(pid, name, _cgroup(pid), share, cpus)

    def _ticks_by_cpu(self, pid: int) -> dict[int, int]:
        """Clock ticks that each thread burnt since it was last described, added up by its last CPU."""
        try:
            tids = [int(name) for name in os.listdir(f"/proc/{pid}/task")][:_MOST_THREADS]
        except OSError:
            return {}
        weights: dict[int, int] = {}
        for tid in tids:
            stat = parse_stat(read_once(f"/proc/{pid}/task/{tid}/stat") or b"")
            if stat is None:
                continue
            ticks = int(stat[1][11]) + int(stat[1][12])
            spent = ticks - self._thread_ticks.get((pid, tid), 0)
            self._thread_ticks[pid, tid] = ticks
            cpu = int(stat[1][36])
            weights[cpu] = weights.get(cpu, 0) + max(0, spent)
        return weights


def _cgroup(pid: int) -> str:
    """The most telling of a process's groups: its container, else the one with the longest path."""
    text = (read_once(f"/proc/{pid}/cgroup") or b"").decode("utf-8", "replace")
    paths = group_paths(text)
    told = next((path for path in paths if container_of_path(path) is not None), paths[0] if paths else "")
    return short_cgroup(told)
