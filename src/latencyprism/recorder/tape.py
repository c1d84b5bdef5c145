"""The flight recorder's tape: the last minute of records in a file in shared memory, so that it outlives a
watcher that is killed.

The file: a header page with ``meta`` in two slots written in turn, then one ring of segments for each kind of
record, so that a flood of one pushes out nothing of the others. A segment holds its sequence (0: not in use),
how many bytes of it are used, and frames: length, kind, CRC-32, payload. ``used`` is raised after a frame is
in place, so that whatever the moment of a SIGKILL all before it is whole. Words (tracks, names, units) are
told once a segment, before the first row that points at them: a segment can be read by itself. Kinds and
payloads: ``FrameKind``. Reading: ``recorder.tape_reading``.
"""

from __future__ import annotations

import enum
import fcntl
import json
import mmap
import os
import secrets
import struct
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latencyprism.errors import PrismError
from latencyprism.recorder.judgements import alert_to_dict
from latencyprism.records import (
    NULL,
    PHASES,
    REQUEST_COLUMNS,
    STEP_COLUMNS,
    Alert,
    Counter,
    Request,
    Span,
    Step,
)  # fmt: skip
from latencyprism.records.request import PLACES, place_of

MAGIC = b"LPTAPE\x00\x01"
FORMAT = 1
HEADER_BYTES, META_AT, META_BYTES = 1 << 17, 4096, 60 << 10
SEGMENT_BYTES = 1 << 16
SEGMENT_HEAD = 64
HEAD = struct.Struct("<8sIIII")
"""Magic, format, bytes of a segment, how many rings; then the segments of each ring, u32."""
META_HEAD = struct.Struct("<QII")
"""Of a meta slot: sequence, length, CRC-32."""
FRAME = struct.Struct("<IHHI")
SPAN = struct.Struct("<IIqqq")
COUNTER = struct.Struct("<IIIqd")
STEP = struct.Struct(f"<16s{''.join('d' if name == 'kv_usage' else 'q' for name in STEP_COLUMNS[1:])}d")
"""The columns of a Step as packed everywhere, then expected ms (NaN: not known)."""
REQUEST = struct.Struct(f"<16s{len(REQUEST_COLUMNS) - 1}q")
_NATIVE = struct.Struct("@QQ")
_USED = struct.Struct("@Q")

SIZES = (24 << 20, 6 << 20)
"""Bytes of a tape; the second where there is no room for the first."""
_SHARES = (8, 5, 3, 1, 7)
_NOT_A_NUMBER = float("nan")
_KV = STEP_COLUMNS.index("kv_usage")
_PHASE = STEP_COLUMNS.index("phase")
_REQUEST_WORDS = [(REQUEST_COLUMNS.index(name), words) for name, words in PLACES.items()]


class Lane(enum.IntEnum):
    """The rings of a tape, in order."""

    STEPS = 0
    SPANS = 1
    COUNTERS = 2
    REQUESTS = 3
    """And alerts."""
    WAITS = 4


class FrameKind(enum.IntEnum):
    """Payloads: WORD and ALERT are JSON, WAITS rows as the kernel program wrote them, SPAN the struct of that
    name (places of track and name, start, end, step) and its details as JSON, the others the structs of
    theirs."""

    WORD = 1
    STEP = 2
    SPAN = 3
    COUNTER = 4
    REQUEST = 5
    ALERT = 6
    WAITS = 7


def tape_folder() -> Path:
    """Where this user's tapes are; made if it is not there. PrismError where it cannot be used."""
    base = Path("/dev/shm")
    if not (base.is_dir() and os.access(base, os.W_OK)):
        base = Path(tempfile.gettempdir())
    folder = base / f"latencyprism-{os.geteuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        seen = folder.lstat()
    except OSError as error:
        raise PrismError(f"cannot use {folder}", error.strerror or str(error)) from None
    if folder.is_symlink() or seen.st_uid != os.geteuid() or seen.st_mode & 0o077:
        raise PrismError(
            f"cannot use {folder}", "it belongs to somebody else, or others may use it", "remove it"
        )
    return folder


class _Ring:
    """The segments of one lane."""

    def __init__(self, mapped: mmap.mmap, begin: int, segments: int) -> None:
        self._map, self._begin, self._segments = mapped, begin, segments
        self._sequence = 0
        self._at = self._end = self._head = 0
        self._words: dict[Any, int] = {}
        self.roll()

    def roll(self) -> None:
        """Go on in the oldest segment."""
        self._head = self._begin + self._sequence % self._segments * SEGMENT_BYTES
        self._sequence += 1
        self._at = self._head + SEGMENT_HEAD
        self._end = self._head + SEGMENT_BYTES
        self._words.clear()
        _NATIVE.pack_into(self._map, self._head, 0, 0)
        _NATIVE.pack_into(self._map, self._head, self._sequence, 0)

    def room(self, size: int) -> None:
        """Afterwards ``size`` bytes of frames fit."""
        if self._at + size > self._end:
            self.roll()

    def put(self, kind: FrameKind, payload: bytes) -> None:
        """``room`` for it must have been made."""
        frame = FRAME.pack(len(payload), kind, 0, zlib.crc32(payload)) + payload
        at = self._at
        self._at = end = at + len(frame)
        self._map[at:end] = frame
        _USED.pack_into(self._map, self._head + 8, end - self._head - SEGMENT_HEAD)

    def places(self, words: tuple[Any, ...], rest: int) -> list[int] | None:
        """The places of ``words`` in the segment that also has room for ``rest`` bytes more; None where they
        and these are too large for any segment."""
        known = self._words
        try:
            if self._at + rest <= self._end:
                return [known[word] for word in words]  # so it is nearly always
        except KeyError:
            pass
        if rest + sum(len(str(word)) * 8 + 64 for word in words) > SEGMENT_BYTES - SEGMENT_HEAD:
            return None
        told = {word: json.dumps(word).encode() for word in words if word not in known}
        size = sum(FRAME.size + len(text) for text in told.values()) + rest
        if self._at + size > self._end:
            self.roll()
            told = {word: json.dumps(word).encode() for word in words}
        for word, text in told.items():
            known[word] = len(known)
            self.put(FrameKind.WORD, text)
        return [known[word] for word in words]


class Tape:
    """Appends records to a new file in ``folder``; each ``add_*`` costs some microseconds.

    PrismError where the file cannot be made. A record too large for a segment, or with a number that does not
    fit, is counted in ``refused``. ``close`` removes the file: it is for those who did not come to that.
    """

    def __init__(self, folder: Path, name: str, sizes: tuple[int, ...] = SIZES) -> None:
        self.path = folder / f"{name}-{secrets.token_hex(4)}.tape"
        self.refused = 0
        self._meta_sequence = 0
        self._fd = -1
        problem: OSError | None = None
        for size in sizes:
            try:
                self._open(size)
                return
            except OSError as error:
                problem = error
                self._remove()
        why = (problem.strerror or str(problem)) if problem else "no size was named"
        raise PrismError(f"cannot keep a tape in {folder}", why, "free space there; captures are as ever")

    def _open(self, size: int) -> None:
        segments = [max(2, size * share // sum(_SHARES) // SEGMENT_BYTES) for share in _SHARES]
        self.size = HEADER_BYTES + sum(segments) * SEGMENT_BYTES
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self._fd = os.open(self.path, flags, 0o600)
        # All of it now: a store to a page that the filesystem cannot give later would be a SIGBUS.
        os.posix_fallocate(self._fd, 0, self.size)
        # Dropped by the kernel when the last process that has it ends: that is how a dead tape is known.
        fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._map = mmap.mmap(self._fd, self.size)
        # A copy of this process that writes a capture would keep the lock by its mapping after our death.
        self._map.madvise(mmap.MADV_DONTFORK)
        begin = HEADER_BYTES
        self._rings = []
        for count in segments:
            self._rings.append(_Ring(self._map, begin, count))
            begin += count * SEGMENT_BYTES
        struct.pack_into(f"<{len(segments)}I", self._map, HEAD.size, *segments)
        HEAD.pack_into(self._map, 0, MAGIC, FORMAT, SEGMENT_BYTES, len(segments), 0)

    def write_meta(self, meta: Mapping[str, Any]) -> None:
        """Replace ``meta``; one that is too large is left as it was."""
        text = json.dumps(meta, separators=(",", ":"), default=str).encode()
        if len(text) > META_BYTES - META_HEAD.size:
            self.refused += 1
            return
        self._meta_sequence += 1
        at = META_AT + self._meta_sequence % 2 * META_BYTES
        META_HEAD.pack_into(self._map, at, 0, 0, 0)
        self._map[at + META_HEAD.size : at + META_HEAD.size + len(text)] = text
        META_HEAD.pack_into(self._map, at, self._meta_sequence, len(text), zlib.crc32(text))

    # -- records -----------------------------------------------------------------------------------

    def add_step(self, step: Step, expected_ms: float | None = None) -> None:
        values: list[Any] = [NULL if value is None else value for value in step]
        values[0] = step.engine.encode("ascii", "replace")
        values[_PHASE] = NULL if step.phase is None else PHASES.index(step.phase)
        values[_KV] = _NOT_A_NUMBER if step.kv_usage is None else step.kv_usage
        self._row(
            Lane.STEPS, FrameKind.STEP, STEP, [*values, _NOT_A_NUMBER if expected_ms is None else expected_ms]
        )

    def add_request(self, request: Request) -> None:
        values: list[Any] = [NULL if value is None else value for value in request]
        values[0] = request.engine.encode("ascii", "replace")
        for column, words in _REQUEST_WORDS:
            values[column] = place_of(words, request[column])
        self._row(Lane.REQUESTS, FrameKind.REQUEST, REQUEST, values)

    def _row(self, lane: Lane, kind: FrameKind, layout: struct.Struct, values: list[Any]) -> None:
        try:
            payload = layout.pack(*values)
        except (struct.error, OverflowError):
            self.refused += 1
            return
        ring = self._rings[lane]
        ring.room(FRAME.size + len(payload))
        ring.put(kind, payload)

    def add_span(self, span: Span) -> None:
        details = json.dumps(span.details).encode() if span.details else b""
        self._pointing(
            Lane.SPANS, FrameKind.SPAN, SPAN, (span.track, span.name),
            (span.start_ns, span.end_ns, NULL if span.step is None else span.step), details,
        )  # fmt: skip

    def add_counter(self, counter: Counter) -> None:
        words = (counter.track, counter.name, counter.unit)
        self._pointing(
            Lane.COUNTERS, FrameKind.COUNTER, COUNTER, words, (counter.time_ns, counter.value), b""
        )

    def _pointing(
        self, lane: Lane, kind: FrameKind, layout: struct.Struct, words: tuple[Any, ...],
        numbers: tuple[Any, ...], details: bytes,
    ) -> None:  # fmt: skip
        size = FRAME.size + layout.size + len(details)
        ring = self._rings[lane]
        places = ring.places(words, size)
        if places is None:
            self.refused += 1
            return
        try:
            ring.put(kind, layout.pack(*places, *numbers) + details)
        except (struct.error, OverflowError):
            self.refused += 1

    def add_alert(self, alert: Alert, onset_ns: int, raised_ns: int) -> None:
        """``onset_ns``, ``raised_ns``: CLOCK_MONOTONIC."""
        told = {"alert": alert_to_dict(alert), "onset_ns": onset_ns, "raised_ns": raised_ns}
        self._blob(Lane.REQUESTS, FrameKind.ALERT, json.dumps(told).encode())

    def add_waits(self, rows: memoryview, row_bytes: int) -> None:
        """Rows of fixed size as they came from the kernel."""
        most = (SEGMENT_BYTES - SEGMENT_HEAD - FRAME.size) // row_bytes // 4 * row_bytes
        for begin in range(0, len(rows), most):
            self._blob(Lane.WAITS, FrameKind.WAITS, bytes(rows[begin : begin + most]))

    def _blob(self, lane: Lane, kind: FrameKind, payload: bytes) -> None:
        if FRAME.size + len(payload) > SEGMENT_BYTES - SEGMENT_HEAD:
            self.refused += 1
            return
        self._rings[lane].room(FRAME.size + len(payload))
        self._rings[lane].put(kind, payload)

    # -- end ---------------------------------------------------------------------------------------

    def close(self) -> None:
        """Nothing is to be recovered: the file goes."""
        if self._fd >= 0:
            self._map.close()
        self._remove()

    def _remove(self) -> None:
        if self._fd >= 0:
            self.path.unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = -1
