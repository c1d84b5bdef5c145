"""The stack image that lets a borrowed thread find its way back alone.

A function is entered with the C library's signal return trampoline as its return address and, where the
kernel looks for it, the frame of a signal handler (``struct rt_sigframe`` of x86-64). When the function
returns, the trampoline asks the kernel to restore every register, the XSAVE state and the signal mask from
that frame. From then on the tracer is not needed: should it die, the thread still returns to where it was.
Several frames one above the other make a chain of calls.
"""

from __future__ import annotations

import operator
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import TargetRefused
from .ptrace import Registers

RED_ZONE = 128
# Bytes of rt_sigframe: return address 8, ucontext 304, siginfo 128.
_FRAME = 440
_FRAME_STEP = 448
# uc_flags: XSAVE state present, SS saved, SS restored as it is.
_UC_FLAGS = 7
# A mode that is none of SS_ONSTACK, SS_DISABLE, 0: the kernel then leaves the alternate stack as it is.
_KEEP_ALTSTACK = 0x7F
_TRAP_FLAG, _DIRECTION_FLAG = 0x100, 0x400
_SW_RESERVED, _XSTATE_HEADER, _LEGACY_BYTES = 464, 512, 576
_MAGIC1, _MAGIC2 = 0x46505853, 0x46505845
# Without permission for AMX tile data the kernel accepts only the standard layout below it.
_TILE_DATA_BIT, _TILE_DATA_OFFSET = 18, 2816
# SEGV, TRAP, BUS, FPE, ILL stay deliverable: blocked, they would end the process without its handlers.
BLOCKED_SIGNALS = ((1 << 64) - 1) & ~(1 << 10 | 1 << 4 | 1 << 6 | 1 << 7 | 1 << 3)
_CONTEXT_ORDER = (
    *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"),
    *("rdi", "rsi", "rbp", "rbx", "rdx", "rax", "rcx", "rsp", "rip", "eflags"),
)
_NAMES = [field[0] for field in Registers._fields_]
_in_context_order = operator.itemgetter(*(_NAMES.index(name) for name in _CONTEXT_ORDER))
_ALL_REGISTERS = struct.Struct(f"<{len(_NAMES)}Q")
# Return address; uc_flags, uc_link, uc_stack; registers; segments; fpstate and what is reserved; mask;
# siginfo.
_FRAME_LAYOUT = struct.Struct("<Q QQQiiQ 18Q 4H 32x Q 64x Q 128x")


@dataclass(frozen=True, slots=True)
class Call:
    """A C function at ``function`` with up to five integer arguments."""

    function: int
    arguments: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class StackImage:
    """``data`` to be written at ``address`` and the registers that start the first call."""

    address: int
    data: bytes
    entry: Registers


def xsave_image(xstate: bytes) -> bytes:
    """State as ptrace gives it -> as sigreturn wants it: with both magics and the true size and features.

    Raises TargetRefused when it is too short to be XSAVE state.
    """
    if len(xstate) < _LEGACY_BYTES:
        raise TargetRefused("cannot save the thread's registers", "this processor or kernel has no XSAVE")
    in_use = int.from_bytes(xstate[_XSTATE_HEADER : _XSTATE_HEADER + 8], "little")
    size = len(xstate)
    if not in_use >> _TILE_DATA_BIT & 1:
        size = min(size, _TILE_DATA_OFFSET)
    image = bytearray(xstate[:size])
    image[_SW_RESERVED:_XSTATE_HEADER] = struct.pack("<IIQI28x", _MAGIC1, size + 4, in_use | 3, size)
    return bytes(image) + struct.pack("<I", _MAGIC2)


def signal_frame(trampoline: int, registers: Registers, signal_mask: int, xsave_address: int) -> bytes:
    """One ``rt_sigframe``; with ``xsave_address`` 0 the kernel gives the thread a fresh vector state."""
    return _FRAME_LAYOUT.pack(
        trampoline,
        *(_UC_FLAGS, 0, 0, _KEEP_ALTSTACK, 0, 0),
        *_in_context_order(_ALL_REGISTERS.unpack(registers)),
        *(registers.cs & 0xFFFF, 0, 0, registers.ss & 0xFFFF),
        xsave_address,
        signal_mask,
    )


def _entering(resumed: Registers, call: Call, stack: int) -> Registers:
    registers = Registers()
    for name in ("cs", "ss", "ds", "es", "fs", "gs", "fs_base", "gs_base"):
        setattr(registers, name, getattr(resumed, name))
    for name, value in zip(("rdi", "rsi", "rdx", "rcx", "r8"), call.arguments):
        setattr(registers, name, value)
    registers.rip = call.function
    registers.rsp = stack
    registers.eflags = 0x202
    registers.orig_rax = (1 << 64) - 1
    return registers


def stack_image(
    resumed: Registers,
    xstate: bytes,
    signal_mask: int,
    trampoline: int,
    calls: Sequence[Call],
    scratch: bytes = b"",
) -> StackImage:
    """Lay out ``calls``, made one after the other, after which the thread goes on at ``resumed``.

    Below the red zone, downwards: the XSAVE state (64-byte aligned), a frame for the way back, a frame for
    each call but the first. ``scratch`` is put at ``scratch_address(resumed, xstate, len(calls))``.
    """
    saved = xsave_image(xstate)
    top, xsave_at, lowest = _places(resumed, len(saved), len(calls), len(scratch))
    image = bytearray(top - lowest)
    image[xsave_at - lowest : xsave_at - lowest + len(saved)] = saved
    image[top - lowest - len(scratch) :] = scratch
    for index in range(len(calls)):
        at = lowest + index * _FRAME_STEP
        if index + 1 < len(calls):
            after, mask, vectors = _entering(resumed, calls[index + 1], at + _FRAME_STEP), BLOCKED_SIGNALS, 0
        else:
            after, mask, vectors = resumed, signal_mask, xsave_at
        image[at - lowest : at - lowest + _FRAME] = signal_frame(trampoline, after, mask, vectors)
    return StackImage(lowest, bytes(image), _entering(resumed, calls[0], lowest))


def scratch_address(resumed: Registers, size: int) -> int:
    """Where ``stack_image`` puts ``size`` bytes of scratch: right below the red zone, 16-byte aligned."""
    return (resumed.rsp - RED_ZONE - size) & ~15


def _places(resumed: Registers, saved: int, calls: int, scratch: int) -> tuple[int, int, int]:
    """(end of the image, XSAVE state, lowest frame = stack pointer at the first entry), all addresses."""
    top = scratch_address(resumed, scratch) + scratch
    xsave_at = (top - scratch - saved) & ~63
    # At the entry of a function rsp is 8 above a multiple of 16.
    highest = ((xsave_at - _FRAME_STEP) & ~15) - 8
    return top, xsave_at, highest - (calls - 1) * _FRAME_STEP
