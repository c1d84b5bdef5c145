"""Probes on native functions of one process: what was called when, with which first arguments.

Only function entries and, where asked for, returns. A return probe replaces the return address on the
stack while the function runs, so a C++ exception that has to pass through the function would end the
target: ask for one only where none can.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from latencyprism.attach.elf import EM_X86_64, Elf
from latencyprism.bpf import kernel, perf_uprobe
from latencyprism.bpf.loader import LoadedObject, read_object
from latencyprism.bpf.ring import RingBuffer
from latencyprism.errors import PrismError, TargetRefused

_ENDBR64 = b"\xf3\x0f\x1e\xfa"
_HIT = struct.Struct("<QIHBBQQ24s")
_RUN = struct.Struct("<iiII")
_POINT = struct.Struct("<IiII")
POINTS = 32
RETURN, UNREAD, TRUNCATED = 1, 2, 4
_WAKE, _FIRST = 1, 2
RING_BYTES = 1 << 20


@dataclass(frozen=True)
class Point:
    """Where to probe. ``program``: ``hit``, ``hit_return`` or ``ubatch``. ``wake``: let the reader know at
    once. ``first``: drop a hit that follows one at the same point in the same thread. ``data_arg``: 0 or 1,
    copy 24 bytes from where that argument points, plus ``data_offset``."""

    symbol: str
    program: str = "hit"
    wake: bool = False
    first: bool = False
    data_arg: int = -1
    data_offset: int = 0
    file: int = 0


class Run(NamedTuple):
    """Consecutive tokens of one sequence; ``output``: 1 if the last one's logits are wanted."""

    sequence: int
    first_position: int
    tokens: int
    output: int


class Hit(NamedTuple):
    """``time_ns`` CLOCK_MONOTONIC; ``point`` index into the points; ``flags`` RETURN, UNREAD, TRUNCATED;
    ``args`` the first two arguments, at a return the returned value first; ``data`` the copied bytes."""

    time_ns: int
    tid: int
    point: int
    flags: int
    args: tuple[int, int]
    data: bytes
    runs: tuple[Run, ...]


def parse_hit(record: bytes) -> Hit:
    """A record of the ring as a Hit; PrismError when it is too short for what it says."""
    if len(record) < _HIT.size:
        raise PrismError("a probe record is cut off", f"{len(record)} bytes")
    time_ns, tid, point, flags, count, first, second, data = _HIT.unpack_from(record)
    if len(record) < _HIT.size + count * _RUN.size:
        raise PrismError("a probe record is cut off", f"{count} runs in {len(record)} bytes")
    runs = tuple(Run(*_RUN.unpack_from(record, _HIT.size + index * _RUN.size)) for index in range(count))
    return Hit(time_ns, tid, point, flags, (first, second), data, runs)


def entry_offset(elf: Elf, vaddr: int) -> int | None:
    """File offset of the first instruction worth a probe: behind ``endbr64``, which the kernel would have to
    single-step at ten times the cost. Registers and return address are still untouched there."""
    offset = elf.file_offset(vaddr)
    if offset is not None and elf.machine == EM_X86_64 and elf.read(offset, 4) == _ENDBR64:
        return offset + 4
    return offset


class NativeProbe:
    """Attached probes in one process, until ``close`` (or the end of this process).

    ``files`` are descriptors of the very files the target maps; they are only used while attaching.
    ``wake_interval_ns``: a point with ``wake`` wakes the reader at most this often; what came since then
    is there to read all the same, so a reader with an interval also polls on a timer. ``links``: ``multi``
    (Linux 6.6), ``perf``, or ``auto``, the first that works.
    Raises PrismError (no rights, kernel without the feature) or TargetRefused (a symbol is not there).
    """

    def __init__(
        self,
        pid: int,
        files: Sequence[int],
        points: Sequence[Point],
        constants: Mapping[str, int] | None = None,
        ring_bytes: int = RING_BYTES,
        wake_interval_ns: int = 0,
        links: str = "auto",
    ) -> None:
        if not 0 < len(points) <= POINTS:
            raise ValueError(f"1 to {POINTS} points")
        self.points = tuple(points)
        self._links: list[int] = []
        self._ring: RingBuffer | None = None
        namespace = os.stat("/proc/self/ns/pid")
        values = dict(constants or {})
        values["wake_interval_ns"] = wake_interval_ns
        values |= {"target_tgid": pid, "pidns_device": namespace.st_dev, "pidns_inode": namespace.st_ino}
        offsets = self._resolve(files)
        machine = kernel.supported_machine()
        self._object = LoadedObject(read_object(f"native_step.{machine}"), values, {"ring": ring_bytes})
        try:
            self._configure()
            self._ring = RingBuffer(self._object.maps["ring"].descriptor, ring_bytes)
            self._attach(pid, files, offsets, links)
        except BaseException:
            self.close()
            raise

    def _resolve(self, files: Sequence[int]) -> list[int]:
        """File offset of every point."""
        offsets = [-1] * len(self.points)
        for number, file in enumerate(files):
            mine = [index for index, point in enumerate(self.points) if point.file == number]
            with Elf(file) as elf:
                found = elf.lookup(self.points[index].symbol for index in mine)
                for index in mine:
                    symbol = found.get(self.points[index].symbol)
                    offset = entry_offset(elf, symbol.value) if symbol else None
                    if offset is None:
                        name = self.points[index].symbol
                        raise TargetRefused("cannot probe the library", f"it has no function {name}")
                    offsets[index] = offset
        return offsets

    def _configure(self) -> None:
        for index, point in enumerate(self.points):
            flags = (_WAKE if point.wake else 0) | (_FIRST if point.first else 0)
            self._object.maps["points"][index] = _POINT.pack(flags, point.data_arg, point.data_offset, 0)

    def _attach(self, pid: int, files: Sequence[int], offsets: list[int], links: str) -> None:
        """One link for each program and file: links, not probes, are what costs time to take away."""
        self._programs: dict[tuple[str, int], int] = {}
        for program, number in dict.fromkeys((point.program, point.file) for point in self.points):
            chosen = [
                index
                for index, point in enumerate(self.points)
                if (point.program, point.file) == (program, number)
            ]
            places = [offsets[index] for index in chosen]
            path, returns = f"/proc/self/fd/{files[number]}", program == "hit_return"
            if links != "perf":
                try:
                    verified = self._program(program, kernel.ATTACH_UPROBE_MULTI)
                    self._links.append(
                        kernel.link_uprobe_multi(verified, path, places, chosen, pid, returns=returns)
                    )
                    continue
                except kernel.FeatureMissing:
                    if links == "multi":
                        raise
            verified = self._program(program, kernel.ATTACH_NONE)
            self._links += perf_uprobe.attach(verified, path, places, chosen, pid, returns=returns)

    def _program(self, name: str, attach_type: int) -> int:
        if (name, attach_type) not in self._programs:
            loaded = self._object.load(f"uprobe/{name}", kernel.PROG_KPROBE, attach_type)
            self._programs[name, attach_type] = loaded
        return self._programs[name, attach_type]

    @property
    def lost(self) -> int:
        """Records that found the ring full."""
        return self._object.counter("lost")

    @property
    def seen(self) -> int:
        """Hits in the target so far, those dropped by ``first`` included."""
        return self._object.counter("seen")

    def fileno(self) -> int:
        """Readable once a point with ``wake`` was hit."""
        return self._object.maps["ring"].descriptor

    def wake_after(
        self, usual_ns: int, decode_ns: int = 0, prefill_ns: int = 0, typical_1024: int = 1024,
        spare_ns: int = 0,
    ) -> None:  # fmt: skip
        """From now on a point with ``wake`` wakes the reader only where so much time lies between its hit and
        the last one of such a point, and so much more for each sequence and each further token of
        micro-batches between; 0: at each. And once such times are longer by ``spare_ns`` together than so
        many 1024ths of that."""
        values = (usual_ns, decode_ns, prefill_ns, typical_1024, spare_ns, 0)
        self._object.maps[".data"][0] = struct.pack("<6Q", *(max(0, value) for value in values))

    def read(self) -> Iterator[Hit]:
        """Hits since the last call, in the order in which the kernel took them."""
        if self._ring is not None:
            for record in self._ring.records():
                yield parse_hit(record)

    def close(self) -> None:
        """Take the probes out of the target and give all memory back; safe to repeat."""
        links, self._links = self._links, []
        perf_uprobe.detach(links)
        if self._ring is not None:
            self._ring.close()
            self._ring = None
        self._object.close()
