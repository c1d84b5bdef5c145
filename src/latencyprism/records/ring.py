"""The shared-memory ring between a probe in a target and the watcher: layout and reader.

One writer thread per ring. Every slot is ``SLOT_WORDS`` little-endian int64; word 0 is the slot's
sequence: 2*i+1 while record i is being written, 2*i+2 when it is whole. The writer never waits; a
reader that falls behind finds a later sequence than it expects and counts the records it missed.
Header words are listed below. x86-64 stores are not reordered with stores, so the sequence is enough.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from typing import NamedTuple

MAGIC = 0x314D53495250_4C  # "LPRISM1"
SLOT_WORDS = 48
SLOT_BYTES = SLOT_WORDS * 8
HEADER_BYTES = 4096

# Header word indices (int64 each).
H_MAGIC, H_SLOTS, H_HEAD, H_WAITING, H_LEASE_NS, H_STATE = range(6)
H_ERRORS, H_DROPPED, H_PID, H_NONCE, H_COST_NS, H_COST_STEPS = range(6, 12)
H_MISSING, H_CRITICAL_NS, H_DEEP_UNTIL_NS, H_DEEP_ARMED, H_COMMAND, H_LATE = range(12, 18)
MESSAGE_OFFSET, MESSAGE_BYTES = 1024, 2048
"""H_WAITING: reader asks to be woken. H_LEASE_NS: CLOCK_MONOTONIC time after which the probe removes
itself. H_STATE: see STATE_*. H_ERRORS: exceptions swallowed in the probe. H_DROPPED: iterations caught
half-way by attach. H_MISSING: bit set of fields the probe could not read. H_COST_NS / H_COST_STEPS: the
probe's own time, all of it and the part while the engine does not wait (H_CRITICAL_NS). H_DEEP_UNTIL_NS:
the watcher asks for spans of the pack's deep functions until then; H_DEEP_ARMED: how many are wrapped.
H_COMMAND: COMMAND_DETACH asks the probe to remove itself at its next call. At MESSAGE_OFFSET the probe
leaves a UTF-8 text (zero-terminated): why it failed, or what it could not read."""

COMMAND_NONE, COMMAND_DETACH = 0, 1

STATE_EMPTY, STATE_LIVE, STATE_DETACHED, STATE_EXPIRED, STATE_FAILED = range(5)

# Kinds of record (word 1).
KIND_STEP, KIND_WORKER, KIND_SPAN, KIND_REQUEST = 1, 2, 3, 4

# Payload of KIND_STEP: these Step columns in this order, from word 2 on. kv_usage is parts per million.
STEP_WIRE: tuple[str, ...] = (
    "step", "start_ns", "end_ns",
    "requests", "prefill_requests", "decode_requests",
    "prefill_tokens", "decode_tokens", "cached_tokens", "context_tokens", "attention_work",
    "draft_tokens", "accepted_tokens", "preempted", "running", "waiting", "kv_usage",
    "schedule_ns", "execute_ns", "sample_ns", "update_ns", "gap_ns", "gc_ns",
    "output_tokens", "prompt_tokens_done", "finished", "scheduled_at_ns", "self_ns", "self_critical_ns",
)  # fmt: skip
# self_ns: the probe's own time in the step before, all of it and the part while the engine does not wait.
# Payload of KIND_WORKER: one model execution seen inside a worker process.
WORKER_WIRE: tuple[str, ...] = (
    "rank", "start_ns", "end_ns", "sample_start_ns", "sample_end_ns", "tokens", "gc_ns", "self_ns",
)  # fmt: skip
# Payload of KIND_SPAN: one call of a wrapped function, `name` an index into the names given at arming.
SPAN_WIRE: tuple[str, ...] = ("name", "start_ns", "end_ns", "thread")

MAX_PAYLOAD_WORDS = SLOT_WORDS - 2
assert len(STEP_WIRE) <= MAX_PAYLOAD_WORDS

_SLOT = struct.Struct(f"<{SLOT_WORDS}q")
_WORD = struct.Struct("<q")


class RingRecord(NamedTuple):
    kind: int
    words: tuple[int, ...]
    """The payload: ``MAX_PAYLOAD_WORDS`` integers; only the first ones the kind defines mean anything."""


class RingError(Exception):
    """The mapped file is not a ring of this version."""


def create_ring(path: str, slots: int, nonce: int) -> None:
    """Make a zeroed ring file of ``slots`` slots (a power of two), 0600, never following a link."""
    if slots & (slots - 1) or slots < 2:
        raise ValueError("slots must be a power of two")
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, HEADER_BYTES + slots * SLOT_BYTES)
        header = bytearray(HEADER_BYTES)
        for index, value in ((H_MAGIC, MAGIC), (H_SLOTS, slots), (H_NONCE, nonce)):
            _WORD.pack_into(header, index * 8, value)
        os.pwrite(fd, header, 0)
    finally:
        os.close(fd)


class RingReader:
    """Reads a ring without ever blocking its writer. ``lost`` counts records overwritten before they
    were read; ``torn`` of those were caught while being overwritten."""

    def __init__(self, path: str) -> None:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            self._map = mmap.mmap(fd, 0)
        finally:
            os.close(fd)
        if len(self._map) < HEADER_BYTES or self.header(H_MAGIC) != MAGIC:
            self._map.close()
            raise RingError(f"{path} is not a probe ring of this version")
        self._slots = self.header(H_SLOTS)
        if self._slots < 2 or len(self._map) < HEADER_BYTES + self._slots * SLOT_BYTES:
            self._map.close()
            raise RingError(f"{path} is shorter than its header says")
        self.next = 0
        self.lost = 0
        self.torn = 0

    def header(self, index: int) -> int:
        value: int = _WORD.unpack_from(self._map, index * 8)[0]
        return value

    def set_header(self, index: int, value: int) -> None:
        _WORD.pack_into(self._map, index * 8, value)

    def message(self) -> str:
        """What the probe left to say; control characters are dropped, since the target wrote them."""
        raw = bytes(self._map[MESSAGE_OFFSET : MESSAGE_OFFSET + MESSAGE_BYTES]).split(b"\0", 1)[0]
        return "".join(c for c in raw.decode("utf-8", "replace") if c.isprintable())

    def pending(self) -> int:
        """Records written and not yet read (or lost)."""
        return self.header(H_HEAD) - self.next

    def read(self) -> Iterator[RingRecord]:
        """All whole records since the last call, in order."""
        head = self.header(H_HEAD)
        if head - self.next > self._slots:
            self.lost += head - self._slots - self.next
            self.next = head - self._slots
        while self.next < head:
            index = self.next
            offset = HEADER_BYTES + (index % self._slots) * SLOT_BYTES
            words = _SLOT.unpack_from(self._map, offset)
            self.next = index + 1
            # The copy is good only if the sequence is right both in the copy and still right after it.
            if words[0] != 2 * index + 2 or _WORD.unpack_from(self._map, offset)[0] != words[0]:
                self.lost += 1
                self.torn += 1
                continue
            yield RingRecord(words[1], words[2:])

    def close(self) -> None:
        self._map.close()
