"""``cpu.oversubscription``: more runnable threads of the target's own than it has CPUs."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence

from latencyprism.errors import TargetRefused
from latencyprism.inject.injection import Effect, Interval, Plan, Report
from latencyprism.inject.request import Request, share_of
from latencyprism.inject.target import wanted_cores
from latencyprism.inject.within import compete

_EVERY_NS = 200_000_000
_LOOK_S = 0.5
_SEVERAL_CORES = 1.5
"""Of a process that uses fewer, no two threads would compete however few CPUs it has."""


def oversubscribed(request: Request) -> Plan:
    """A target that computes on several threads gets fewer CPUs for part of the time; one that computes on a
    single thread gets a second one beside it, if it is Python."""
    used = wanted_cores(request.target.pid, _LOOK_S)
    if used < _SEVERAL_CORES:
        try:
            return compete(request)
        except TargetRefused as error:
            why = f"it keeps {used:.1f} cores busy, and a second thread cannot be put into it: {error}"
            raise TargetRefused(
                f"cannot crowd {request.target.pid}", why, "a target on several threads"
            ) from None
    return _narrowed(request, used)


def _narrowed(request: Request, used: float) -> Plan:
    pid = request.target.pid
    left, part = _fewer(used, request.strength_up_to(4.0))
    before = _affinities(pid)
    allowed = sorted(set().union(*before.values()) - {request.target.last_cpu})
    spec = {
        "kind": "narrow",
        "pid": pid,
        "cpus": [request.target.last_cpu, *allowed][:left],
        "before": before,
        "narrow_ns": int(part * _EVERY_NS),
        "every_ns": _EVERY_NS,
        "until_ns": request.until_ns(),
    }
    return Plan("holder.py", [spec], _narrow_intervals, _narrow_effect(used - left, left, part))


def _fewer(used: float, slow_down: float) -> tuple[int, float]:
    """(CPUs left, part of the time) that make work which keeps ``used`` cores busy take ``1 + slow_down``
    times as long: it advances at left/used of its speed in that part."""
    lost = share_of(slow_down)
    for left in range(math.ceil(used) - 1, 0, -1):
        part = lost / (1 - left / used)
        if part <= 1:
            return left, part
    return 1, 1.0


def _affinities(pid: int) -> dict[int, list[int]]:
    try:
        tids = [int(name) for name in os.listdir(f"/proc/{pid}/task")]
    except OSError:
        tids = []
    found: dict[int, list[int]] = {}
    for tid in tids:
        try:
            found[tid] = sorted(os.sched_getaffinity(tid))
        except OSError:
            continue  # it ended
    if pid not in found:
        raise TargetRefused(f"cannot disturb {pid}", "the CPUs of its threads cannot be read")
    return found


def _narrow_intervals(reports: Sequence[Report]) -> list[Interval]:
    return [
        Interval(int(r["begun_ns"]), int(r["ended_ns"]), f"narrowed {r['rounds']} times")
        for r in reports
        if "waited_ns" in r
    ]


def _narrow_effect(missing: float, left: int, part: float) -> Callable[[Sequence[Report], float], Effect]:
    """Threads wait for as many cores as are missing, while they are."""

    def effect(reports: Sequence[Report], _ran_s: float) -> Effect:
        ended = [report for report in reports if "waited_ns" in report]
        wall_ns = sum(report["ended_ns"] - report["begun_ns"] for report in ended)
        measured = sum(report["waited_ns"] for report in ended) / wall_ns if wall_ns else 0.0
        asked = missing * part
        errors = [str(report["error"]) for report in reports if "error" in report]
        text = f"its threads waited for {measured:.2f} cores, on {left} CPUs {100 * part:.0f} % of the time"
        return Effect(measured >= 0.3 * asked, measured, asked, "cores", "; ".join([text, *errors]))

    return effect
