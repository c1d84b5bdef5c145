"""The few rules of the protobuf wire format that a Perfetto trace needs: writing fields, walking packets."""

from __future__ import annotations

import struct
from collections.abc import Iterator

_DOUBLE = struct.Struct("<d")
_U64 = (1 << 64) - 1

TRACE_PACKET = 1
"""Field number of a packet in the ``Trace`` message, which is what a trace file is."""


class WireError(Exception):
    """The bytes do not follow the wire format, or end early. ``offset``: up to where they were whole."""

    def __init__(self, offset: int, why: str) -> None:
        self.offset, self.why = offset, why
        super().__init__(f"{why} at byte {offset}")


def varint(value: int) -> bytes:
    """A base-128 varint; a negative ``value`` takes the ten bytes of its two's complement."""
    value &= _U64
    if value < 0x80:
        return bytes((value,))
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def uint_field(number: int, value: int) -> bytes:
    return varint(number << 3) + varint(value)


def double_field(number: int, value: float) -> bytes:
    return varint(number << 3 | 1) + _DOUBLE.pack(value)


def fixed64_field(number: int, value: int) -> bytes:
    return varint(number << 3 | 1) + (value & _U64).to_bytes(8, "little")


def bytes_field(number: int, value: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(value)) + value


def text_field(number: int, value: str) -> bytes:
    """Perfetto wants UTF-8; what cannot be written so is escaped."""
    return bytes_field(number, value.encode("utf-8", "backslashreplace"))


def packet(body: bytes) -> bytes:
    """``body`` as one packet of a trace file."""
    return bytes_field(TRACE_PACKET, body)


def read_varint(data: memoryview, offset: int, end: int) -> tuple[int, int]:
    """The varint at ``offset`` and the offset after it."""
    value = shift = 0
    start = offset
    while offset < end:
        byte = data[offset]
        offset += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & _U64, offset
        shift += 7
        if shift > 63:
            raise WireError(start, "a number is too long")
    raise WireError(start, "the bytes end inside a number")


def fields(data: memoryview) -> Iterator[tuple[int, int | memoryview, int]]:
    """Each field of a message: number, value (int of a varint or fixed field, or its bytes), end offset."""
    offset, end = 0, len(data)
    while offset < end:
        start = offset
        tag, offset = read_varint(data, offset, end)
        number, kind = tag >> 3, tag & 7
        value: int | memoryview
        if kind == 0:
            value, offset = read_varint(data, offset, end)
        elif kind in (1, 2, 5):
            size = 8 if kind == 1 else 4
            if kind == 2:
                size, offset = read_varint(data, offset, end)
            if size > end - offset:
                raise WireError(start, "the bytes end inside a field")
            value = data[offset : offset + size]
            offset += size
            if kind != 2:
                value = int.from_bytes(value, "little")
        else:
            raise WireError(start, f"a field has the unknown kind {kind}")
        if number == 0:
            raise WireError(start, "a field has the number 0")
        yield number, value, offset
