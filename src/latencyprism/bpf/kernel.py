"""bpf(2) as functions: maps, BTF, programs, links. Each returns a descriptor or raises PrismError.

Layouts are those of ``union bpf_attr`` in the kernel's stable interface; every attribute is packed by hand
so that nothing but the standard library is needed.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from latencyprism.errors import PrismError

_NUMBERS = {"x86_64": 321, "aarch64": 280}
_MAP_CREATE, _LOOKUP, _UPDATE, _DELETE, _PROG_LOAD = 0, 1, 2, 3, 5
_OBJECT_INFO, _ENABLE_STATISTICS = 15, 32
_RAW_TRACEPOINT_OPEN, _BTF_LOAD, _MAP_FREEZE, _LOOKUP_BATCH, _LINK_CREATE = 17, 18, 22, 24, 28

MAP_HASH, MAP_ARRAY, MAP_PERCPU_ARRAY, MAP_LRU_HASH, MAP_RINGBUF = 1, 2, 6, 9, 27
F_RDONLY_PROG, F_MMAPABLE = 1 << 7, 1 << 10
PROG_KPROBE, PROG_RAW_TRACEPOINT, PROG_TRACING = 2, 17, 26
ATTACH_NONE, ATTACH_RAW_TP, ATTACH_PERF_EVENT, ATTACH_UPROBE_MULTI, ATTACH_UPROBE_SESSION = 0, 23, 41, 48, 57
UPROBE_MULTI_RETURN = 1
_LOG_BYTES = 1 << 18
_ATTR_BYTES = 160

_libc = ctypes.CDLL(None, use_errno=True)

RIGHTS = "Run as root, or grant CAP_BPF and CAP_PERFMON (and CAP_SYS_PTRACE for another user's process)."
KERNEL = "Needs Linux 5.17 (best: 6.6) or newer with CONFIG_DEBUG_INFO_BTF and CONFIG_UPROBES."


class FeatureMissing(PrismError):
    """The kernel does not know what was asked for; there may be another way."""


def supported_machine() -> str:
    """``x86_64`` or ``aarch64``; raises PrismError elsewhere."""
    machine = platform.machine()
    if machine not in _NUMBERS:
        raise PrismError(
            "cannot use eBPF", f"no programs are built for {machine}", "Run on x86_64 or aarch64."
        )
    return machine


def _bpf(command: int, attribute: bytes) -> int:
    """The raw call; returns the kernel's result, raises OSError."""
    size = len(attribute)
    buffer = ctypes.create_string_buffer(attribute, size)
    result: int = _libc.syscall(
        ctypes.c_long(_NUMBERS[supported_machine()]), ctypes.c_int(command), buffer, ctypes.c_uint(size)
    )
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def refused(what: str, error: OSError, detail: str = "") -> PrismError:
    """The error as a person can act upon it."""
    why = error.strerror or str(error)
    if detail:
        why += f" ({detail})"
    if error.errno in (errno.EPERM, errno.EACCES):
        return PrismError(what, why, RIGHTS)
    if error.errno == errno.ENOSYS:
        return PrismError(what, why, "bpf(2) is missing or blocked by a seccomp profile. " + KERNEL)
    if error.errno in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP):
        return FeatureMissing(what, why, KERNEL)
    return PrismError(what, why)


def _name(text: str) -> bytes:
    return text.encode("ascii", "replace")[:15].ljust(16, b"\0")


def map_create(kind: int, key: int, value: int, entries: int, flags: int = 0, name: str = "") -> int:
    """A map; ``key`` and ``value`` are sizes in bytes, ``entries`` is bytes for a ring buffer."""
    attribute = struct.pack("<7I16s", kind, key, value, entries, flags, 0, 0, _name(name))
    try:
        return _bpf(_MAP_CREATE, attribute.ljust(_ATTR_BYTES, b"\0"))
    except OSError as error:
        raise refused(f"cannot create the eBPF map {name or kind}", error) from None


def _element(command: int, descriptor: int, key: bytes, value: ctypes.Array[ctypes.c_char] | None) -> None:
    key_buffer = ctypes.create_string_buffer(key, len(key))
    address = 0 if value is None else ctypes.addressof(value)
    _bpf(command, struct.pack("<IIQQQ", descriptor, 0, ctypes.addressof(key_buffer), address, 0))


def map_update(descriptor: int, key: bytes, value: bytes) -> None:
    """Set one element; sizes must be the map's."""
    try:
        _element(_UPDATE, descriptor, key, ctypes.create_string_buffer(value, len(value)))
    except OSError as error:
        raise refused("cannot write an eBPF map", error) from None


def map_lookup(descriptor: int, key: bytes, value_bytes: int) -> bytes | None:
    """One element's bytes (for a per-CPU map: all CPUs', one after the other), None if absent."""
    buffer = ctypes.create_string_buffer(value_bytes)
    try:
        _element(_LOOKUP, descriptor, key, buffer)
    except OSError as error:
        if error.errno == errno.ENOENT:
            return None
        raise refused("cannot read an eBPF map", error) from None
    return buffer.raw


class Element:
    """One element that is read again and again: everything for the call is made once."""

    def __init__(self, descriptor: int, key: bytes, value_bytes: int) -> None:
        self._key = ctypes.create_string_buffer(key, len(key))
        self.value = bytearray(value_bytes)
        self._place = (ctypes.c_char * value_bytes).from_buffer(self.value)
        places = (ctypes.addressof(self._key), ctypes.addressof(self._place))
        attribute = struct.pack("<IIQQQ", descriptor, 0, *places, 0)
        self._attribute = ctypes.create_string_buffer(attribute, len(attribute))
        self._call = (ctypes.c_long(_NUMBERS[supported_machine()]), ctypes.c_int(_LOOKUP))
        self._size = ctypes.c_uint(len(attribute))

    def read(self) -> bool:
        """Fill ``value``; False if the element is not there, or cannot be read."""
        return bool(_libc.syscall(*self._call, self._attribute, self._size) == 0)


def map_delete(descriptor: int, key: bytes) -> bool:
    """Remove one element; False when there was none."""
    try:
        _element(_DELETE, descriptor, key, None)
    except OSError as error:
        if error.errno == errno.ENOENT:
            return False
        raise refused("cannot write an eBPF map", error) from None
    return True


def map_all(descriptor: int, key_bytes: int, value_bytes: int, entries: int) -> tuple[bytes, bytes]:
    """All keys and all values of a hash map, one after the other, a few system calls in all."""
    keys, values = bytearray(), bytearray()
    room = min(entries, 1024)
    key_buffer = ctypes.create_string_buffer(room * key_bytes)
    value_buffer = ctypes.create_string_buffer(room * value_bytes)
    place = ctypes.create_string_buffer(max(8, key_bytes))
    begun = False
    while len(keys) < 2 * entries * key_bytes:
        size = struct.calcsize("<QQQQIIQQ")
        buffer = ctypes.create_string_buffer(
            struct.pack(
                "<QQQQIIQQ",
                ctypes.addressof(place) if begun else 0, ctypes.addressof(place),
                ctypes.addressof(key_buffer), ctypes.addressof(value_buffer), room, descriptor, 0, 0,
            ), size,
        )  # fmt: skip
        code = _bpf_in_place(_LOOKUP_BATCH, buffer, size)
        if code == errno.ENOSPC and room < entries:  # one bucket holds more than the buffer
            room = entries
            key_buffer = ctypes.create_string_buffer(room * key_bytes)
            value_buffer = ctypes.create_string_buffer(room * value_bytes)
            continue
        if code not in (0, errno.ENOENT):
            raise refused("cannot read an eBPF map", OSError(code, os.strerror(code)))
        count: int = struct.unpack_from("<I", buffer, 32)[0]
        keys += key_buffer.raw[: count * key_bytes]
        values += value_buffer.raw[: count * value_bytes]
        begun = True
        if code == errno.ENOENT:
            break
    return bytes(keys), bytes(values)


def _bpf_in_place(command: int, buffer: ctypes.Array[ctypes.c_char], size: int) -> int:
    """The raw call on an attribute that the kernel writes to; returns 0 or the error's number."""
    number = ctypes.c_long(_NUMBERS[supported_machine()])
    result: int = _libc.syscall(number, ctypes.c_int(command), buffer, ctypes.c_uint(size))
    return ctypes.get_errno() if result < 0 else 0


@cache
def possible_cpus() -> int:
    """How many values an element of a per-CPU map has."""
    try:
        text = Path("/sys/devices/system/cpu/possible").read_text()
        return int(text.strip().split(",")[-1].split("-")[-1]) + 1
    except (OSError, ValueError):
        raise PrismError("cannot read an eBPF map", "the number of CPUs is not known") from None


def map_freeze(descriptor: int) -> None:
    """No more writes from here: its content becomes constants for the verifier."""
    try:
        _bpf(_MAP_FREEZE, struct.pack("<I", descriptor))
    except OSError as error:
        raise refused("cannot freeze an eBPF map", error) from None


def btf_load(data: bytes) -> int:
    """Load type information. The log is asked for only after a failure, because it costs."""
    buffer = ctypes.create_string_buffer(data, len(data))
    log = ctypes.create_string_buffer(1)
    try:
        return _bpf(_BTF_LOAD, struct.pack("<QQIIII", ctypes.addressof(buffer), 0, len(data), 0, 0, 0))
    except OSError as error:
        first = error
    log = ctypes.create_string_buffer(_LOG_BYTES)
    address = ctypes.addressof(buffer)
    try:
        descriptor = _bpf(
            _BTF_LOAD, struct.pack("<QQIIII", address, ctypes.addressof(log), len(data), _LOG_BYTES, 1, 0)
        )
    except OSError:
        raise refused("cannot load eBPF type information", first, _last_line(log.value)) from None
    return descriptor


def _last_line(log: bytes) -> str:
    lines = [line for line in log.decode("utf-8", "replace").splitlines() if line.strip()]
    lines = [
        line for line in lines if not line.startswith(("processed ", "stack depth", "verification time"))
    ]
    return lines[-1][:200] if lines else ""


def program_load(
    kind: int,
    name: str,
    instructions: bytes,
    *,
    btf: int,
    func_info: bytes,
    core_relocations: bytes,
    attach_type: int = 0,
    attach_btf_id: int = 0,
) -> int:
    """Verify and load a program. ``func_info`` must be there whenever ``core_relocations`` is: without it
    the kernel silently skips the relocations and the program reads wrong offsets."""
    if core_relocations and not func_info:
        raise PrismError(f"cannot load the eBPF program {name}", "relocations without function information")
    code = ctypes.create_string_buffer(instructions, len(instructions))
    licence = ctypes.create_string_buffer(b"Dual BSD/GPL")
    functions = ctypes.create_string_buffer(func_info, max(len(func_info), 1))
    relocations = ctypes.create_string_buffer(core_relocations, max(len(core_relocations), 1))

    def attribute(log: int, log_bytes: int) -> bytes:
        packed = struct.pack(
            "<IIQQIIQII16sIIIIQIIQIIIIQQI",
            kind, len(instructions) // 8, ctypes.addressof(code), ctypes.addressof(licence),
            1 if log else 0, log_bytes, log, 0, 0, _name(name),
            0, attach_type, btf, 8 if func_info else 0,
            ctypes.addressof(functions) if func_info else 0, len(func_info) // 8, 0, 0, 0,
            attach_btf_id, 0, len(core_relocations) // 16, 0,
            ctypes.addressof(relocations) if core_relocations else 0, 16 if core_relocations else 0,
        )  # fmt: skip
        return packed.ljust(_ATTR_BYTES, b"\0")

    try:
        return _bpf(_PROG_LOAD, attribute(0, 0))
    except OSError as error:
        first = error
    log = ctypes.create_string_buffer(_LOG_BYTES)
    try:
        return _bpf(_PROG_LOAD, attribute(ctypes.addressof(log), _LOG_BYTES))
    except OSError:
        reason = _last_line(log.value)
        if reason and first.errno != errno.EPERM:
            raise PrismError(
                f"cannot load the eBPF program {name}", f"the verifier refused: {reason}", KERNEL
            ) from None
        raise refused(f"cannot load the eBPF program {name}", first, reason) from None


_INFO_BYTES, _RUN_TIME_AT = 216, 192


def run_time(program: int) -> tuple[int, int]:
    """(ns, runs) of a program so far, counted only while ``run_time_statistics`` is entered."""
    info = ctypes.create_string_buffer(_INFO_BYTES)
    try:
        _bpf(_OBJECT_INFO, struct.pack("<IIQ", program, _INFO_BYTES, ctypes.addressof(info)))
    except OSError as error:
        raise refused("cannot read an eBPF program's run time", error) from None
    ns, runs = struct.unpack_from("<QQ", info, _RUN_TIME_AT)
    return int(ns), int(runs)


@contextmanager
def run_time_statistics() -> Iterator[None]:
    """While entered, the kernel times every eBPF program of the machine; that costs some 20 ns a run."""
    try:
        descriptor = _bpf(_ENABLE_STATISTICS, struct.pack("<I", 0))
    except OSError as error:
        raise refused("cannot time eBPF programs", error) from None
    try:
        yield
    finally:
        os.close(descriptor)


def link_uprobe_multi(
    program: int,
    path: str,
    offsets: Sequence[int],
    cookies: Sequence[int],
    pid: int,
    *,
    returns: bool = False,
    session: bool = False,
) -> int:
    """One link for all ``offsets`` (file offsets in bytes) of the file at ``path``, only hit in ``pid``.
    ``session``: one program for entry and return (Linux 6.13)."""
    count = len(offsets)
    offset_array = (ctypes.c_uint64 * count)(*offsets)
    cookie_array = (ctypes.c_uint64 * count)(*cookies)
    path_buffer = ctypes.create_string_buffer(os.fsencode(path))
    attribute = struct.pack(
        "<IIIIQQQQIII",
        program, 0, ATTACH_UPROBE_SESSION if session else ATTACH_UPROBE_MULTI, 0,
        ctypes.addressof(path_buffer), ctypes.addressof(offset_array), 0, ctypes.addressof(cookie_array),
        count, UPROBE_MULTI_RETURN if returns else 0, pid,
    )  # fmt: skip
    try:
        return _bpf(_LINK_CREATE, attribute.ljust(64, b"\0"))
    except OSError as error:
        if error.errno == errno.ESRCH:
            raise PrismError("cannot attach uprobes", f"process {pid} is gone") from None
        raise refused("cannot attach uprobes", error, "uprobe_multi link") from None


def link_perf_event(program: int, event: int, cookie: int) -> int:
    """Attach a program to a perf event, with a cookie for it."""
    try:
        return _bpf(
            _LINK_CREATE, struct.pack("<IIIIQ", program, event, ATTACH_PERF_EVENT, 0, cookie).ljust(64, b"\0")
        )
    except OSError as error:
        raise refused("cannot attach uprobes", error, "perf-event link") from None


def link_raw_tracepoint(program: int, name: str) -> int:
    """Attach a raw tracepoint program by the tracepoint's name."""
    text = ctypes.create_string_buffer(name.encode())
    try:
        return _bpf(_RAW_TRACEPOINT_OPEN, struct.pack("<QII", ctypes.addressof(text), program, 0))
    except OSError as error:
        raise refused(f"cannot attach to the tracepoint {name}", error) from None


def link_tracing(program: int, name: str) -> int:
    """Attach a loaded tp_btf program to its tracepoint."""
    try:
        return _bpf(_RAW_TRACEPOINT_OPEN, struct.pack("<QII", 0, program, 0))
    except OSError as error:
        raise refused(f"cannot attach to the tracepoint {name}", error) from None
