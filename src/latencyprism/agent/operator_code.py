"""The native callbacks of the operator probe (x86-64, System V), and the layout of the ring they write.

A record is 32 bytes: time stamp counter, function schema (0: named by a string, or an end), thread pointer
with bit 0 set for an end, and index + 1, which is written last. The first start callback past the deadline or
the limit of records takes the probe away, so that nobody is needed for that: whoever swaps the handle for
zero removes it, once, whichever thread it is. The callbacks are leaves but for that call; they use registers
that a caller must expect to lose, touch no vector register, and never block.
"""

from __future__ import annotations

import struct

HEADER_BYTES = 4096
RECORD_BYTES = 32
SLOTS = 1 << 18
"""8 MiB: above a second of 100 steps/s with 1,088 operators each; copied fifty times a second."""

STATE, DEADLINE_TSC, HEAD, LIMIT, HANDLE, EXPIRED_TSC, THREAD, POINTER = range(8)
"""Places of the 64-bit words at the head of the ring. ``THREAD``: number, in the target's own namespace, of
the thread that armed; ``POINTER``: its thread pointer, as its records carry it."""
STATE_EMPTY, STATE_ARMED, STATE_DISARMED, STATE_REFUSED, STATE_BUSY = range(5)
RING_MARK = b"\x11RINGADR"
REMOVE_MARK = b"\x11REMOVE!"

_RING = b"\x49\xbb" + RING_MARK  # mov r11, ring
_TSC = bytes.fromhex("0f31 48c1e220 4809d0")  # rdtsc; rax = whole counter
_PAST_DEADLINE = bytes.fromhex("493b4308")  # cmp rax, deadline
_CLAIM = bytes.fromhex("b901000000 f0490fc14b10 493b4b18")  # rcx = head++; cmp rcx, limit
_SLOT = (
    bytes.fromhex("4c8d4101 81e1")  # r8 = index + 1; ecx &= slots - 1
    + struct.pack("<I", SLOTS - 1)
    + bytes.fromhex("48c1e105 4d8d8c0b00100000")  # r9 = ring + header + 32 * slot
    + bytes.fromhex("49c7411800000000 498901")  # not whole until its index is there; time
)
_THREAD = bytes.fromhex("64488b042500000000")  # rax = fs:[0]
_PUBLISH = bytes.fromhex("49894110 4d894118")  # thread, then index + 1: x86 keeps the order of stores
_RETURN = b"\xc3"


def _unless_above(code: bytes) -> bytes:
    """jae over ``code``, then ``code``."""
    assert len(code) < 128
    return b"\x73" + bytes([len(code)]) + code


def start_callback(function_offset: int, kind_offset: int) -> bytes:
    """``unique_ptr<ObserverContext> (*)(const RecordFunction&)``; its result, null, is returned through the
    memory that rdi points at."""
    write = (
        _SLOT
        + b"\x48\x8b\x86" + struct.pack("<I", function_offset)  # rax = schema
        + b"\x80\xbe" + struct.pack("<I", kind_offset) + b"\x00"  # by a string?
        + bytes.fromhex("7502 31c0 49894108")
        + _THREAD + _PUBLISH + bytes.fromhex("4889f8") + _RETURN
    )  # fmt: skip
    claim = _CLAIM + _unless_above(write)
    return _RING + bytes.fromhex("48c70700000000") + _TSC + _PAST_DEADLINE + _unless_above(claim) + _expire()


def _expire() -> bytes:
    """Both jumps above lead here, rax = time. The push aligns the stack for the call."""
    remove = (
        b"\x48\xb8" + REMOVE_MARK + bytes.fromhex("ffd0")  # at::removeCallback(handle)
        + _RING + b"\x49\xc7\x03" + struct.pack("<I", STATE_DISARMED)
    )  # fmt: skip
    swap = bytes.fromhex("57 31ff 49877b20 4885ff 74") + bytes([len(remove)])  # rdi = handle, handle = 0
    return bytes.fromhex("49894328") + swap + remove + bytes.fromhex("58") + _RETURN


def end_callback() -> bytes:
    """``void (*)(const RecordFunction&, ObserverContext*)``: writes nothing past deadline or limit."""
    write = _SLOT + bytes.fromhex("49c7410800000000") + _THREAD + bytes.fromhex("4883c801") + _PUBLISH
    claim = _CLAIM + _unless_above(write)
    return _RING + _TSC + _PAST_DEADLINE + _unless_above(claim) + _RETURN


COUNTER = _TSC + _RETURN
"""A function without parameters: the time stamp counter."""
POINTER_OF_THREAD = _THREAD + _RETURN
"""A function without parameters: the thread pointer."""
TAKE_HANDLE = _RING + bytes.fromhex("31c0 49874320") + _RETURN
"""A function without parameters: the handle, which is zero from then on."""


def assemble(function_offset: int, kind_offset: int) -> tuple[bytes, dict[str, int]]:
    """(code with the marks of the two addresses in it, place of each function)."""
    parts = {
        "start": start_callback(function_offset, kind_offset), "end": end_callback(), "counter": COUNTER,
        "pointer": POINTER_OF_THREAD, "take": TAKE_HANDLE,
    }  # fmt: skip
    code, places = b"", {}
    for name, part in parts.items():
        places[name] = len(code)
        code += part + b"\xcc" * (-len(part) % 16)
    return code, places
