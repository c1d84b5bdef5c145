"""A folder that a target and we can both reach, under the names that each of us has for it."""

from __future__ import annotations

import os
import re
import stat
import time
from pathlib import Path

from ..errors import TargetRefused
from .access import denied

_OURS = re.compile(r"lprism-(?:[a-z]+-)?[0-9a-f-]{8,40}\.(?:py|ring|wake|ack|txt|out)")
_STALE_S = 600.0


def shared_folder(pid: int) -> tuple[Path, str]:
    """(the folder as we reach it, the same folder as the target sees it). Raises TargetRefused."""
    try:
        same_mounts = _mount_namespace(pid) == _mount_namespace(os.getpid())
        same_root = same_mounts and os.readlink(f"/proc/{pid}/root") == "/"
    except PermissionError:
        raise denied(pid) from None
    except (FileNotFoundError, ProcessLookupError):
        raise TargetRefused(f"process {pid} is gone", "it ended while it was looked at") from None
    for inside in ("/dev/shm", "/tmp"):
        outside = Path(inside if same_root else f"/proc/{pid}/root{inside}")
        if not outside.is_symlink() and outside.is_dir() and os.access(outside, os.W_OK):
            return outside, inside
    raise TargetRefused(
        f"process {pid} cannot be attached to",
        "its /dev/shm and /tmp cannot be written",
        "run as its user or as root",
    )


def sweep(folder: Path) -> list[str]:
    """Take away what a killed watcher left in a shared folder; the names of it.

    A watcher needs its files there for seconds. Links stay, and files that this user may not remove.
    """
    gone = []
    oldest = time.time() - _STALE_S
    for path in folder.glob("lprism-*"):
        if _OURS.fullmatch(path.name) is None:
            continue
        try:
            seen = path.lstat()
            ordinary = stat.S_ISREG(seen.st_mode) or stat.S_ISFIFO(seen.st_mode)
            if seen.st_mtime < oldest and ordinary:
                path.unlink()
                gone.append(path.name)
        except OSError:
            continue
    return gone


def owner_of(pid: int) -> tuple[int, int]:
    """(user, group) that a file must belong to for the target to read it. Raises TargetRefused."""
    try:
        seen = os.stat(f"/proc/{pid}")
    except FileNotFoundError:
        raise TargetRefused(f"process {pid} is gone", "it ended while it was looked at") from None
    return seen.st_uid, seen.st_gid


def _mount_namespace(pid: int) -> str:
    return os.readlink(f"/proc/{pid}/ns/mnt")
