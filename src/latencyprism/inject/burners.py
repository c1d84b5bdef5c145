"""Causes that burn something beside the target: its CPU, the memory bus, the disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from latencyprism.errors import BadInput, PrismError
from latencyprism.inject.injection import Effect, Interval, Plan, Report
from latencyprism.inject.request import Request, share_of

_PLAIN_PROCESSES = 3
_MOST_FOLLOWED = 4
_FAULT_NS = 200_000
"""What a major fault is taken to cost its thread: a read of some pages from a fast disk."""
_ENOUGH = 0.6
"""An injection that reached this share of what was asked has taken effect."""


def neighbour(request: Request) -> Plan:
    """``cpu.neighbour``. A pinned target gets its neighbour on that CPU; one that may wander is followed."""
    share = share_of(request.strength_up_to(4.0))
    target, realtime = request.target, _realtime_permitted()
    spec: dict[str, Any] = {
        "kind": "cpu",
        "share": share,
        "until_ns": request.until_ns(),
        "realtime": realtime,
    }
    if len(target.pinned) == 1:
        spec["cpus"] = sorted(target.pinned)
    else:
        spec["cpus"] = [target.last_cpu]
        spec["follow"] = target.stat_path
    # A plain busy process gets at most its fair part beside a spinning target: several get more.
    copies = 1 if realtime else _PLAIN_PROCESSES
    return Plan("burner.py", [dict(spec) for _ in range(copies)], _intervals, _cpu_effect(share, copies))


def bandwidth(request: Request) -> Plan:
    """``memory.bandwidth``: on the CPUs that the target's busiest thread is not on, two at most; in the time
    that nobody else wants there, since else it would be a neighbour to the target's other threads."""
    share = request.strength_up_to(1.0)
    spec = {"kind": "memory", "share": share, "yields": True, "until_ns": request.until_ns()}
    specs = [{**spec, "cpus": [cpu]} for cpu in _other_cpus(request)[:2]]
    return Plan("burner.py", specs, _intervals, _cpu_effect(share, len(specs)))


def disk(request: Request) -> Plan:
    """``disk.stall``: synchronous writes on the file system of ``directory``."""
    share = request.strength_up_to(1.0)
    directory = os.path.realpath(request.directory)
    try:
        os.close(os.open(directory, os.O_RDWR | os.O_TMPFILE, 0o600))
    except OSError as error:
        raise BadInput(
            f"cannot write to {directory}", error.strerror or str(error), "--directory names one on a disk"
        ) from error
    cpus = sorted(os.sched_getaffinity(0))
    spec = {
        "kind": "disk",
        "share": share,
        "until_ns": request.until_ns(),
        "directory": directory,
        "cpus": cpus,
    }
    return Plan("burner.py", [spec], _intervals, _disk_effect)


def reclaim(request: Request) -> Plan:
    """``memory.reclaim``: pages of the files that the target has mapped are taken back."""
    lost = share_of(request.strength_up_to(4.0))
    spec = {
        "kind": "reclaim",
        "share": 1.0,
        "lost": lost,
        "fault_ns": _FAULT_NS,
        "pid": request.target.pid,
        "until_ns": request.until_ns(),
        "cpus": sorted(os.sched_getaffinity(0)),
    }
    return Plan("burner.py", [spec], _intervals, _fault_effect(lost))


def _fault_effect(lost: float) -> Callable[[Sequence[Report], float], Effect]:
    def effect(reports: Sequence[Report], ran_s: float) -> Effect:
        ended = [report for report in reports if "ended_ns" in report]
        faults = float(sum(report.get("faults", 0) for report in ended))
        taken = sum(report.get("bytes", 0) for report in ended) >> 20
        asked = lost * ran_s * 1e9 / _FAULT_NS
        text = f"{faults:.0f} major faults (asked: {asked:.0f}) after {taken} MiB were taken back"
        if any(report.get("refused") for report in ended):
            text += "; the kernel does not let this user take pages of that process"
        return Effect(faults >= _ENOUGH * asked, faults, asked, "major faults", text)

    return effect


def _other_cpus(request: Request) -> list[int]:
    avoid = request.target.pinned if len(request.target.pinned) == 1 else {request.target.last_cpu}
    others = sorted(set(os.sched_getaffinity(0)) - set(avoid))
    if not others:
        raise PrismError("cannot inject memory.bandwidth", "there is no CPU beside the target's")
    return others


def _realtime_permitted() -> bool:
    """Asked of the kernel by a process that ends at once: this one's own priority stays as it is."""
    child = os.posix_spawn("/bin/true", ["true"], {})
    try:
        os.sched_setscheduler(child, os.SCHED_FIFO, os.sched_param(1))
    except OSError:
        return False
    finally:
        os.waitpid(child, 0)
    return True


def _intervals(reports: Sequence[Report]) -> list[Interval]:
    return [
        Interval(int(r["begun_ns"]), int(r["ended_ns"]), f"{r['cpu_ns'] / 1e6:.0f} ms of CPU burnt")
        for r in reports
        if "ended_ns" in r
    ]


def _cpu_effect(share: float, copies: int) -> Callable[[Sequence[Report], float], Effect]:
    def effect(reports: Sequence[Report], _ran_s: float) -> Effect:
        ended = [report for report in reports if "ended_ns" in report]
        wall_ns = max((r["ended_ns"] - r["begun_ns"] for r in ended), default=0)
        measured = sum(r["cpu_ns"] for r in ended) / wall_ns if wall_ns else 0.0
        realtime = bool(ended) and all(report["realtime"] for report in ended)
        kind = "real-time" if realtime else "plain"
        text = f"got {100 * measured:.0f} % of a CPU (asked: {copies} x {100 * share:.0f} %, {kind})"
        return Effect(measured >= _ENOUGH * share, measured, share, "cores", text)

    return effect


def _disk_effect(reports: Sequence[Report], _ran_s: float) -> Effect:
    written = float(sum(report["rounds"] for report in reports if "ended_ns" in report))
    return Effect(written > 0, written, 1.0, "MiB", f"{written:.0f} MiB written synchronously")
