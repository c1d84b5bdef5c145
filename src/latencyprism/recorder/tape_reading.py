"""Reading a tape: of a watcher that runs, which goes on writing meanwhile, or of one that was killed."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import stat
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from latencyprism.errors import BadInput
from latencyprism.recorder import tape as tapes
from latencyprism.recorder.capture import Capture
from latencyprism.recorder.judgements import alert_from_dict
from latencyprism.recorder.tape import FrameKind, Lane
from latencyprism.records import NULL, Alert, Counter, Request, Span, Step
from latencyprism.records.request import row_to_request
from latencyprism.records.step import row_to_step

_NULL = NULL.to_bytes(8, "little", signed=True)

HORIZON_NS = 60_000_000_000
_NAME = re.compile(r"(?P<engine>[\w.-]{1,40})-(?P<pid>\d{1,7})-(?P<start>\d{1,20})-[0-9a-f]{8}\.tape")
_MOST_BYTES = 256 << 20


@dataclass(slots=True)
class Taped:
    """What a tape holds, oldest first. ``waits``: rows as they came from the kernel; ``alerts`` with their
    onset and when they were raised (CLOCK_MONOTONIC); ``notices``: what was left out, in words."""

    meta: dict[str, Any] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    expected_ms: list[float | None] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    counters: list[Counter] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    alerts: list[tuple[Alert, int, int]] = field(default_factory=list)
    waits: list[bytes] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def capture(self) -> Capture:
        """Without the waits."""
        alerts = [alert for alert, _, _ in self.alerts]
        meta = dict(self.meta)
        if self.alerts:
            _, meta["onset_ns"], meta["alert_ns"] = self.alerts[-1]
        return Capture(
            meta=meta, steps=self.steps, spans=self.spans, counters=self.counters, requests=self.requests,
            alerts=alerts, expected_ms=self.expected_ms, notices=list(self.notices),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class TapeFile:
    """``engine``, ``pid``, ``start``: the process that was watched and when it began, in ticks."""

    path: Path
    engine: str
    pid: int
    start: int

    @property
    def live(self) -> bool:
        """Whether its watcher still runs."""
        held = HeldTape.take(self.path)
        if held is None:
            return self.path.exists()
        held.close()
        return False

    @property
    def engine_runs(self) -> bool:
        try:
            text = Path(f"/proc/{self.pid}/stat").read_text()
        except OSError:
            return False
        return text.rpartition(")")[2].split()[19:20] == [str(self.start)]


class HeldTape:
    """A dead tape that nobody else may take until ``close``."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path, self._fd = path, descriptor

    @staticmethod
    def take(path: Path) -> HeldTape | None:
        """None if its watcher runs, or somebody else has it, or it is gone."""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_nlink:
                return HeldTape(path, descriptor)
        except OSError:
            pass  # held: its watcher lives
        os.close(descriptor)
        return None

    def close(self, *, remove: bool = False) -> None:
        if remove:
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)
        os.close(self._fd)


def tapes_in(folder: Path) -> list[TapeFile]:
    """Those of this user, newest first; what is no ordinary file of ours is passed over."""
    found = []
    for path in folder.glob("*.tape"):
        told = _NAME.fullmatch(path.name)
        try:
            seen = path.lstat()
        except OSError:
            continue
        if told and stat.S_ISREG(seen.st_mode) and seen.st_uid == os.geteuid():
            file = TapeFile(path, told["engine"], int(told["pid"]), int(told["start"]))
            found.append((seen.st_mtime, file))
    return [file for _, file in sorted(found, key=lambda pair: -pair[0])]


def read_tape(path: Path, horizon_ns: int = HORIZON_NS) -> Taped:
    """The last ``horizon_ns`` before the newest record. BadInput if it is no tape, or of a later format."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(descriptor, "rb", buffering=0) as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise BadInput(f"cannot read the tape {path}", "it is not a regular file")
            segments = _header(file.read(tapes.HEADER_BYTES), path)
            taped = Taped(meta=_meta(os.pread(descriptor, tapes.HEADER_BYTES, 0)))
            _read_rings(descriptor, segments, taped)
    except OSError as error:
        raise BadInput(f"cannot read the tape {path}", error.strerror or str(error)) from None
    _cut(taped, horizon_ns)
    return taped


def _header(data: bytes, path: Path) -> list[int]:
    what = f"cannot read the tape {path}"
    if len(data) < tapes.HEADER_BYTES or data[:6] != tapes.MAGIC[:6]:
        raise BadInput(what, "it is no tape of a watch, or none that was begun")
    _, written, segment_bytes, rings, _ = tapes.HEAD.unpack_from(data)
    if written > tapes.FORMAT:
        why = f"it has format {written} and this version reads up to {tapes.FORMAT}"
        raise BadInput(what, why, "read it with the version of latencyprism that wrote it")
    if segment_bytes != tapes.SEGMENT_BYTES or rings != len(Lane):
        raise BadInput(what, "its header is damaged")
    counts = [int.from_bytes(data[tapes.HEAD.size + 4 * i :][:4], "little") for i in range(rings)]
    if sum(counts) * segment_bytes > _MOST_BYTES:
        raise BadInput(what, "its header is damaged")
    return counts


def _meta(header: bytes) -> dict[str, Any]:
    best, found = 0, {}
    for slot in range(2):
        at = tapes.META_AT + slot * tapes.META_BYTES
        sequence, length, checksum = tapes.META_HEAD.unpack_from(header, at)
        text = header[at + tapes.META_HEAD.size :][: min(length, tapes.META_BYTES)]
        if sequence > best and zlib.crc32(text) == checksum:
            with contextlib.suppress(ValueError, RecursionError):
                told = json.loads(text)
                if isinstance(told, dict):
                    best, found = sequence, told
    return found


def _read_rings(descriptor: int, counts: list[int], taped: Taped) -> None:
    begin = tapes.HEADER_BYTES
    for count in counts:
        held = []
        for number in range(count):
            at = begin + number * tapes.SEGMENT_BYTES
            data = os.pread(descriptor, tapes.SEGMENT_BYTES, at)
            # A segment that was begun anew while it was copied is another one now.
            again = int.from_bytes(os.pread(descriptor, 8, at), "little")
            sequence = int.from_bytes(data[:8], "little")
            if sequence and sequence == again:
                held.append((sequence, data))
        for _, data in sorted(held, key=lambda pair: pair[0]):
            _read_segment(data, taped)
        begin += count * tapes.SEGMENT_BYTES


def _frames(data: bytes) -> Iterator[tuple[int, bytes]]:
    used = min(int.from_bytes(data[8:16], "little"), len(data) - tapes.SEGMENT_HEAD)
    at, end = tapes.SEGMENT_HEAD, tapes.SEGMENT_HEAD + used
    while at + tapes.FRAME.size <= end:
        length, kind, _, checksum = tapes.FRAME.unpack_from(data, at)
        at += tapes.FRAME.size
        payload = data[at : at + length]
        if at + length > end or zlib.crc32(payload) != checksum:
            raise ValueError("a record is damaged")
        yield kind, payload
        at += length


def _read_segment(data: bytes, taped: Taped) -> None:
    words: list[Any] = []
    try:
        for kind, payload in _frames(data):
            _take(kind, payload, words, taped)
    except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
        taped.notices.append(f"part of the tape is left out: {error}")


def _take(kind: int, payload: bytes, words: list[Any], taped: Taped) -> None:
    if kind == FrameKind.WORD:
        word = json.loads(payload)
        words.append(tuple(word) if isinstance(word, list) else str(word))
    elif kind == FrameKind.STEP:
        *row, expected = tapes.STEP.unpack(payload)
        row[0] = row[0].rstrip(b"\0")
        taped.steps.append(row_to_step(row))
        taped.expected_ms.append(None if expected != expected else expected)
    elif kind == FrameKind.SPAN:
        track, name, start_ns, end_ns, step = tapes.SPAN.unpack_from(payload)
        rest = payload[tapes.SPAN.size :]
        details = tuple((str(key), value) for key, value in json.loads(rest)) if rest else ()
        taped.spans.append(
            Span(words[track], words[name], start_ns, end_ns, None if step == NULL else step, details)
        )
    elif kind == FrameKind.COUNTER:
        track, name, unit, time_ns, value = tapes.COUNTER.unpack(payload)
        taped.counters.append(Counter(words[track], words[name], time_ns, value, words[unit]))
    elif kind == FrameKind.REQUEST:
        missing = tapes.REQUEST.size - len(payload)  # a tape may be older than the last columns
        taped.requests.append(row_to_request(tapes.REQUEST.unpack(payload + _NULL * (missing // len(_NULL)))))
    elif kind == FrameKind.ALERT:
        told = json.loads(payload)
        taped.alerts.append((alert_from_dict(told["alert"]), int(told["onset_ns"]), int(told["raised_ns"])))
    elif kind == FrameKind.WAITS:
        taped.waits.append(payload)


def _cut(taped: Taped, horizon_ns: int) -> None:
    """The rings hold more than the horizon where little happens."""
    ends = [step.end_ns for step in taped.steps[-1:]] + [c.time_ns for c in taped.counters[-1:]]
    ends += [raised_ns for _, _, raised_ns in taped.alerts[-1:]]
    if not ends:
        return
    oldest_ns = max(ends) - horizon_ns
    first = next((i for i, step in enumerate(taped.steps) if step.end_ns >= oldest_ns), len(taped.steps))
    taped.steps, taped.expected_ms = taped.steps[first:], taped.expected_ms[first:]
    taped.spans = [span for span in taped.spans if span.end_ns >= oldest_ns]
    taped.counters = [counter for counter in taped.counters if counter.time_ns >= oldest_ns]
    taped.alerts = [told for told in taped.alerts if told[2] >= oldest_ns]
    taped.requests = [
        request
        for request in taped.requests
        if request.arrival_ns is None or request.arrival_ns + (request.e2e_ns or horizon_ns) >= oldest_ns
    ]
