"""Reading and writing the memory of another process without stopping it (process_vm_readv and writev).

The calls go through ``PyDLL``, which keeps this interpreter's own lock: while a target is held, no other
thread of the watcher may get in between and lengthen the hold.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Sequence

from ..errors import TargetRefused


class ProcessGone(TargetRefused):
    """The process ended, so its memory is no more."""


class _IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


_libc = ctypes.PyDLL(None, use_errno=True)
for _call in (_libc.process_vm_readv, _libc.process_vm_writev):
    _call.restype = ctypes.c_ssize_t
    _call.argtypes = (
        ctypes.c_int,
        ctypes.POINTER(_IoVec),
        ctypes.c_ulong,
        ctypes.POINTER(_IoVec),
        ctypes.c_ulong,
        ctypes.c_ulong,
    )


def _failed(pid: int, done: int, size: int, verb: str) -> TargetRefused:
    number = ctypes.get_errno()
    if number == errno.ESRCH:
        return ProcessGone(f"process {pid} is gone", "it ended while it was looked at")
    why = os.strerror(number) if done < 0 else f"only {done} of {size} bytes"
    return TargetRefused(f"cannot {verb} memory of process {pid}", why)


def read_memory(pid: int, address: int, size: int) -> bytes:
    """Exactly ``size`` bytes at ``address``. Raises TargetRefused when not all are mapped and permitted."""
    buffer = ctypes.create_string_buffer(size)
    here = _IoVec(ctypes.addressof(buffer), size)
    there = _IoVec(address, size)
    done = _libc.process_vm_readv(pid, ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
    if done != size:
        raise _failed(pid, done, size, "read")
    return buffer.raw


def read_scattered(pid: int, pieces: Sequence[tuple[int, int]]) -> list[bytes]:
    """The bytes at each (address, size) with one system call. Raises TargetRefused unless all are there."""
    buffers = [ctypes.create_string_buffer(size) for _, size in pieces]
    here = (_IoVec * len(pieces))(*(_IoVec(ctypes.addressof(one), len(one)) for one in buffers))
    there = (_IoVec * len(pieces))(*(_IoVec(address, size) for address, size in pieces))
    total = sum(size for _, size in pieces)
    done = _libc.process_vm_readv(pid, here, len(pieces), there, len(pieces), 0)
    if done != total:
        raise _failed(pid, done, total, "read")
    return [one.raw for one in buffers]


class Look:
    """A look at several places at once that is made again and again, without allocating anything on the
    way."""

    def __init__(self, pid: int, sizes: Sequence[int]) -> None:
        self._pid, self._total, self._count = pid, sum(sizes), len(sizes)
        self._buffers = [ctypes.create_string_buffer(size) for size in sizes]
        self._here = (_IoVec * len(sizes))(
            *(_IoVec(ctypes.addressof(one), len(one)) for one in self._buffers)
        )
        self._there = (_IoVec * len(sizes))(*(_IoVec(0, size) for size in sizes))

    def at(self, *addresses: int) -> list[bytes]:
        """The bytes at each address. Raises TargetRefused unless all are there, ProcessGone."""
        for index, address in enumerate(addresses):
            self._there[index].base = address
        done = _libc.process_vm_readv(self._pid, self._here, self._count, self._there, self._count, 0)
        if done != self._total:
            raise _failed(self._pid, done, self._total, "read")
        return [one.raw for one in self._buffers]


def write_memory(pid: int, address: int, data: bytes) -> None:
    """Write all of ``data`` at ``address``. Raises TargetRefused; a part may have been written then."""
    buffer = ctypes.create_string_buffer(data, len(data))
    here = _IoVec(ctypes.addressof(buffer), len(data))
    there = _IoVec(address, len(data))
    done = _libc.process_vm_writev(pid, ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
    if done != len(data):
        raise _failed(pid, done, len(data), "write")
