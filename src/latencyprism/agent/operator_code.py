"""The two native callbacks of the operator probe (x86-64), and the layout of the ring they write.

A record is 32 bytes: time stamp counter, function schema (0: named by a string, or an end), thread pointer
with bit 0 set for an end, and index + 1, which is written last. The start callback takes itself away at its
first call past the deadline or the limit of records, so that nobody is needed for that.
"""

from __future__ import annotations

import struct

HEADER_BYTES = 4096
RECORD_BYTES = 32
SLOTS = 1 << 18
"""8 MiB: above a second of 100 steps/s with 1,088 operators each; copied fifty times a second."""

STATE, DEADLINE_TSC, HEAD, LIMIT, HANDLE, EXPIRED_TSC, THREAD = range(7)
STATE_EMPTY, STATE_ARMED, STATE_DISARMED, STATE_REFUSED, STATE_BUSY = range(5)
RING_MARK = b"\x11RINGADR"
REMOVE_MARK = b"\x11REMOVE!"

_RING = b"\x49\xbb" + RING_MARK  # mov r11, ring
_TSC = bytes.fromhex("0f31 48c1e220 4809d0")  # rdtsc; rax = whole counter
_CLAIM = bytes.fromhex("b901000000 f0490fc14b10 493b4b18")  # rcx = head++; cmp rcx, limit
_SLOT = (
    bytes.fromhex("4c8d4101 81e1")  # r8 = index + 1; ecx &= slots - 1
    + struct.pack("<I", SLOTS - 1)
    + bytes.fromhex("48c1e105 4d8d8c0b00100000")  # r9 = ring + header + 32 * slot
    + bytes.fromhex("49c7411800000000 498901")  # not whole until its index is there; time
)
_THREAD = bytes.fromhex("64488b042500000000")  # rax = fs:[0]
_PUBLISH = bytes.fromhex("49894110 4d894118")
COUNTER = _TSC + b"\xc3"
"""A function without parameters that returns the time stamp counter."""


def start_callback(function_offset: int, kind_offset: int) -> bytes:
    """``ObserverContext* (*)(RecordFunction&)`` with its result (null) returned through memory."""
    write = (
        _SLOT
        + b"\x48\x8b\x86" + struct.pack("<I", function_offset)  # rax = schema
        + b"\x80\xbe" + struct.pack("<I", kind_offset) + b"\x00"  # by a string?
        + bytes.fromhex("7502 31c0 49894108")
        + _THREAD + _PUBLISH + bytes.fromhex("4889f8 c3")
    )  # fmt: skip
    expire = (
        bytes.fromhex("49894328 57 498b7b20 4885ff 7420")  # expired at; push rdi; rdi = handle, 0: skip
        + b"\x48\xb8" + REMOVE_MARK + bytes.fromhex("ffd0") + _RING
        + bytes.fromhex("49c70302000000 9090 90 58 c3")
    )  # fmt: skip
    # The jump over 32 bytes lands on `pop rax`.
    claim = _CLAIM + b"\x73" + bytes([len(write)])
    head = _RING + bytes.fromhex("48c70700000000") + _TSC + bytes.fromhex("493b4308")
    return head + b"\x73" + bytes([len(claim) + len(write)]) + claim + write + expire


def end_callback() -> bytes:
    """``void (*)(const RecordFunction&, ObserverContext*)``: writes nothing past deadline or limit."""
    write = _SLOT + bytes.fromhex("49c7410800000000") + _THREAD + bytes.fromhex("4883c801") + _PUBLISH
    claim = _CLAIM + b"\x73" + bytes([len(write)]) + write
    return _RING + _TSC + bytes.fromhex("493b4308") + b"\x73" + bytes([len(claim)]) + claim + b"\xc3"
