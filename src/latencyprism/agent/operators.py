"""Framework operators of a live PyTorch process, without its profiler: nothing to stop, nothing to export.

A native callback writes fixed records into a ring in shared memory; names are read from outside. The library
is recognised before anything is armed. The probe takes itself away past its deadline or limit of records.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import os
import platform
import secrets
import struct
import time
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from latencyprism.agent import operator_code as code
from latencyprism.agent.assemble import bootstrap, pack
from latencyprism.attach.elf import Elf
from latencyprism.attach.inject import Injector
from latencyprism.attach.maps import open_mapped, read_maps
from latencyprism.attach.memory import read_memory, read_scattered
from latencyprism.attach.shared_folder import owner_of, shared_folder
from latencyprism.errors import BadInput, TargetRefused
from latencyprism.tomlfile import parse_toml

LIBRARY = "libtorch_cpu.so"
LIMIT_RECORDS = 40_000_000
RING_BYTES = code.HEADER_BYTES + code.SLOTS * code.RECORD_BYTES
_NAME_LIMIT = 200
_KEEP_SIZE_PUNCH_HOLE = 3
_REFUSED = {
    code.STATE_REFUSED: "the target does not let code be mapped, or another version's probe was in it",
    code.STATE_BUSY: "another watcher observes its operators",
}


@dataclass(frozen=True, slots=True)
class Build:
    """One recognised library in one process: addresses there, and where the fields are."""

    version: str
    add: int
    remove: int
    function_offset: int
    kind_offset: int
    scopes: tuple[int, ...]


@functools.cache
def _known() -> dict[str, Any]:
    text = files("latencyprism.agent").joinpath("operators.toml").read_text(encoding="utf-8")
    return parse_toml(text, "operators.toml")


@functools.lru_cache(maxsize=8)
def _symbols_of(pid: int, inode: int, size: int, start: int) -> tuple[str, dict[str, int]]:
    mapping = next(m for m in read_maps(pid) if m.start == start)
    descriptor = open_mapped(pid, mapping)
    try:
        with Elf(descriptor) as elf:
            place = elf.section(".note.gnu.build-id")
            offset = elf.file_offset(place[0]) if place else None
            note = elf.read(offset, place[1]) if place and offset is not None and place[1] < 256 else b""
            found = elf.lookup(_known()["symbols"].values())
    finally:
        os.close(descriptor)
    return note[16:].hex(), {name: symbol.value for name, symbol in found.items()}


def recognise(pid: int) -> Build:
    """The build of PyTorch in a process. TargetRefused with the reason where its operators cannot be
    observed."""
    failed = f"operators of process {pid} cannot be observed"
    if platform.machine() != "x86_64":
        raise TargetRefused(failed, "the probe is made for x86-64")
    mapping = next((m for m in read_maps(pid) if m.offset == 0 and m.path.endswith("/" + LIBRARY)), None)
    if mapping is None:
        raise TargetRefused(failed, f"it has no {LIBRARY} loaded")
    try:
        build_id, values = _symbols_of(pid, mapping.inode, mapping.end - mapping.start, mapping.start)
    except BadInput as error:
        raise TargetRefused(failed, error.why or error.what) from None
    entry = next((b for b in _known()["builds"] if b["build_id"] == build_id), None)
    if entry is None:
        raise TargetRefused(failed, f"its build of PyTorch is not known ({build_id or 'no build id'})")
    names = _known()["symbols"]
    if any(name not in values for name in names.values()):
        raise TargetRefused(failed, "its build of PyTorch lacks the functions for it")
    at = {short: mapping.start + values[name] for short, name in names.items()}
    expected = bytes.fromhex(entry["name_code"])
    if read_memory(pid, at["name"], len(expected)) != expected:
        raise TargetRefused(failed, "its code is not that of the build it says it is")
    return Build(
        entry["versions"][0], at["add"], at["remove"],
        entry["function_offset"], entry["kind_offset"], tuple(entry["scopes"]),
    )  # fmt: skip


class TscClock:
    """Maps the time stamp counter to CLOCK_MONOTONIC by paired readings; all CPUs share one counter where
    the kernel itself trusts it. TargetRefused where it does not."""

    def __init__(self) -> None:
        source = Path("/sys/devices/system/clocksource/clocksource0/current_clocksource")
        with contextlib.suppress(OSError):
            if source.read_text().strip() not in ("tsc", "kvm-clock", "hyperv_clocksource_tsc_page"):
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

    def ticks_in(self, seconds: float) -> int:
        """The counter ``seconds`` from now."""
        if time.monotonic_ns() - self.readings[0][1] < 5_000_000:
            time.sleep(0.005)
        self.read()
        (first, first_ns), (last, last_ns) = self.readings[0], self.readings[-1]
        return last + int(seconds * 1e9 * (last - first) / (last_ns - first_ns))


@dataclass(slots=True)
class OperatorRecords:
    """What one dive saw of one process: raw records in order, names by schema address, clock readings."""

    pid: int
    thread: int = 0
    chunks: list[npt.NDArray[np.int64]] = field(default_factory=list)
    names: dict[int, str] = field(default_factory=dict)
    readings: list[tuple[int, int]] = field(default_factory=list)
    lost: int = 0
    limited: bool = False


class OperatorProbe:
    """Armed from construction until ``seconds`` have passed, ``disarm`` or the limit of records."""

    def __init__(
        self, injector: Injector, build: Build, seconds: float, *, limit: int = LIMIT_RECORDS
    ) -> None:
        self.pid = injector.pid
        self.clock = TscClock()
        self.records = OperatorRecords(self.pid)
        self._read = 0
        folder, inside = shared_folder(self.pid)
        name = f"lprism-{secrets.randbits(62):016x}"
        ring, text = folder / f"{name}.ring", folder / f"{name}.py"
        try:
            self._make_ring(ring, limit, seconds)
            self._write_text(text, f"{inside}/{name}.ring", build)
            self.report = injector.run(bootstrap(f"{inside}/{name}.py"), lambda: self.state != 0, 1.0)
        except BaseException:
            self.close()
            raise
        finally:
            for path in (ring, text):
                path.unlink(missing_ok=True)
        self.armed_ns = time.monotonic_ns()
        self.records.thread = self._word(code.THREAD)
        if self.state not in (code.STATE_ARMED, code.STATE_DISARMED):
            why = _REFUSED.get(self.state, "it did not answer")
            self.close()
            raise TargetRefused(f"operators of process {self.pid} cannot be observed", why)

    def _make_ring(self, path: Path, limit: int, seconds: float) -> None:
        self._map: mmap.mmap | None = None
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        os.posix_fallocate(self._fd, 0, RING_BYTES)
        if os.geteuid() == 0:
            os.fchown(self._fd, *owner_of(self.pid))
        self._map = mmap.mmap(self._fd, RING_BYTES)
        self._set(code.LIMIT, limit)
        self._set(code.DEADLINE_TSC, self.clock.ticks_in(seconds))

    def _write_text(self, path: Path, ring: str, build: Build) -> None:
        start = code.start_callback(build.function_offset, build.kind_offset)
        start += b"\xcc" * (-len(start) % 16)
        end = code.end_callback()
        end += b"\xcc" * (-len(end) % 16)
        config = {
            "ring": ring, "bytes": RING_BYTES, "add": build.add, "remove": build.remove,
            "code": start + end + code.COUNTER, "end": len(start), "counter": len(start) + len(end),
            "ring_mark": code.RING_MARK, "remove_mark": code.REMOVE_MARK, "scopes": build.scopes,
        }  # fmt: skip
        source = files("latencyprism.agent.probe").joinpath("operators.py").read_text(encoding="utf-8")
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(pack(f"{source}\ninstall({config!r})\n"))
        if os.geteuid() == 0:
            os.chown(path, *owner_of(self.pid), follow_symlinks=False)

    def _word(self, index: int) -> int:
        assert self._map is not None
        value: int = struct.unpack_from("<q", self._map, index * 8)[0]
        return value

    def _set(self, index: int, value: int) -> None:
        assert self._map is not None
        struct.pack_into("<q", self._map, index * 8, value)

    @property
    def state(self) -> int:
        return self._word(code.STATE)

    def drain(self) -> None:
        """Copy what came in. Call at least five times a second."""
        if self._map is None:
            return
        head = min(self._word(code.HEAD), self._word(code.LIMIT))
        if head - self._read > code.SLOTS:
            self.records.lost += head - code.SLOTS - self._read
            self._read = head - code.SLOTS
        head = self._whole(head)
        first, count = self._read % code.SLOTS, head - self._read
        for begin, size in ((first, min(count, code.SLOTS - first)), (0, first + count - code.SLOTS)):
            if size > 0:
                at = code.HEADER_BYTES + begin * code.RECORD_BYTES
                self._keep(self._map[at : at + size * code.RECORD_BYTES])
        self.records.limited = head >= self._word(code.LIMIT)
        self.clock.read()

    def _whole(self, head: int) -> int:
        """Up to which record all have been written: one may be under way."""
        assert self._map is not None
        for index in range(max(self._read, head - 8), head):
            at = code.HEADER_BYTES + index % code.SLOTS * code.RECORD_BYTES + 24
            if struct.unpack_from("<q", self._map, at)[0] != index + 1:
                return index
        return head

    def _keep(self, raw: bytes) -> None:
        rows = np.frombuffer(raw, dtype="<i8").reshape(-1, 4)
        good = rows[:, 3] == np.arange(self._read + 1, self._read + 1 + len(rows))
        self._read += len(rows)
        if not good.all():  # overtaken while it was copied
            self.records.lost += int((~good).sum())
            rows = rows[good]
        self.records.chunks.append(rows)
        for address in set(rows[:, 1].tolist()) - self.records.names.keys() - {0}:
            with contextlib.suppress(TargetRefused):
                self.records.names[address] = _name_of(self.pid, address)

    def disarm(self) -> None:
        """The probe takes itself away at its next operator; it writes nothing any more from here on."""
        if self._map is not None:
            self._set(code.DEADLINE_TSC, 0)

    def close(self) -> None:
        """Disarm, copy the rest, and give the ring's memory back, in the target too. Harmless twice."""
        if getattr(self, "_map", None) is not None:
            self.disarm()
            self.drain()
            assert self._map is not None
            self._map.close()
            self._map = None
            self.records.readings = self.clock.readings
        if getattr(self, "_fd", -1) >= 0:
            _give_back(self._fd)
            os.close(self._fd)
            self._fd = -1


def _name_of(pid: int, schema: int) -> str:
    """A schema begins with two std::string: name and overload."""
    head = read_memory(pid, schema, 64)
    (name_at, name_size), (over_at, over_size) = (
        struct.unpack_from("<QQ", head),
        struct.unpack_from("<QQ", head, 32),
    )
    if not 0 < name_size <= _NAME_LIMIT or over_size > _NAME_LIMIT:
        raise TargetRefused("no name of an operator", "its length is beyond reason")
    name, overload = read_scattered(pid, [(name_at, name_size), (over_at, max(over_size, 1))])
    text = name.decode("ascii", "replace")
    return f"{text}.{overload.decode('ascii', 'replace')}" if over_size else text


def _give_back(fd: int) -> None:
    """Free the ring's pages. The mapping in the target stays and is used again; but the header is left, for
    the callback reads there until its next call."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate(
        fd, _KEEP_SIZE_PUNCH_HOLE,
        ctypes.c_long(code.HEADER_BYTES), ctypes.c_long(RING_BYTES - code.HEADER_BYTES),
    )  # fmt: skip
