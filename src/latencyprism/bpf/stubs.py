"""Functions of our own to probe, one for each way in which a function can begin: what a probe costs depends
on the instruction it replaces, and on the machine.

The kernel emulates a push and a long no-op; most others it must execute apart, with a trap before and one
after. Machine code is written to a file in memory, because only code of files can be probed.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import struct
from typing import NamedTuple

import numpy as np

from latencyprism.errors import PrismError

PUSH, NOP, ENDBR64, OTHER = "push", "nop", "endbr64", "other"
CLASSES = (PUSH, NOP, ENDBR64, OTHER)
"""How a function can begin on x86-64. On aarch64 there is one class alone, ``other``."""

_ENDBR64_BYTES = b"\xf3\x0f\x1e\xfa"
_NOP5 = b"\x0f\x1f\x44\x00\x00"
_X86 = {
    PUSH: b"\x55\x5d\xc3",  # push rbp; pop rbp; ret
    NOP: _NOP5 + b"\xc3",
    ENDBR64: _ENDBR64_BYTES + b"\x55\x5d\xc3",
    OTHER: b"\x48\x83\xec\x08\x48\x83\xc4\x08\xc3",  # sub rsp, 8; add rsp, 8; ret
}
# stp x29, x30, [sp, #-16]!; ldp x29, x30, [sp], #16; ret
_ARM = {OTHER: struct.pack("<III", 0xA9BF7BFD, 0xA8C17BFD, 0xD65F03C0)}
_PAGE, _FUNCTION = 4096, 64
_MOST_CLONES = 512


class Stub(NamedTuple):
    """A function by its class: its offset in the file, and that of a loop that calls it."""

    kind: str
    offset: int
    loop: int


def class_of(first_bytes: bytes, machine: str | None = None) -> str:
    """How a function that begins with these bytes (8 are enough) is treated."""
    if (machine or platform.machine()) != "x86_64":
        return OTHER
    if first_bytes.startswith(_ENDBR64_BYTES):
        return ENDBR64
    if first_bytes.startswith(_NOP5):
        return NOP
    # push of one of the registers, with or without the prefix for the upper eight
    plain = first_bytes[1:] if first_bytes[:1] == b"\x41" else first_bytes
    return PUSH if plain and 0x50 <= plain[0] <= 0x57 else OTHER


class StubFile:
    """The file and its mapping. ``clones`` further functions of class ``push`` (``other`` on aarch64) lie at
    ``clones`` offsets. A child inherits ``descriptor`` and may map the same file."""

    def __init__(self, clones: int = 0, descriptor: int | None = None) -> None:
        self.stubs: dict[str, Stub] = {}
        bodies = _X86 if platform.machine() == "x86_64" else _ARM
        code = bytearray()
        for kind, body in bodies.items():
            at = len(code)
            code += body.ljust(_FUNCTION, b"\0")
            self.stubs[kind] = Stub(kind, at, len(code))
            code += _loop(len(code), at).ljust(_FUNCTION, b"\0")
        first = next(iter(bodies.values()))
        self.clones = [len(code) + _FUNCTION * n for n in range(min(clones, _MOST_CLONES))]
        code += first.ljust(_FUNCTION, b"\0") * len(self.clones)
        size = len(code) + _PAGE - 1 & -_PAGE
        if descriptor is None:
            descriptor = os.memfd_create("latencyprism-stubs")
            os.write(descriptor, bytes(code).ljust(size, b"\0"))
        self.descriptor = descriptor
        try:
            # Never writable: the kernel does not probe what could be rewritten.
            self._memory = mmap.mmap(descriptor, size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_EXEC)
        except OSError as error:
            os.close(descriptor)
            raise PrismError("cannot map code of our own", error.strerror or str(error)) from None
        self._start = int(np.frombuffer(self._memory, np.uint8).ctypes.data)
        self._prototype = ctypes.CFUNCTYPE(None, ctypes.c_int)

    def run(self, kind: str, count: int) -> None:
        """Call the stub of class ``kind`` ``count`` times, without this interpreter's lock; at most 2^31."""
        if count <= 0:
            return
        self._prototype(self._start + self.stubs[kind].loop)(count)

    def address(self, offset: int) -> int:
        """Where a byte of the file lies in this process."""
        return self._start + offset

    def close(self) -> None:
        """The mapping stays until this object and all functions from it are gone."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def _loop(here: int, target: int) -> bytes:
    """Machine code at offset ``here`` that calls the code at ``target`` as often as its argument says."""
    if platform.machine() == "x86_64":
        # push rbx; mov ebx, edi; again: call target; dec ebx; jnz again; pop rbx; ret
        call_at = here + 3
        return b"\x53\x89\xfb\xe8" + struct.pack("<i", target - call_at - 5) + b"\xff\xcb\x75\xf7\x5b\xc3"
    # stp x29, x30, [sp, #-32]!; str x19, [sp, #16]; mov w19, w0; bl target; subs w19, w19, #1; b.ne -8;
    # ldr x19, [sp, #16]; ldp x29, x30, [sp], #32; ret
    branch = (target - (here + 12)) // 4 & 0x3FFFFFF
    return struct.pack(
        "<9I", 0xA9BE7BFD, 0xF9000BF3, 0x2A0003F3, 0x94000000 | branch, 0x71000673, 0x54FFFFC1,
        0xF9400BF3, 0xA8C27BFD, 0xD65F03C0,
    )  # fmt: skip
