"""CPU of the engine's control group, or of a named noisy neighbour's: a bounded change that is put back, also
when the watch is killed."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from latencyprism.errors import BadInput, PrismError
from latencyprism.host.cgroup import parse_membership, parse_mounts

RAISE, WEIGHT_MOST, SHARES_MOST = 4, 10_000, 262_144
CONFINED_CPUS = 0.25
LEAST_QUOTA_US = 1_000
MOST_CHANGES = 8


class Change(NamedTuple):
    """One file of a control group: what it says, what it shall say, in words what that does."""

    path: Path
    before: str
    after: str
    text: str


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
    return Change(path, before, str(after), f"{path.name} of its group from {before} to {after}")


def confine(group: Path, cpus: float = CONFINED_CPUS) -> Change:
    """At most so many CPUs for a named group; never more than it had."""
    quota, period, path = _quota(group)
    wanted = max(int(cpus * period), LEAST_QUOTA_US)
    before = _read(path)
    after = wanted if quota is None else min(quota, wanted)
    text = f"{group} confined to {after / period:.2f} CPUs"
    return Change(path, before, f"{after} {period}" if path.name == "cpu.max" else str(after), text)


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
    """(microseconds a period, period, the file that sets them)."""
    if ".." in group.parts or not group.is_absolute():
        raise BadInput(f"{group} is no control group", "give its absolute folder")
    if (group / "cpu.max").exists():
        quota, _, period = _read(group / "cpu.max").partition(" ")
        return (None if quota == "max" else int(quota)), int(period or 100_000), group / "cpu.max"
    if (group / "cpu.cfs_quota_us").exists():
        quota, period = _read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us")
        return (None if int(quota) < 0 else int(quota)), int(period), group / "cpu.cfs_quota_us"
    raise BadInput(f"{group} is no control group", "it has neither cpu.max nor cpu.cfs_quota_us")


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError as error:
        raise PrismError(f"cannot read {path}", error.strerror or str(error)) from None


class Shield:
    """Makes changes and keeps a process that puts them back when ``close`` is called or this one ends in any
    way."""

    def __init__(self) -> None:
        self._keeper: subprocess.Popen[str] | None = None
        self.made: list[Change] = []

    def make(self, change: Change) -> None:
        """PrismError where the file cannot be written. The same twice is made once."""
        if change in self.made or change.before == change.after:
            return
        if len(self.made) >= MOST_CHANGES:
            raise PrismError("no more changes to control groups are made", f"{MOST_CHANGES} were")
        # Whoever puts it back knows of it before it is made.
        self._keep(change)
        try:
            change.path.write_text(change.after)
        except OSError as error:
            raise PrismError(f"cannot write {change.path}", error.strerror or str(error), "be root") from None
        self.made.append(change)

    def _keep(self, change: Change) -> None:
        if self._keeper is None:
            script = str(files("latencyprism.slo").joinpath("undo_keeper.py"))
            self._keeper = subprocess.Popen(
                [sys.executable, "-I", "-S", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                text=True, start_new_session=True,
            )  # fmt: skip
        assert self._keeper.stdin is not None and self._keeper.stdout is not None
        self._keeper.stdin.write(json.dumps([str(change.path), change.after, change.before]) + "\n")
        self._keeper.stdin.flush()
        if self._keeper.stdout.readline() != "kept\n":
            raise PrismError("the process that puts control groups back has ended")

    def close(self) -> None:
        """Everything is as it was when this returns."""
        keeper, self._keeper = self._keeper, None
        self.made = []
        if keeper is not None:
            assert keeper.stdin is not None and keeper.stdout is not None
            keeper.stdin.close()
            keeper.stdout.close()
            keeper.wait(10)
