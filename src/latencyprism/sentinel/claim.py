"""One watcher a process: a lock file that the kernel drops when the watcher ends, however it ends."""

from __future__ import annotations

import fcntl
import os
import tempfile
from pathlib import Path

from latencyprism.attach.process import Identity
from latencyprism.errors import TargetRefused


def claims_folder() -> Path:
    """Where watchers of this user say what they hold; nobody else can write there."""
    base = os.environ.get("XDG_RUNTIME_DIR") or ("/run" if os.geteuid() == 0 else tempfile.gettempdir())
    folder = Path(base) / f"latencyprism-{os.geteuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.geteuid():
        raise TargetRefused(f"cannot use {folder}", "it belongs to somebody else", "remove it")
    return folder


class Claim:
    """Held from construction to ``close``. TargetRefused, naming the holder, if another watcher has it."""

    def __init__(self, identity: Identity) -> None:
        self._path = claims_folder() / f"{identity.pid}-{identity.start_ticks}.lock"
        try:
            self._fd = _locked(self._path)
        except BlockingIOError:
            holder = holder_of(identity)
            who = f"watcher {holder}" if holder else "another watcher"
            raise TargetRefused(
                f"process {identity.pid} is watched already",
                f"{who} holds it",
                "stop that one first, or watch its output",
            ) from None
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, str(os.getpid()).encode(), 0)

    def close(self) -> None:
        if self._fd >= 0:
            self._path.unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = -1


def _locked(path: Path) -> int:
    """A descriptor that holds the lock on ``path``; BlockingIOError if another one does."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its last holder may have removed the name between our open and our lock.
            if path.exists() and os.fstat(fd).st_ino == path.stat().st_ino:
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def holder_of(identity: Identity) -> int | None:
    """PID of the watcher that holds a process, if any of this user's does."""
    path = claims_folder() / f"{identity.pid}-{identity.start_ticks}.lock"
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        text = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
        return int(text) if text.isdigit() else None
    finally:
        os.close(fd)
    return None
