"""Reader of a kernel ring buffer (BPF_MAP_TYPE_RINGBUF): records in order, copied in bulk.

The kernel maps the data twice in a row, so a record that wraps around is still one piece of memory.
"""

from __future__ import annotations

import mmap
import struct

import numpy as np
import numpy.typing as npt

from latencyprism.errors import PrismError

_BUSY, _DISCARD = 1 << 31, 1 << 30
_HEADER_BYTES = 8
_HEADER = struct.Struct("<I")


class RingBuffer:
    """``fileno`` is readable (epoll, select) when a program asked for a wake-up. One reader per ring.

    On aarch64 Python offers no load barrier between the producer position and the data; that
    architecture is built for but was not run.
    """

    def __init__(self, descriptor: int, size: int) -> None:
        self._descriptor, self._size = descriptor, size
        page = mmap.PAGESIZE
        try:
            self._consumer = mmap.mmap(descriptor, page, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
            try:
                self._data = mmap.mmap(
                    descriptor, page + 2 * size, mmap.MAP_SHARED, mmap.PROT_READ, offset=page
                )
            except BaseException:
                self._consumer.close()
                raise
        except OSError as error:
            raise PrismError("cannot map the eBPF ring", error.strerror or str(error)) from None
        self._consumer_at: npt.NDArray[np.uint64] | None = np.frombuffer(self._consumer, np.uint64, 1)
        self._producer_at: npt.NDArray[np.uint64] | None = np.frombuffer(self._data, np.uint64, 1)
        self._bytes: npt.NDArray[np.uint8] | None = np.frombuffer(self._data, np.uint8, 2 * size, page)

    def fileno(self) -> int:
        return self._descriptor

    def _positions(self) -> tuple[int, int]:
        if self._consumer_at is None or self._producer_at is None:
            return 0, 0
        return int(self._consumer_at[0]), int(self._producer_at[0])

    def records(self) -> list[bytes]:
        """Whole records of any length since the last call, oldest first; they then make room for new ones."""
        position, end = self._positions()
        if position >= end or self._bytes is None or self._consumer_at is None:
            return []
        first = position % self._size
        # One copy; the second mapping makes it one stretch of memory.
        data = self._bytes[first : first + min(end - position, self._size)].tobytes()
        found, at = [], 0
        while at < len(data):
            header: int = _HEADER.unpack_from(data, at)[0]
            if header & _BUSY:
                break
            length = header & ~_DISCARD
            start = at + _HEADER_BYTES
            if start + length > len(data):
                raise PrismError("the eBPF ring is broken", "a record longer than what was written")
            if not header & _DISCARD:
                found.append(data[start : start + length])
            at = start + (length + 7 & ~7)
        self._consumer_at[0] = position + at
        return found

    def array(self, dtype: np.dtype[np.void]) -> npt.NDArray[np.void]:
        """All whole records at once, for a ring in which every record is one ``dtype``.

        One copy of the memory, headers checked in bulk; stops before a record still being written.
        """
        stride = _HEADER_BYTES + (dtype.itemsize + 7 & ~7)
        position, end = self._positions()
        pieces: list[npt.NDArray[np.void]] = []
        while position < end and self._bytes is not None and self._consumer_at is not None:
            at = position % self._size
            # The second mapping makes one stretch of at most `size` bytes from anywhere.
            count = min(end - position, self._size) // stride
            block = self._bytes[at : at + count * stride].reshape(count, stride)
            headers = np.ascontiguousarray(block[:, :4]).view(np.uint32)[:, 0]
            odd = np.flatnonzero(headers != dtype.itemsize)
            whole = int(odd[0]) if odd.size else count
            if whole == 0:
                break
            # A copy even where one row alone is contiguous as it is: the kernel will write here again.
            body = block[:whole, _HEADER_BYTES : _HEADER_BYTES + dtype.itemsize].copy()
            pieces.append(body.view(dtype)[:, 0])
            position += whole * stride
            self._consumer_at[0] = position
            if whole < count:
                break
        if not pieces:
            return np.empty(0, dtype)
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def close(self) -> None:
        """Unmap; the descriptor belongs to whoever loaded the map. Safe to repeat."""
        if self._bytes is None:
            return
        self._consumer_at = self._producer_at = self._bytes = None
        self._data.close()
        self._consumer.close()
