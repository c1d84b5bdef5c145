"""CPU of the engine's control group, or of a named noisy neighbour's: a bounded change that is put back, also
when the watch is killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from latencyprism.errors import BadInput, PrismError
from latencyprism.host.cgroup import parse_membership, parse_mounts

RAISE, WEIGHT_MOST, SHARES_MOST = 4, 10_000, 262_144
CONFINED_CPUS = 0.25
LEAST_QUOTA_US = 1_000
MOST_CHANGES = 8
LEASE_S = 30.0
"""Changes are put back when ``Shield.renew`` was not called for so long."""


class Change(NamedTuple):
    """One file of a control group: what it says, what it shall say, in words what that does, and what may be
    expected of it (figures)."""

    path: Path
    before: str
    after: str
    text: str
    estimate: dict[str, float | None]


def raise_weight(pid: int) -> Change:
    """The share of the CPU of the group that a process is in, four times as large. PrismError where it is in
    the root group."""
    folder, version = group_of(pid)
    if version == 2:
        path, most = folder / "cpu.weight", WEIGHT_MOST
    else:
        path, most = folder / "cpu.shares", SHARES_MOST
    before = _read(path)
    if not before.isdigit():
        raise PrismError(f"cannot shield process {pid}", f"{path} says {before[:40]!r}")
    after = min(int(before) * RAISE, most)
    others = sum(_weights(folder, path))
    estimate: dict[str, float | None] = {
        "share_before": round(int(before) / (int(before) + others), 4),
        "share": round(after / (after + others), 4),
    }
    return Change(path, before, str(after), f"{path.name} of its group from {before} to {after}", estimate)


def _weights(folder: Path, path: Path) -> list[int]:
    """What it competes with where all want the CPU: groups beside this one, and processes of the group above,
    of which each has the weight of a group, as many as there are CPUs."""
    found = []
    for other in folder.parent.iterdir():
        if other != folder and (other / path.name).is_file():
            text = _read(other / path.name)
            found += [int(text)] if text.isdigit() else []
    loose = len(_read(folder.parent / "cgroup.procs").split())
    usual = 100 if path.name == "cpu.weight" else 1024
    return found + [usual] * min(loose, os.cpu_count() or 1)


def confine(group: Path, pids: Sequence[int] = (), cpus: float = CONFINED_CPUS) -> Change:
    """At most so many CPUs for a named group; never more than it had. BadInput where one of ``pids``, the
    engine's own processes, is in it."""
    if not group.is_absolute():
        raise BadInput(f"{group} is no control group", "give its absolute folder")
    group = group.resolve()
    quota, period, path = _quota(group)
    inside = [pid for pid in pids if _holds(group, pid)]
    if inside:
        why = f"process {inside[0]} of the engine is in it"
        raise BadInput(f"{group} is not confined", why, "name the group of another")
    wanted = max(int(cpus * period), LEAST_QUOTA_US)
    before = _read(path)
    after = wanted if quota is None else min(quota, wanted)
    text = f"{group} confined to {after / period:.2f} CPUs"
    estimate: dict[str, float | None] = {
        "cpus_before": None if quota is None else round(quota / period, 3),
        "cpus": round(after / period, 3),
    }
    return Change(path, before, f"{after} {period}" if path.name == "cpu.max" else str(after), text, estimate)


def _holds(group: Path, pid: int) -> bool:
    try:
        folder, _ = group_of(pid)
    except PrismError:
        return False  # in the root group, or gone
    folder = folder.resolve()
    return folder == group or group in folder.parents


def group_of(pid: int) -> tuple[Path, int]:
    """Folder and version of the group that holds a process's CPU share; PrismError for a root group."""
    try:
        mount = parse_mounts(Path(f"/proc/{pid}/mountinfo").read_text())
        member = Path(f"/proc/{pid}/cgroup").read_text()
    except OSError as error:
        raise PrismError(f"cannot shield process {pid}", error.strerror or str(error)) from None
    path = parse_membership(member, mount.version) if mount is not None else None
    if mount is None or path is None:
        raise PrismError(f"cannot shield process {pid}", "it is in no control group for CPU time")
    inside = path[len(mount.root) :] if mount.root != "/" and path.startswith(mount.root) else path
    if not inside.strip("/") or ".." in inside.split("/"):
        why = "it is in the root group, which has no share of its own"
        raise PrismError(f"cannot shield process {pid}", why, "start the engine in a group of its own")
    return Path(mount.directory) / inside.strip("/"), mount.version


def _quota(group: Path) -> tuple[int | None, int, Path]:
    """(microseconds a period or None, period, the file that sets them)."""
    path = next((group / name for name in ("cpu.max", "cpu.cfs_quota_us") if (group / name).is_file()), None)
    if path is None:
        raise BadInput(f"{group} is no control group", "it has neither cpu.max nor cpu.cfs_quota_us")
    if path.name == "cpu.max":
        quota, _, period = _read(path).partition(" ")
    else:
        quota, period = _read(path), _read(group / "cpu.cfs_period_us")
    if not period.isdigit() or not int(period) or not (quota in ("max", "-1") or quota.isdigit()):
        raise PrismError(f"cannot confine {group}", f"{path.name} says {_read(path)[:40]!r}")
    return (int(quota) if quota.isdigit() else None), int(period), path


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError as error:
        raise PrismError(f"cannot read {path}", error.strerror or str(error)) from None


class Shield:
    """Makes changes and keeps a process that puts them back when ``close`` is called, when ``renew`` was not
    for ``LEASE_S``, or when this one ends in any way."""

    def __init__(self) -> None:
        self._keeper: subprocess.Popen[str] | None = None
        self._lapsed = False
        self.made: list[Change] = []

    def make(self, change: Change) -> None:
        """PrismError where the file cannot be written. A file is changed once: a second replica in a group,
        or one that was started again, does not raise its weight further."""
        if change.before == change.after or any(made.path == change.path for made in self.made):
            return
        if len(self.made) >= MOST_CHANGES:
            raise PrismError("no more changes to control groups are made", f"{MOST_CHANGES} were")
        # Whoever puts it back knows of it before it is made.
        try:
            self._keep(change)
        except OSError:
            why = "the process that puts control groups back has ended"
            raise PrismError("no changes to control groups are made", why) from None
        try:
            change.path.write_text(change.after)
        except OSError as error:
            raise PrismError(f"cannot write {change.path}", error.strerror or str(error), "be root") from None
        self.made.append(change)

    def _keep(self, change: Change) -> None:
        if self._keeper is None:
            script = str(files("latencyprism.slo").joinpath("undo_keeper.py"))
            self._keeper = subprocess.Popen(
                [sys.executable, "-I", "-S", script, str(LEASE_S)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
            )  # fmt: skip
        assert self._keeper.stdin is not None and self._keeper.stdout is not None
        self._keeper.stdin.write(json.dumps([str(change.path), change.after, change.before]) + "\n")
        self._keeper.stdin.flush()
        if self._keeper.stdout.readline() != "kept\n":
            raise BrokenPipeError

    def renew(self) -> bool:
        """False: its lease ran out, everything is as it was."""
        if self._lapsed or self._keeper is None:
            return not self._lapsed
        try:
            assert self._keeper.stdin is not None
            self._keeper.stdin.write("\n")
            self._keeper.stdin.flush()
        except OSError:
            self.made, self._lapsed = [], True
        return not self._lapsed

    def close(self) -> None:
        """Everything is as it was when this returns."""
        keeper, self._keeper = self._keeper, None
        self.made = []
        if keeper is not None:
            assert keeper.stdin is not None and keeper.stdout is not None
            with suppress(OSError):  # it has ended, with its work done
                keeper.stdin.close()
            keeper.stdout.close()
            keeper.wait(10)
