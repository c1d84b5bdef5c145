"""The memory map of a process, and the very files behind it.

A path in ``/proc/PID/maps`` belongs to the mount namespace of the target and may be deleted or replaced, so
a file is opened through ``map_files`` or ``root`` of that process, never by its bare path.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass

from ..errors import TargetRefused
from .access import denied

_LINE = re.compile(rb"^([0-9a-f]{1,16})-([0-9a-f]{1,16}) (\S{4}) ([0-9a-f]{1,16}) (\S+) (\d+)(?: +(.*))?$")
_DELETED = " (deleted)"
PAGE = 4096


@dataclass(frozen=True, slots=True)
class Mapping:
    """One line of the map: addresses ``start <= a < end`` in bytes, ``offset`` in the file in bytes."""

    start: int
    end: int
    perms: str
    offset: int
    device: str
    inode: int
    path: str
    deleted: bool = False

    @property
    def file(self) -> tuple[str, int, str]:
        """What makes two mappings pieces of one file."""
        return self.device, self.inode, self.path


def parse_maps(raw: bytes) -> list[Mapping]:
    """Mappings in address order. A line that is not the kernel's form is left out."""
    found = []
    for line in raw.split(b"\n"):
        match = _LINE.match(line)
        if match is None:
            continue
        start, end = int(match[1], 16), int(match[2], 16)
        if start >= end:
            continue
        path = (match[7] or b"").decode("utf-8", "surrogateescape").replace("\\012", "\n")
        deleted = path.endswith(_DELETED)
        found.append(
            Mapping(
                start,
                end,
                match[3].decode("ascii", "replace"),
                int(match[4], 16),
                match[5].decode("ascii", "replace"),
                int(match[6]),
                path.removesuffix(_DELETED),
                deleted,
            )
        )
    return found


def read_maps(pid: int) -> list[Mapping]:
    """Mappings of a live process. Raises TargetRefused with the reason when they may not be read."""
    try:
        with open(f"/proc/{pid}/maps", "rb") as file:
            return parse_maps(file.read())
    except (FileNotFoundError, ProcessLookupError):
        raise TargetRefused(f"process {pid} is gone", "it ended while it was looked at") from None
    except PermissionError:
        raise denied(pid) from None


def open_mapped(pid: int, mapping: Mapping) -> int:
    """A read-only descriptor on the file behind ``mapping``; the caller closes it. Raises TargetRefused."""
    candidates = [f"/proc/{pid}/map_files/{mapping.start:x}-{mapping.end:x}"]
    if not mapping.deleted:
        candidates.append(f"/proc/{pid}/root{mapping.path}")
    for path in candidates:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            continue
        seen = os.fstat(descriptor)
        # The path may name another file by now; only the inode tells (devices differ under overlayfs).
        if stat.S_ISREG(seen.st_mode) and seen.st_ino == mapping.inode:
            return descriptor
        os.close(descriptor)
    raise TargetRefused(
        f"cannot read {mapping.path} of process {pid}",
        "the file was replaced on disk or is out of reach",
        "restart the target, or run with CAP_SYS_ADMIN so that map_files can be read",
    )
