"""The drawing of a trace, deflated: packets in ``compressed_packets``, which Perfetto unpacks in order."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator

from latencyprism.recorder.wire import bytes_field, packet

BYTES_PER_PIECE = 1 << 20
_COMPRESSED_PACKETS = 50


def squeezed(packets: Iterable[bytes]) -> Iterator[bytes]:
    """``packets`` some at a time, each time as one: a sixth of the size for steps and readings, and less than
    half for operators. A file that ends early loses the piece that was not whole."""
    held: list[bytes] = []
    size = 0
    for one in packets:
        held.append(one)
        size += len(one)
        if size >= BYTES_PER_PIECE:
            yield _piece(held)
            held, size = [], 0
    if held:
        yield _piece(held)


def _piece(packets: list[bytes]) -> bytes:
    return packet(bytes_field(_COMPRESSED_PACKETS, zlib.compress(b"".join(packets), 6)))
