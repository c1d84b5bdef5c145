"""A file appears whole under its name, or not at all."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterable
from pathlib import Path

from latencyprism.errors import BadInput, PrismError


def replace_file(path: str | os.PathLike[str], chunks: Iterable[bytes], what: str, sync: bool = True) -> int:
    """Write ``chunks`` beside ``path`` and rename; returns the bytes written.

    A device or pipe is written straight to. BadInput if ``path`` cannot be a file; PrismError naming
    ``what`` if the disk is full or the folder cannot be written; the half-written file is removed.
    """
    try:
        target = Path(os.path.realpath(path))
        mode = target.stat().st_mode
    except FileNotFoundError:
        mode = stat.S_IFREG
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot write {what} to {path}", _reason(error)) from None
    if stat.S_ISDIR(mode):
        raise BadInput(f"cannot write {what} to {path}", "it is a folder", "name a file inside it")
    try:
        if not stat.S_ISREG(mode):
            return _pour(os.open(target, os.O_WRONLY | os.O_CLOEXEC), chunks, sync=False)
        return _beside(target, chunks, sync)
    except OSError as error:
        raise PrismError(
            f"cannot write {what} to {path}", _reason(error), "free space or name another place"
        ) from None


def temporary_prefix(target: Path, pid: int) -> str:
    """How the half-written files of process ``pid`` for ``target`` begin."""
    # A long name must stay a legal one with the rest of it added.
    return f".{target.name[:200]}.{pid}-"


def _beside(target: Path, chunks: Iterable[bytes], sync: bool) -> int:
    temporary = target.with_name(f"{temporary_prefix(target, os.getpid())}{secrets.token_hex(4)}.part")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        written = _pour(os.open(temporary, flags, 0o666), chunks, sync)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return written


def _pour(descriptor: int, chunks: Iterable[bytes], sync: bool) -> int:
    written = 0
    with open(descriptor, "wb", buffering=1 << 18) as file:
        for chunk in chunks:
            file.write(chunk)
            written += len(chunk)
        file.flush()
        if sync:
            os.fsync(file.fileno())
    return written


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
