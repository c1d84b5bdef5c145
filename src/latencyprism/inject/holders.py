"""Causes that hold the target itself back, and must let it go: stops and a CPU quota."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Sequence

from latencyprism.errors import BadInput, PrismError, TargetRefused
from latencyprism.host.cgroup import CpuMount, find_cpu_mount, parse_membership
from latencyprism.host.held import read_once
from latencyprism.inject.injection import Effect, Interval, Plan, Report
from latencyprism.inject.request import Request, share_of
from latencyprism.inject.target import cpu_cores

_LONGEST_STOP_MS = 5000.0
_PERIOD_US = 100_000
_LEAST_QUOTA_US = 2_000
_LOOK_S = 0.5


def stalled(request: Request) -> Plan:
    """``peer.stalled``: SIGSTOP and SIGCONT by a helper, undone by that helper's own keeper."""
    stop_ms = request.stop_ms
    if stop_ms is None:
        stop_ms = share_of(request.strength_up_to(1.0)) * request.every_s * 1e3
    if not 0 < stop_ms <= _LONGEST_STOP_MS:
        raise BadInput("--stop-ms is out of range", f"{stop_ms} ms", f"at most {_LONGEST_STOP_MS:.0f} ms")
    if not stop_ms / 1e3 * 2 <= request.every_s <= 600:
        raise BadInput(
            "--every-s is out of range", f"{request.every_s} s", "at least twice the stop, at most 600 s"
        )
    pid = request.target.pid
    try:
        pidfd = os.pidfd_open(pid)
    except OSError as error:
        raise TargetRefused(f"cannot stop {pid}", error.strerror or str(error)) from error
    spec = {
        "kind": "stop",
        "pid": pid,
        "pidfd": pidfd,
        "stop_ns": int(stop_ms * 1e6),
        "every_ns": int(request.every_s * 1e9),
        "until_ns": request.until_ns(),
    }
    effect = _stop_effect(request.every_s)
    return Plan("holder.py", [spec], _stops, effect, (pidfd,), lambda: os.close(pidfd))


def _stops(reports: Sequence[Report]) -> list[Interval]:
    return [Interval(int(r["begun_ns"]), int(r["ended_ns"]), "stopped") for r in reports if r.get("stopped")]


def _stop_effect(every_s: float) -> Callable[[Sequence[Report], float], Effect]:
    def effect(reports: Sequence[Report], ran_s: float) -> Effect:
        stops = _stops(reports)
        asked = max(1.0, ran_s / every_s - 1)
        total_ms = sum(stop.end_ns - stop.start_ns for stop in stops) / 1e6
        text = f"{len(stops)} stops seen (asked: about {asked:.0f}), {total_ms:.0f} ms altogether"
        return Effect(len(stops) >= 0.6 * asked, len(stops), asked, "stops", text)

    return effect


def quota(request: Request) -> Plan:
    """``cpu.quota``: a group below the target's own (v1) or beside it (v2), with a CPU limit."""
    lost = share_of(request.strength_up_to(4.0))
    pid = request.target.pid
    mount = find_cpu_mount()
    text = (read_once(f"/proc/{pid}/cgroup") or b"").decode("utf-8", "replace")
    path = parse_membership(text, mount.version) if mount is not None else None
    if mount is None or path is None:
        raise PrismError("cannot inject cpu.quota", "no CPU controller of control groups is mounted")
    home = _directory(mount, path)
    used = cpu_cores(pid, _LOOK_S)
    limit_us = max(_LEAST_QUOTA_US, int(used * (1 - lost) * _PERIOD_US))
    directory = _make_group(mount, home, limit_us)
    spec = {
        "kind": "group",
        "pid": pid,
        "directory": directory,
        "home": home,
        "until_ns": request.until_ns(),
    }

    def undo() -> None:
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(directory)

    return Plan("holder.py", [spec], _stays, _quota_effect(limit_us / _PERIOD_US), (), undo)


def _directory(mount: CpuMount, path: str) -> str:
    inside = path[len(mount.root) :] if mount.root != "/" and path.startswith(mount.root) else path
    parts = [part for part in inside.split("/") if part not in ("", "..")]
    return os.path.join(mount.directory, *parts)


def _make_group(mount: CpuMount, home: str, limit_us: int) -> str:
    # On v2 a group with processes in it cannot have limited children; its parent already can.
    above = os.path.dirname(home) if mount.version == 2 and home != mount.directory else home
    directory = os.path.join(above, f"latencyprism-{secrets.token_hex(4)}")
    if mount.version == 2:
        limits = {"cpu.max": f"{limit_us} {_PERIOD_US}"}
    else:
        limits = {"cpu.cfs_period_us": str(_PERIOD_US), "cpu.cfs_quota_us": str(limit_us)}
    try:
        os.mkdir(directory)
        for name, value in limits.items():
            with open(os.path.join(directory, name), "w", encoding="ascii") as file:
                file.write(value)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.rmdir(directory)
        why = f"the CPU controller cannot be written: {error.strerror}"
        raise PrismError("cannot inject cpu.quota", why, "it needs root outside of a container") from error
    return directory


def _stays(reports: Sequence[Report]) -> list[Interval]:
    return [
        Interval(int(r["begun_ns"]), int(r["ended_ns"]), f"throttled for {r['throttled_ns'] / 1e6:.0f} ms")
        for r in reports
        if "throttled_ns" in r
    ]


def _quota_effect(limit_cores: float) -> Callable[[Sequence[Report], float], Effect]:
    def effect(reports: Sequence[Report], _ran_s: float) -> Effect:
        stays = [report for report in reports if "throttled_ns" in report]
        periods = float(sum(report["periods"] for report in stays))
        throttled_ms = sum(report["throttled_ns"] for report in stays) / 1e6
        errors = [str(report["error"]) for report in reports if "error" in report]
        text = f"throttled in {periods:.0f} periods, {throttled_ms:.0f} ms, at {limit_cores:.2f} cores"
        return Effect(periods > 0, periods, 1.0, "throttled periods", "; ".join([text, *errors]))

    return effect
