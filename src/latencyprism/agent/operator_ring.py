"""The watcher's side of the operator probe's ring: making it, copying records, the clock, giving it back."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import struct
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from latencyprism.agent import operator_code as code
from latencyprism.agent.record_spool import RecordSpool
from latencyprism.attach.memory import read_memory, read_scattered
from latencyprism.errors import TargetRefused

RING_BYTES = code.HEADER_BYTES + code.SLOTS * code.RECORD_BYTES
_NAME_LIMIT = 200
_KEEP_SIZE_PUNCH_HOLE = 3
_PATIENCE = 5
"""Copies that wait for a record which a thread has claimed and not written yet; then it counts as lost."""
_TRUSTED = ("tsc", "kvm-clock", "hyperv_clocksource_tsc_page")


class TscClock:
    """Maps the time stamp counter to CLOCK_MONOTONIC by paired readings; all CPUs share one counter where
    the kernel itself trusts it. TargetRefused where it does not. ``error_ns`` bounds every reading."""

    def __init__(self) -> None:
        source = Path("/sys/devices/system/clocksource/clocksource0/current_clocksource")
        with contextlib.suppress(OSError):
            if source.read_text().strip() not in _TRUSTED:
                raise TargetRefused(
                    "operators cannot be timed", "the kernel does not trust this machine's TSC"
                )
        self._page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        self._page.write(code.COUNTER)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._page))
        self.ticks = ctypes.PYFUNCTYPE(ctypes.c_uint64)(address)
        self.readings: list[tuple[int, int]] = []
        self.error_ns = 0
        self.read()

    def read(self) -> None:
        """Take one pair, the tightest of some."""
        best: tuple[int, int, int] | None = None
        for _ in range(5):
            before = time.monotonic_ns()
            ticks = int(self.ticks())
            width = time.monotonic_ns() - before
            if best is None or width < best[0]:
                best = (width, ticks, before + width // 2)
        assert best is not None
        self.error_ns = max(self.error_ns, best[0] // 2 + 1)
        self.readings.append(best[1:])

    def forget(self) -> None:
        """Begin anew, with the first and the latest of the readings so far."""
        self.readings = [self.readings[0], self.readings[-1]] if len(self.readings) > 1 else self.readings

    def ticks_at(self, time_ns: int) -> int:
        """The counter at a time (CLOCK_MONOTONIC) not far from now."""
        while time.monotonic_ns() - self.readings[0][1] < 5_000_000:
            time.sleep(0.002)
        if len(self.readings) < 2 or self.readings[-1][1] - self.readings[0][1] < 4_000_000:
            self.read()
        (first, first_ns), (last, last_ns) = self.readings[0], self.readings[-1]
        return last + int((time_ns - last_ns) * ((last - first) / (last_ns - first_ns)))


@dataclass(slots=True)
class OperatorRecords:
    """What one dive saw of one process: raw records in order, names by schema address, clock readings.
    ``threads``: number in the target's namespace by thread pointer, as far as it could be told."""

    pid: int
    chunks: list[npt.NDArray[np.int64]] | RecordSpool = field(default_factory=list)
    names: dict[int, str] = field(default_factory=dict)
    threads: dict[int, int] = field(default_factory=dict)
    readings: list[tuple[int, int]] = field(default_factory=list)
    error_ns: int = 0
    lost: int = 0
    limited: bool = False
    lapsed: bool = False
    """The probe went before its time: its lease was not renewed in time."""
    refused: str = ""
    """Why some could not be kept, in words; they count as lost."""

    def keep(self, rows: npt.NDArray[np.int64]) -> None:
        try:
            self.chunks.append(rows)
        except OSError as error:
            self.lost += len(rows)
            self.refused = error.strerror or str(error)


class OperatorRing:
    """A ring file from its making to ``close``; the target maps the same."""

    def __init__(self, path: Path, owner: tuple[int, int] | None, limit: int) -> None:
        self.limit = limit
        self._read = 0
        self._waited = 0
        self._map: mmap.mmap | None = None
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(self._fd, 0, RING_BYTES)
            if owner is not None:
                os.fchown(self._fd, *owner)
            self._map = mmap.mmap(self._fd, RING_BYTES)
        except BaseException:
            os.close(self._fd)
            raise
        self.set(code.LIMIT, limit)

    @property
    def open(self) -> bool:
        return self._map is not None

    def word(self, index: int) -> int:
        assert self._map is not None
        value: int = struct.unpack_from("@q", self._map, index * 8)[0]
        return value

    def set(self, index: int, value: int) -> None:
        assert self._map is not None
        # The whole word at once: `pack_into` writes zeros first, and a deadline of zero lies in the past.
        self._map[index * 8 : index * 8 + 8] = struct.pack("@q", value)

    def copy(self, into: OperatorRecords) -> list[npt.NDArray[np.int64]]:
        """Take over what came in since the last time; returns it, too."""
        taken: list[npt.NDArray[np.int64]] = []
        head = min(self.word(code.HEAD), self.limit)
        if head - self._read > code.SLOTS:
            into.lost += head - code.SLOTS - self._read
            self._read = head - code.SLOTS
        while self._read < head:
            first = self._read % code.SLOTS
            size = min(head - self._read, code.SLOTS - first)
            if not self._copy_stretch(first, size, into, taken):
                break
        into.limited = self._read >= self.limit
        for rows in taken:
            into.keep(rows)
        return taken

    def _copy_stretch(
        self, first: int, size: int, into: OperatorRecords, taken: list[npt.NDArray[np.int64]]
    ) -> bool:
        """False if a record in it is still being written: the rest is for the next time."""
        assert self._map is not None
        at = code.HEADER_BYTES + first * code.RECORD_BYTES
        raw = self._map[at : at + size * code.RECORD_BYTES]
        rows = np.frombuffer(raw, dtype="<i8").reshape(-1, 4)
        good = rows[:, 3] == np.arange(self._read + 1, self._read + 1 + size)
        # What was overtaken while it was copied may be of two records.
        overtaken = max(0, min(self.word(code.HEAD) - code.SLOTS - self._read, size))
        good[:overtaken] = False
        hole = int(np.argmin(good[overtaken:])) + overtaken
        if hole < size and not good[hole] and self._waited < _PATIENCE:
            self._waited += 1
            rows, good, whole = rows[:hole], good[:hole], False
        else:
            self._waited, whole = 0, True
        self._read += len(rows)
        into.lost += int((~good).sum())
        if good.all():
            taken.append(rows)
        elif good.any():
            taken.append(rows[good])
        return whole

    def close(self) -> None:
        """Nothing more is written; the memory goes back, in the target too. Harmless twice.

        A thread may be between its look at the limit and its record, and a page that was given back is one
        that a full file system may refuse it: the memory goes once all that was claimed is written."""
        if self._map is None:
            return
        with contextlib.suppress(OSError):
            if self._settled():
                libc = ctypes.CDLL(None, use_errno=True)
                # The header stays: the callbacks look there until their next call.
                libc.fallocate(
                    self._fd, _KEEP_SIZE_PUNCH_HOLE,
                    ctypes.c_long(code.HEADER_BYTES), ctypes.c_long(RING_BYTES - code.HEADER_BYTES),
                )  # fmt: skip
        self._map.close()
        self._map = None
        os.close(self._fd)

    def _written(self, first: int, head: int) -> bool:
        """Whether all that was claimed from ``first`` on is there; the ring is large, and not copied."""
        assert self._map is not None
        words = np.frombuffer(self._map, dtype="<i8", offset=code.HEADER_BYTES).reshape(-1, 4)
        claimed = np.arange(first, head)
        return bool((words[claimed % code.SLOTS, 3] == claimed + 1).all())

    def _settled(self) -> bool:
        assert self._map is not None
        self.set(code.DEADLINE_TSC, 0)
        self.set(code.LIMIT, 0)
        for _ in range(20):
            time.sleep(0.001)  # whoever claims from here on sees that limit
            head = min(self.word(code.HEAD), self.limit)
            first = max(head - code.SLOTS, 0)
            if self._written(first, head):
                return True
        return False


def name_of(pid: int, schema: int) -> str:
    """A schema begins with two std::string: name and overload. TargetRefused if it does not."""
    head = read_memory(pid, schema, 64)
    (name_at, name_size), (over_at, over_size) = (
        struct.unpack_from("<QQ", head),
        struct.unpack_from("<QQ", head, 32),
    )
    if not 0 < name_size <= _NAME_LIMIT or over_size > _NAME_LIMIT:
        raise TargetRefused("no name of an operator", "its length is beyond reason")
    name, overload = read_scattered(pid, [(name_at, name_size), (over_at, max(over_size, 1))])
    text = _printable(name)
    return f"{text}.{_printable(overload)}" if over_size else text


def _printable(raw: bytes) -> str:
    return "".join(c if c.isprintable() else "?" for c in raw.decode("ascii", "replace"))
