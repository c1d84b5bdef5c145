"""Records of a deep window in a file without a name: tens of megabytes that a watch need not hold itself."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]
_WIDTH_BYTES = 32


class RecordSpool:
    """Arrays of rows of four int64, appended and iterated over in order. ``fd`` stays open until ``close``,
    and is what a forked copy needs to read on. OSError if ``folder`` takes no file or no more bytes; what
    was appended before that is still whole."""

    def __init__(self, folder: Path) -> None:
        self._fd, name = tempfile.mkstemp(prefix=".operators.", dir=folder)
        os.unlink(name)
        self._sizes: list[int] = []
        self._bytes = 0

    @property
    def fd(self) -> int:
        return self._fd

    def append(self, rows: Rows) -> None:
        view = memoryview(rows.tobytes())
        at = self._bytes
        while len(view):
            done = os.pwrite(self.fd, view, at)
            at, view = at + done, view[done:]
        self._bytes = at
        self._sizes.append(len(rows))

    def __len__(self) -> int:
        """Arrays, not rows."""
        return len(self._sizes)

    def __iter__(self) -> Iterator[Rows]:
        at = 0
        for size in self._sizes:
            raw = os.pread(self.fd, size * _WIDTH_BYTES, at)
            yield np.frombuffer(raw, dtype="<i8").reshape(-1, 4)
            at += size * _WIDTH_BYTES

    def close(self) -> None:
        """The records are gone. Harmless twice."""
        self._sizes.clear()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
