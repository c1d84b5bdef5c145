"""The shared-memory rings between a probe in a target and the watcher: layout and reader.

One file holds ``rings`` rings, one for each thread that writes: no two threads share a slot or a head, so the
writer needs no lock and never waits. Every slot is ``SLOT_WORDS`` native int64; word 0 is the slot's
sequence: 2*i+1 while record i is being written, 2*i+2 when it is whole. A reader that falls behind finds a
later sequence than it expects and counts the records it missed.

**Memory order.** Each word is written and read by one aligned 8-byte move, so a word is never half. Order
between words: x86-64 keeps stores in order and loads in order, so there a right sequence before and after the
copy means a right record. aarch64 promises neither, and pure Python has no barrier instruction. A ring made
``checked`` (always on anything but x86-64) therefore ends each record in a check word, a sum over sequence,
kind and payload: what became visible in any other order does not add up, is not taken, and is looked at
again; after ``CHECK_TRIES`` looks it counts as lost. So a record that was taken is whole on every
architecture, up to two stale words whose errors cancel. On top of that a checked writer releases and takes a
lock between payload and head (a store-release, then a load-acquire, on CPython's semaphores and mutexes),
which on aarch64 orders them; that is how CPython is built, not what Python promises, and so only makes second
looks rare.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from typing import NamedTuple

from latencyprism.records.step import NULL

MAGIC = 0x324D53495250_4C  # "LPRISM2"
SLOT_WORDS = 48
SLOT_BYTES = SLOT_WORDS * 8
HEADER_BYTES = 4096

# Header word indices (int64 each).
H_MAGIC, H_SLOTS, H_RINGS, H_WAITING, H_LEASE_NS, H_STATE = range(6)
H_ERRORS, H_DROPPED, H_PID, H_NONCE, H_COST_NS, H_COST_STEPS = range(6, 12)
H_MISSING, H_CRITICAL_NS, H_DEEP_UNTIL_NS, H_DEEP_ARMED, H_COMMAND, H_LATE = range(12, 18)
H_CHECKED, H_UNRINGED, H_NESTED, H_READINGS_OFF, H_BUDGET_PPM, H_SHARE_PPM = range(18, 24)
H_KNOB_ORDER, H_KNOB_UNTIL_NS, H_KNOB_TOKENS, H_KNOB_SEQUENCES, H_KNOB_DONE = range(24, 29)
H_KNOB_TOKENS_NOW, H_KNOB_TOKENS_WAS, H_KNOB_SEQUENCES_NOW, H_KNOB_SEQUENCES_WAS = range(29, 33)
H_WAKE_BASE_NS, H_WAKE_DECODE_NS, H_WAKE_PREFILL_NS, H_WAKE_GAP_NS = range(33, 37)
H_KNOB_ROOM, H_KNOB_PROMPT_NOW, H_KNOB_PROMPT_WAS = range(37, 40)
H_WAKE_TYPICAL, H_WAKE_SPARE_NS, H_WAKE_LATE_NS = range(40, 43)
H_HEADS, H_THREADS, MAX_RINGS = 64, 80, 16
MESSAGE_OFFSET, MESSAGE_BYTES = 1024, 2048
NAMES_OFFSET, NAMES_BYTES = 3072, 1024
"""H_WAITING: reader asks to be woken, see WAKE_*. H_LEASE_NS: CLOCK_MONOTONIC time after which the probe
removes itself. H_STATE: see STATE_*. H_ERRORS: exceptions swallowed in the probe. H_DROPPED: iterations
caught half-way by attach. H_MISSING: bit set of fields the probe could not read. H_COST_NS / H_COST_STEPS:
the probe's own time, all of it and the part while the engine does not wait (H_CRITICAL_NS). H_DEEP_UNTIL_NS:
the watcher asks for spans of the pack's deep functions until then; H_DEEP_ARMED: how many are wrapped.
H_COMMAND: COMMAND_DETACH asks the probe to remove itself at its next call. At MESSAGE_OFFSET the probe
leaves a UTF-8 text (zero-terminated): why it failed, or what it could not read.
H_HEADS, H_THREADS: from there on one word for each ring: records written, and the kernel's id of the thread
that writes them (0: none yet). H_SLOTS are the slots of each. H_UNRINGED: records of threads for which no
ring was left; H_NESTED: records that would have been written while the same thread was writing one (from a
signal handler). H_BUDGET_PPM: what the probe may cost, parts per million of the step time; H_SHARE_PPM: what
it did, last window. H_READINGS_OFF: bit set of the optional readings it dropped; their names, one a line in
order of the bits, at NAMES_OFFSET. The first watcher of an attach sets the budget; what was dropped stays so
until the next attach.
H_KNOB_ORDER: number of the watcher's order to the engine's knobs, 0: none, also set by the probe when it has
ended; it holds until H_KNOB_UNTIL_NS; H_KNOB_DONE: the last one carried out, negative: it was refused; the
knobs as asked for (0: leave), as they are now, as they were. H_KNOB_ROOM: prompt tokens of a step that long
prompts leave to others (0: none), by a limit for each of them (H_KNOB_PROMPT_NOW, 0: no limit)."""

COMMAND_NONE, COMMAND_DETACH = 0, 1

WAKE_NOT, WAKE_EACH, WAKE_LONG = range(3)
"""WAKE_EACH: at the next record. WAKE_LONG: only at a step that lasted longer than H_WAKE_BASE_NS, plus
H_WAKE_DECODE_NS for each of its decode tokens and H_WAKE_PREFILL_NS for each of its prefill tokens, or that
began more than H_WAKE_GAP_NS after the one before; or once steps have been late by more than H_WAKE_SPARE_NS
(0: however late) together: each by what it lasted beyond H_WAKE_TYPICAL 1024ths of what makes it long, less
where it was shorter, never below none. H_WAKE_LATE_NS: that sum, since the reader set it to 0."""

STATE_EMPTY, STATE_LIVE, STATE_DETACHED, STATE_EXPIRED, STATE_FAILED, STATE_OVER_BUDGET = range(6)

# Kinds of record (word 1).
KIND_STEP, KIND_WORKER, KIND_SPAN, KIND_REQUEST, KIND_DECODE = 1, 2, 3, 4, 5

# Payload of KIND_STEP: these Step columns in this order, from word 2 on. kv_usage is parts per million.
STEP_WIRE: tuple[str, ...] = (
    "step", "start_ns", "end_ns",
    "requests", "prefill_requests", "decode_requests",
    "prefill_tokens", "decode_tokens", "cached_tokens", "context_tokens", "attention_work",
    "draft_tokens", "accepted_tokens", "preempted", "running", "waiting", "kv_usage",
    "schedule_ns", "execute_ns", "sample_ns", "update_ns", "gap_ns", "gc_ns",
    "output_tokens", "prompt_tokens_done", "finished", "scheduled_at_ns", "self_ns", "self_critical_ns",
)  # fmt: skip
STEP_WIRE_WORDS = len(STEP_WIRE)
STEP_PREFILL, STEP_DECODE, STEP_GAP = map(STEP_WIRE.index, ("prefill_tokens", "decode_tokens", "gap_ns"))
# self_ns: the probe's own time since the record before was made, all of it and the part while the engine does
# not wait.
# Payload of KIND_DECODE: what is not known beforehand of a step in which each request gets one token.
DECODE_WIRE: tuple[str, ...] = (
    "step", "start_ns", "end_ns", "requests", "context_tokens", "running", "waiting", "kv_usage",
    "scheduled_at_ns", "update_start_ns", "gap_ns", "gc_ns", "output_tokens", "self_ns", "self_critical_ns",
)  # fmt: skip
DECODE_WIRE_WORDS = len(DECODE_WIRE)
DECODE_REQUESTS, DECODE_GAP = map(DECODE_WIRE.index, ("requests", "gap_ns"))
# Payload of KIND_WORKER: one model execution seen inside a worker process.
WORKER_WIRE: tuple[str, ...] = (
    "rank", "start_ns", "end_ns", "sample_start_ns", "sample_end_ns", "tokens", "gc_ns", "self_ns",
)  # fmt: skip
WORKER_WIRE_WORDS = len(WORKER_WIRE)
# Payload of KIND_SPAN: one call of a wrapped function, `name` an index into the names given at arming.
SPAN_WIRE: tuple[str, ...] = ("name", "start_ns", "end_ns", "thread")

MAX_PAYLOAD_WORDS = SLOT_WORDS - 3  # sequence, kind, check
CHECK_MASK = 2**62 - 1
CHECK_TRIES = 3

# Payload of KIND_REQUEST: how many events, then that many events of REQUEST_EVENT_WORDS words each: which
# event, the request's hashed id, and four values (NULL where unknown or unused). Only changes are told: a
# request that has had REQUEST_TOKENS gets its tokens at the end of every step from there until it is paused
# or ended.
REQUEST_EVENT_WORDS = 6
REQUEST_EVENTS_PER_RECORD = (MAX_PAYLOAD_WORDS - 1) // REQUEST_EVENT_WORDS
# ADDED: arrival_ns, seen by the engine loop at (ns), prompt tokens, tokens it had before the probe came
# SCHEDULED for the first time: step, cached tokens, 1 where it gets tokens from this step on, route (place in
# ROUTES)
# TOKENS: from this step on        PAUSED: from this step on, 1 where it was preempted
# ENDED: last step, seen at (ns), output tokens, reason (index into FINISH_REASONS)
# UNEVEN: requests take turns; which steps carried which is not told any more (no request)
# RECEIVED by the API process: arrival_ns, hash of the id its client knows, seen at (ns), its route
# DELIVERED by the API process (no request): start_ns, end_ns, the step's time stamp (ns), outputs
(
    REQUEST_ADDED, REQUEST_SCHEDULED, REQUEST_TOKENS, REQUEST_PAUSED, REQUEST_ENDED,
    REQUEST_UNEVEN, REQUEST_RECEIVED, REQUEST_DELIVERED,
) = range(1, 9)  # fmt: skip
assert len(STEP_WIRE) <= MAX_PAYLOAD_WORDS

_SLOT = struct.Struct(f"@{SLOT_WORDS}q")
_WORD = struct.Struct("@q")
_HEADS = struct.Struct(f"@{MAX_RINGS}q")


class RingRecord(NamedTuple):
    kind: int
    words: tuple[int, ...]
    """The payload: ``MAX_PAYLOAD_WORDS`` integers; only the first ones the kind defines mean anything."""
    ring: int = 0
    """Which ring, that is which thread, it came from."""


class RingError(Exception):
    """The mapped file is not a ring of this version."""


def create_ring(path: str, slots: int, nonce: int, *, rings: int = 1, checked: bool = False) -> None:
    """Make a zeroed file of ``rings`` rings of ``slots`` slots each (a power of two), 0600, never following a
    link.

    The header and the first ring are allocated here (OSError where there is no room); the others by the
    thread that takes one: a store to a page that a full filesystem cannot give would be a SIGBUS."""
    if slots & (slots - 1) or slots < 2:
        raise ValueError("slots must be a power of two")
    if not 1 <= rings <= MAX_RINGS:
        raise ValueError(f"rings must be 1 to {MAX_RINGS}")
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, HEADER_BYTES + rings * slots * SLOT_BYTES)
        os.posix_fallocate(fd, 0, HEADER_BYTES + slots * SLOT_BYTES)
        header = bytearray(HEADER_BYTES)
        values = (
            (H_MAGIC, MAGIC),
            (H_SLOTS, slots),
            (H_RINGS, rings),
            (H_NONCE, nonce),
            (H_CHECKED, int(checked)),
        )
        for index, value in values:
            _WORD.pack_into(header, index * 8, value)
        os.pwrite(fd, header, 0)
    finally:
        os.close(fd)


class RingReader:
    """Reads rings without ever blocking their writers. ``lost`` counts records overwritten before they were
    read, and those that never added up; ``torn`` of those were caught while being overwritten, or did not add
    up."""

    def __init__(self, path: str) -> None:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            self._map = mmap.mmap(fd, 0)
        finally:
            os.close(fd)
        if len(self._map) < HEADER_BYTES or self.header(H_MAGIC) != MAGIC:
            self._map.close()
            raise RingError(f"{path} is not a probe ring of this version")
        self._slots, self._rings = self.header(H_SLOTS), self.header(H_RINGS)
        if (
            self._slots < 2
            or not 1 <= self._rings <= MAX_RINGS
            or len(self._map) < (HEADER_BYTES + self._rings * self._slots * SLOT_BYTES)
        ):
            self._map.close()
            raise RingError(f"{path} is shorter than its header says")
        self._checked = bool(self.header(H_CHECKED))
        self._next = [0] * self._rings
        self._tries = [0] * self._rings
        self.lost = 0
        self.torn = 0

    def header(self, index: int) -> int:
        value: int = _WORD.unpack_from(self._map, index * 8)[0]
        return value

    def set_header(self, index: int, value: int) -> None:
        # The whole word at once: `pack_into` writes zeros first, and a lease of zero is over.
        self._map[index * 8 : index * 8 + 8] = _WORD.pack(value)

    def message(self) -> str:
        """What the probe left to say; control characters are dropped, since the target wrote them."""
        return self._text(MESSAGE_OFFSET, MESSAGE_BYTES)

    def readings_off(self) -> list[str]:
        """Names of the optional readings that the probe dropped to stay within its budget."""
        mask = self.header(H_READINGS_OFF)
        raw = bytes(self._map[NAMES_OFFSET : NAMES_OFFSET + NAMES_BYTES]).split(b"\0", 1)[0].split(b"\n")
        return [_printable(name) for bit, name in enumerate(raw) if mask >> bit & 1]

    def _text(self, offset: int, size: int) -> str:
        return _printable(bytes(self._map[offset : offset + size]).split(b"\0", 1)[0])

    def records(self) -> int:
        """Records written so far, all rings together."""
        return sum(self._heads())

    def _heads(self) -> tuple[int, ...]:
        return _HEADS.unpack_from(self._map, H_HEADS * 8)[: self._rings]

    def pending(self) -> int:
        """Records written and not yet read (or lost)."""
        return self.records() - sum(self._next)

    def read(self) -> Iterator[RingRecord]:
        """All whole records since the last call: one ring after the other, each ring in order."""
        for ring, head in enumerate(self._heads()):
            if head != self._next[ring]:
                yield from self._read_ring(ring, head)

    def _read_ring(self, ring: int, head: int) -> Iterator[RingRecord]:
        if head - self._next[ring] > self._slots:
            self.lost += head - self._slots - self._next[ring]
            self._next[ring] = head - self._slots
        base = HEADER_BYTES + ring * self._slots * SLOT_BYTES
        while self._next[ring] < head:
            index = self._next[ring]
            offset = base + (index % self._slots) * SLOT_BYTES
            words = _SLOT.unpack_from(self._map, offset)
            # The copy is good only if the sequence is right both in the copy and still right after it.
            whole = words[0] == 2 * index + 2 and _WORD.unpack_from(self._map, offset)[0] == words[0]
            if whole and self._checked:
                whole = words[-1] == check_word(words[0], words[1], words[2:-1])
            if not whole and self._checked and words[0] <= 2 * index + 2 and self._tries[ring] < CHECK_TRIES:
                self._tries[ring] += 1
                return  # not all of it has become visible: once more, next time
            self._next[ring] = index + 1
            self._tries[ring] = 0
            if whole:
                yield RingRecord(words[1], words[2:-1], ring)
            else:
                self.lost += 1
                self.torn += 1

    def close(self) -> None:
        self._map.close()


def widened(words: tuple[int, ...]) -> tuple[int, ...]:
    """A KIND_DECODE payload as one of KIND_STEP."""
    (
        step, start, end, requests, context, running, waiting, usage, scheduled_at, update_start, gap, gc_ns,
        outputs, own, critical,
    ) = words[:DECODE_WIRE_WORDS]  # fmt: skip
    return (
        step, start, end, requests, 0, requests, 0, requests, 0, context, 0, 0, NULL, 0, running, waiting,
        usage, scheduled_at - start, update_start - scheduled_at, NULL, end - update_start, gap, gc_ns,
        outputs, NULL, 0, scheduled_at, own, critical,
    )  # fmt: skip


def check_word(sequence: int, kind: int, payload: tuple[int, ...]) -> int:
    """What the last word of a slot must be in a checked ring; the writer has the same rule over the whole
    slot."""
    return (sequence + kind + sum(payload)) & CHECK_MASK


def _printable(raw: bytes) -> str:
    return "".join(c for c in raw.decode("utf-8", "replace") if c.isprintable())
