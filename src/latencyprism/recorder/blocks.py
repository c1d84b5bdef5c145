"""Blocks: how our own tables travel inside a Perfetto trace.

A block is one ``TracePacket`` that carries nothing but the field ``BLOCK_FIELD``, which Perfetto does not
know and skips. Inside: 1 kind, 2 header (JSON), 3 data, 4 how the data is packed (0 plain, 1 zlib), 5 size
of the data unpacked, 6 CRC-32 over kind, header and data as written. A block is believed only whole.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from latencyprism.recorder import wire

BLOCK_FIELD = 15517
MAX_DATA_BYTES = 64 << 20
"""Unpacked size that a reader accepts for one block; writers stay far below."""

_KIND, _HEADER, _DATA, _PACKING, _SIZE, _CRC = range(1, 7)


class BadBlock(Exception):
    """A block that is there but cannot be believed; the message says why."""


@dataclass(slots=True)
class Block:
    kind: str
    header: dict[str, Any]
    data: bytes = b""


def write_block(block: Block, compress: bool = True) -> bytes:
    """The block as a packet of a trace file."""
    kind = block.kind.encode()
    header = json.dumps(block.header, separators=(",", ":"), default=str).encode()
    data = zlib.compress(block.data, 1) if compress and block.data else block.data
    body = b"".join(
        (
            wire.bytes_field(_KIND, kind),
            wire.bytes_field(_HEADER, header),
            wire.bytes_field(_DATA, data),
            wire.uint_field(_PACKING, 1 if data is not block.data else 0),
            wire.uint_field(_SIZE, len(block.data)),
            wire.uint_field(_CRC, _checksum(kind, header, data)),
        )
    )
    return wire.packet(wire.bytes_field(BLOCK_FIELD, body))


def _checksum(kind: bytes | memoryview, header: bytes | memoryview, data: bytes | memoryview) -> int:
    return zlib.crc32(data, zlib.crc32(header, zlib.crc32(kind)))


def blocks_in(data: memoryview) -> Iterator[Block | BadBlock]:
    """Every block of a trace file, in order; a damaged one comes as the ``BadBlock`` that says why.

    Raises WireError where the file stops being a sequence of packets: cut off, or not a trace at all.
    """
    for number, value, end in wire.fields(data):
        if number != wire.TRACE_PACKET or not isinstance(value, memoryview):
            raise wire.WireError(end, "what follows is not a trace packet")
        # Peek at the first tag only: walking every event of the Perfetto part would take seconds.
        if value[: len(_BLOCK_TAG)] == _BLOCK_TAG:
            try:
                yield _read_block(value)
            except BadBlock as bad:
                yield bad


_BLOCK_TAG = wire.varint(BLOCK_FIELD << 3 | 2)


def _read_block(packet_body: memoryview) -> Block:
    try:
        inner = next(wire.fields(packet_body))[1]
        if not isinstance(inner, memoryview):
            raise BadBlock("a block has no body")
        parts = {number: value for number, value, _ in wire.fields(inner)}
    except wire.WireError as error:
        raise BadBlock(f"a block is damaged ({error})") from None
    kind, header, data = (_bytes(parts.get(number)) for number in (_KIND, _HEADER, _DATA))
    if parts.get(_CRC) != _checksum(kind, header, data):
        raise BadBlock("the checksum of a block is wrong")
    try:
        loaded = json.loads(bytes(header))
        name = bytes(kind).decode("ascii")
    except (ValueError, RecursionError):
        raise BadBlock("the header of a block is not JSON") from None
    if not isinstance(loaded, dict):
        raise BadBlock("the header of a block is not an object")
    return Block(name, loaded, _unpack(name, data, parts.get(_PACKING, 0), parts.get(_SIZE, 0)))


def _bytes(value: int | memoryview | None) -> memoryview:
    return value if isinstance(value, memoryview) else memoryview(b"")


def _unpack(kind: str, data: memoryview, packing: object, size: object) -> bytes:
    if not isinstance(size, int) or size > MAX_DATA_BYTES:
        raise BadBlock(f"block {kind} claims more than {MAX_DATA_BYTES >> 20} MiB")
    if packing == 0:
        plain = bytes(data)
    elif packing == 1:
        unpacker = zlib.decompressobj()
        try:
            plain = unpacker.decompress(data, size + 1)
        except zlib.error as error:
            raise BadBlock(f"block {kind} cannot be unpacked ({error})") from None
    else:
        raise BadBlock(f"block {kind} is packed in a way not known here")
    if len(plain) != size:
        raise BadBlock(f"block {kind} holds {len(plain)} bytes and claims {size}")
    return plain
