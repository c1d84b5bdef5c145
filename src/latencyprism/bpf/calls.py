"""Calls of native functions of one process, timed: a pair of probes for each, on entry and on return.

A return probe replaces the return address on the stack while the function runs, so only functions that no
C++ exception passes through may have one: the C interfaces of runtimes and drivers.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from latencyprism.attach.elf import Elf
from latencyprism.bpf import kernel, perf_uprobe
from latencyprism.bpf.loader import LoadedObject, read_object
from latencyprism.bpf.native import entry_offset
from latencyprism.bpf.ring import RingBuffer
from latencyprism.bpf.stubs import class_of
from latencyprism.errors import BadInput, PrismError, TargetRefused

FUNCTIONS = 512
RING_BYTES = 16 << 20
_INITIAL_PID_NAMESPACE = 0xEFFFFFFC
_STREAM = 1
_WAYS = ("session", "multi", "perf")

CALL_DTYPE = np.dtype(
    [
        ("start_ns", "<u8"),
        ("end_ns", "<u8"),
        ("tid", "<u4"),
        ("function", "<u4"),
        ("result", "<u8"),
        ("args", "<u8", (3,)),
    ]
)
"""One call; times CLOCK_MONOTONIC ns, ``end_ns`` equal to ``start_ns`` where only the entry is probed;
``function``: index into ``CallProbe.functions``. ``args`` are zero where ``way`` is ``session``."""

Calls = npt.NDArray[np.void]


@dataclass(frozen=True)
class Function:
    """What to probe. ``file``: index into the files given; ``offset``: in bytes, instead of looking
    ``symbol`` up; ``returns``: time the call, not only its entry; ``stream``: one record for each call of at
    least ``min_ns``, not only the totals; ``args``: the first three arguments are wanted."""

    symbol: str
    file: int = 0
    offset: int | None = None
    returns: bool = True
    stream: bool = True
    min_ns: int = 0
    args: bool = False


class CallTotals(NamedTuple):
    """Of one function since the probe began: calls, their time in all, the longest."""

    calls: int
    total_ns: int
    longest_ns: int


class CallProbe:
    """Attached until ``close`` (or the end of this process). ``files``: descriptors of the very files that
    the target maps (``open_mapped``), so that a library replaced or deleted on disk is probed all the same;
    they must stay open for ``drop``.

    ``missing`` names the functions that are not there; TargetRefused if none is. ``ways``: how to attach, the
    first that this kernel knows; ``way`` is the one taken. PrismError without the rights.
    """

    def __init__(
        self,
        pid: int,
        files: Sequence[int],
        functions: Sequence[Function],
        *,
        ring_bytes: int = RING_BYTES,
        ways: Sequence[str] = _WAYS,
    ) -> None:
        if not 0 < len(functions) <= FUNCTIONS:
            raise BadInput("cannot probe the library", f"1 to {FUNCTIONS} functions, not {len(functions)}")
        self.pid, self.files, self.functions = pid, tuple(files), tuple(functions)
        self.missing: list[str] = []
        self.kinds: dict[int, str] = {}
        """{index: class of the instruction that is probed}, which is what sets the price."""
        self.way = ""
        self._links: list[int] = []
        self._ring: RingBuffer | None = None
        self._programs: dict[tuple[str, int], int] = {}
        self._offsets = self._resolve()
        if not self._offsets:
            raise TargetRefused("cannot probe the library", f"it has no function {self.missing[0]}")
        self._object = self._load(ring_bytes)
        try:
            self._ring = RingBuffer(self._object.maps["ring"].descriptor, ring_bytes)
            for index, function in enumerate(self.functions):
                flags = _STREAM if function.stream else 0
                self._object.maps["functions"][index] = struct.pack("<IIQ", flags, 0, function.min_ns)
            self._attach_by_first(ways)
        except BaseException:
            self.close()
            raise

    def _resolve(self) -> dict[int, int]:
        """{index: file offset} of the functions that are there."""
        found = {i: f.offset for i, f in enumerate(self.functions) if f.offset is not None}
        for i, at in found.items():
            self.kinds[i] = class_of(os.pread(self.files[self.functions[i].file], 8, at))
        for number, file in enumerate(self.files):
            wanted = [i for i, f in enumerate(self.functions) if f.file == number and f.offset is None]
            if not wanted:
                continue
            with Elf(file) as elf:
                symbols = elf.lookup(self.functions[i].symbol for i in wanted)
                for i in wanted:
                    symbol = symbols.get(self.functions[i].symbol)
                    offset = entry_offset(elf, symbol.value) if symbol else None
                    if offset is None:
                        self.missing.append(self.functions[i].symbol)
                    else:
                        found[i] = offset
                        self.kinds[i] = class_of(os.pread(file, 8, offset))
        return found

    def _load(self, ring_bytes: int) -> LoadedObject:
        namespace = os.stat("/proc/self/ns/pid")
        initial = namespace.st_ino == _INITIAL_PID_NAMESPACE
        constants = {
            "target_tgid": self.pid,
            "pidns_device": 0 if initial else namespace.st_dev,
            "pidns_inode": 0 if initial else namespace.st_ino,
        }
        machine = kernel.supported_machine()
        return LoadedObject(read_object(f"calls.{machine}"), constants, {"ring": ring_bytes})

    # -- attaching -------------------------------------------------------------------------------

    def _attach_by_first(self, ways: Sequence[str]) -> None:
        for way in ways:
            try:
                self._attach(way, self._offsets)
                self.way = way
                return
            except kernel.FeatureMissing:
                self._detach()
                if way == ways[-1]:
                    raise

    def _attach(self, way: str, offsets: dict[int, int]) -> None:
        """One link for each program and file: links, not probes, are what costs time to take away."""
        for number in range(len(self.files)):
            mine = [i for i in offsets if self.functions[i].file == number]
            timed = [i for i in mine if self.functions[i].returns]
            whole = [i for i in timed if way == "session" and not self.functions[i].args]
            paired = [i for i in timed if i not in whole]
            self._link(way, "entry", number, [i for i in mine if i not in timed], offsets)
            self._link(way, "session", number, whole, offsets)
            # The return first: of a call that is under way only the entry may be missed.
            self._link(way, "end", number, paired, offsets)
            self._link(way, "begin", number, paired, offsets)

    def _link(self, way: str, program: str, number: int, chosen: list[int], offsets: dict[int, int]) -> None:
        if not chosen:
            return
        path = f"/proc/self/fd/{self.files[number]}"
        places = [offsets[index] for index in chosen]
        returns = program == "end"
        if way == "perf":
            verified = self._program(program, kernel.ATTACH_NONE)
            self._links += perf_uprobe.attach(verified, path, places, chosen, self.pid, returns=returns)
            return
        kind = kernel.ATTACH_UPROBE_SESSION if program == "session" else kernel.ATTACH_UPROBE_MULTI
        verified = self._program(program, kind)
        self._links.append(
            kernel.link_uprobe_multi(
                verified, path, places, chosen, self.pid, returns=returns, session=program == "session"
            )
        )

    def _program(self, name: str, attach_type: int) -> int:
        if (name, attach_type) not in self._programs:
            try:
                loaded = self._object.load(f"uprobe/{name}", kernel.PROG_KPROBE, attach_type)
            except PrismError as error:
                if name == "session":
                    raise kernel.FeatureMissing(error.what, error.why, error.remedy) from None
                raise
            self._programs[name, attach_type] = loaded
        return self._programs[name, attach_type]

    def drop(self, indices: Iterable[int]) -> None:
        """Take the probes of some functions away; their totals stay. One link holds many, so the others are
        attached anew: for some tens of milliseconds nothing is seen."""
        gone = set(indices)
        self._offsets = {i: offset for i, offset in self._offsets.items() if i not in gone}
        self._detach()
        if self._offsets:
            self._attach(self.way, self._offsets)

    def _detach(self) -> None:
        links, self._links = self._links, []
        perf_uprobe.detach(links)

    @property
    def attached(self) -> tuple[int, ...]:
        """Indices of the functions that are probed now."""
        return tuple(self._offsets) if self._links else ()

    # -- reading ---------------------------------------------------------------------------------

    @property
    def lost(self) -> int:
        """Records that found the ring full: they are in the totals all the same."""
        return self._object.counter("lost")

    @property
    def untimed(self) -> int:
        """Returns whose entry was not seen, such as those of calls under way at the start."""
        return self._object.counter("untimed")

    def read(self) -> Calls:
        """Records since the last call, as an array of CALL_DTYPE."""
        return self._ring.array(CALL_DTYPE) if self._ring is not None else np.empty(0, CALL_DTYPE)

    def totals(self) -> list[CallTotals]:
        """One for each of ``functions``."""
        if self._ring is None:
            return []
        cpus, table = kernel.possible_cpus(), self._object.maps["totals"]
        found = []
        for index in range(len(self.functions)):
            data = kernel.map_lookup(table.descriptor, index.to_bytes(4, "little"), 24 * cpus) or b""
            rows = np.frombuffer(data, "<u8").reshape(-1, 3)
            count, spent = (int(n) for n in rows[:, :2].sum(axis=0))
            found.append(CallTotals(count, spent, int(rows[:, 2].max())))
        return found

    def close(self) -> None:
        """Take the probes out of the target and give all memory back; safe to repeat."""
        with suppress(PrismError):
            self._detach()
        if self._ring is not None:
            self._ring.close()
            self._ring = None
        self._object.close()
