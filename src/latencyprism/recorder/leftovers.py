"""What a killed watcher or writing process left beside the captures: raw files, which hold all records, and
halves of files. A raw file that nobody works on any more can still become its capture."""

from __future__ import annotations

import contextlib
import re
import time
from dataclasses import dataclass
from pathlib import Path

_RAW = re.compile(r"\.(?P<name>[^/]+\.pftrace)\.[A-Za-z0-9_]{8}\.raw")
_RAW_PART = re.compile(
    r"\.\.(?P<name>[^/]+\.pftrace)\.[A-Za-z0-9_]{8}\.raw\.(?P<pid>\d{1,7})-[0-9a-f]{8}\.part"
)
_PART = re.compile(r"\.(?P<name>[^/]+\.pftrace)\.(?P<pid>\d{1,7})-[0-9a-f]{8}\.part")
SETTLED_S = 10.0
"""A file written to within this time is somebody's."""


@dataclass(frozen=True)
class Leftover:
    """``raw`` is the raw file of the capture ``out``, perhaps cut off; ``rest`` goes when that was tried."""

    raw: Path
    out: Path
    rest: tuple[Path, ...]


def leftovers(folder: Path) -> list[Leftover]:
    """Raw files without an owner, the fullest of each capture. Halves that are of no use are removed here."""
    orphans: dict[str, list[Path]] = {}
    now = time.time()
    for path in folder.glob(".*"):
        told = _RAW.fullmatch(path.name) or _RAW_PART.fullmatch(path.name) or _PART.fullmatch(path.name)
        with contextlib.suppress(OSError):
            if told is None or path.is_symlink() or now - path.stat().st_mtime < SETTLED_S:
                continue
            pid = told.groupdict().get("pid")
            if (pid is not None and _is_ours(int(pid))) or _worked_on(path.name):
                continue
            if path.stat().st_size == 0 or (path.suffix == ".part" and not _RAW_PART.fullmatch(path.name)):
                path.unlink()
            else:
                orphans.setdefault(told["name"], []).append(path)
    found = []
    for name, paths in orphans.items():
        paths.sort(key=lambda path: (path.suffix == ".raw", path.stat().st_size))
        found.append(Leftover(paths[-1], folder / name, tuple(paths)))
    return found


def _is_ours(pid: int) -> bool:
    return b"latencyprism" in _command(str(pid))


def _worked_on(name: str) -> bool:
    """Whether a process names the file on its command line."""
    wanted = name.encode()
    return any(wanted in _command(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())


def _command(pid: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
