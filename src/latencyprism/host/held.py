"""A /proc or cgroup file held open and read again and again: one system call a reading instead of three."""

from __future__ import annotations

import os

_SIZE = 16384


class HeldFile:
    """Reads a small kernel file from its start with ``pread``.

    A held /proc/PID file never comes to mean another process when the number is used again: it fails with
    ESRCH, and ``read`` answers None from then on.
    """

    __slots__ = ("_fd", "path", "why")

    def __init__(self, path: str) -> None:
        self.path = path
        self.why: str | None = None
        self._fd = -1
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            self.why = error.strerror or str(error)

    def read(self, size: int = _SIZE) -> bytes | None:
        """The first ``size`` bytes of the present content; None if it cannot be read (see ``why``)."""
        if self._fd < 0:
            return None
        try:
            return os.pread(self._fd, size, 0)
        except OSError as error:
            self.why = error.strerror or str(error)
            self.close()
            return None

    @property
    def open(self) -> bool:
        return self._fd >= 0

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def read_once(path: str, size: int = _SIZE) -> bytes | None:
    """A kernel file read one time; None if it cannot be."""
    held = HeldFile(path)
    data = held.read(size)
    held.close()
    return data


def parse_table(data: bytes) -> dict[bytes, int]:
    """Lines of ``key value``, as in cpu.stat and /proc/vmstat; lines of another form are left out."""
    table = {}
    for line in data.splitlines():
        key, _, value = line.partition(b" ")
        if value.strip().isdigit():
            table[key.rstrip(b":")] = int(value)
    return table
