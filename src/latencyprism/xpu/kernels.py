"""Kernels of a deep dive: one short window of the framework's own profiler, started late in the target.

The profiler is not held open: it is prepared, started, stopped and read on a thread of its own within the
target, in one bounded window. Stopping it still holds the interpreter lock for a while, longer the more was
recorded, so windows are a few steps long.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files
from typing import Any, NamedTuple

from latencyprism.agent.assemble import bootstrap
from latencyprism.attach.inject import Injector, InjectReport
from latencyprism.errors import TargetRefused

LONGEST_WINDOW_S = 1.0
MOST_EVENTS = 50_000
_MOST_BYTES = 64 << 20
_LOOK_S = 0.02
_MOST = 1 << 62
"""Numbers beyond it are none of a profiler."""


class KernelEvent(NamedTuple):
    """``device_kind``: CUDA, CPU, …; ``lane``: stream; times CLOCK_MONOTONIC ns. Of a call into the runtime
    ``device_kind`` is CPU, ``device`` the process and ``lane`` the thread; it and what it launched have one
    ``correlation`` (0: none)."""

    name: str
    device_kind: str
    device: int
    lane: int
    start_ns: int
    end_ns: int
    correlation: int


@dataclass
class KernelCapture:
    """``moments``: CLOCK_MONOTONIC ns at which the target was preparing, starting, started, stopping,
    stopped, read, done. ``left_out``: events beyond the limit. ``lines``: JSON of the events as it came;
    ``offset_ns``: realtime - monotonic in the target."""

    pid: int
    framework: str
    moments: dict[str, int]
    left_out: int
    attach: InjectReport
    lines: list[bytes]
    offset_ns: int

    @property
    def window_ns(self) -> tuple[int, int] | None:
        """From when to when it recorded, CLOCK_MONOTONIC; None where one of the two was not told."""
        started_ns, stopping_ns = self.moments.get("started"), self.moments.get("stopping")
        return None if started_ns is None or stopping_ns is None else (started_ns, stopping_ns)

    @cached_property
    def events(self) -> list[KernelEvent]:
        """In order of their starts. Read when they are asked for: tens of milliseconds, which a watch leaves
        to the copy of it that writes. TargetRefused if what was told is not of the expected form."""
        try:
            rows = [row for line in self.lines for row in json.loads(line)]
            found = [_event(row, self.offset_ns) for row in rows]
        except (TypeError, ValueError, OverflowError):
            raise _malformed(self.pid) from None
        return sorted(found, key=lambda event: event.start_ns)


@dataclass(slots=True)
class _Told:
    states: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: list[bytes] = field(default_factory=list)

    def take(self, line: bytes) -> None:
        if line.startswith(b"["):
            self.rows.append(line)
            return
        value = json.loads(line)
        if isinstance(value, dict):
            self.states[str(value.get("state"))] = value

    @property
    def over(self) -> bool:
        return "done" in self.states or "failed" in self.states


def capture_kernels(
    pid: int, window_s: float, *, most_events: int = MOST_EVENTS, timeout_s: float = 30.0,
    wanted: Callable[[], bool] = lambda: True,
) -> KernelCapture:  # fmt: skip
    """Record ``window_s`` (at most ``LONGEST_WINDOW_S``) of the process's kernels and wait for the result.

    TargetRefused: no PyTorch or no accelerator there, a profiler at work already, no answer in ``timeout_s``,
    or none while ``wanted`` said that somebody waits for it. Whatever happens, the target stops recording
    when its window is over.
    """
    if not 0 < window_s <= LONGEST_WINDOW_S:
        raise ValueError(f"a window lasts up to {LONGEST_WINDOW_S} s")
    name = f"lprism-{secrets.randbits(62):016x}"
    injector = Injector(pid)
    config = {
        "out": f"/dev/shm/{name}.out",
        "window_s": window_s,
        "most_events": most_events,
        "deadline_ns": time.monotonic_ns() + int(timeout_s * 1e9),
    }
    text = files("latencyprism.xpu.inside").joinpath("kernel_capture.py").read_text(encoding="utf-8")
    with _Folder(pid) as folder:
        answer = folder.place(f"{name}.out", "")
        folder.place(f"{name}.py", f"{text}\ncapture({config!r})\n")
        report = injector.run(
            bootstrap(f"/dev/shm/{name}.py"), lambda: os.fstat(answer).st_size > 0, timeout_s=5.0
        )
        told = _listen(injector, answer, time.monotonic() + timeout_s, wanted)
    return _result(pid, told, report)


class _Folder:
    """The target's /dev/shm, held open: its files can be removed even when the target is gone."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._names: list[str] = []
        self._descriptors: list[int] = []

    def __enter__(self) -> _Folder:
        try:
            self._folder = os.open(
                f"/proc/{self._pid}/root/dev/shm", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
            )
        except OSError as error:
            raise self._refusal(error) from error
        self._descriptors.append(self._folder)
        return self

    def place(self, name: str, text: str) -> int:
        """Make a file that only the target's user can read; a descriptor on it, open until the end."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            descriptor = os.open(name, flags, 0o600, dir_fd=self._folder)
            self._names.append(name)
            self._descriptors.append(descriptor)
            os.write(descriptor, text.encode())
            if os.geteuid() == 0:
                owner = os.stat(f"/proc/{self._pid}")
                os.fchown(descriptor, owner.st_uid, owner.st_gid)
        except OSError as error:
            raise self._refusal(error) from error
        return descriptor

    def _refusal(self, error: OSError) -> TargetRefused:
        return TargetRefused(
            f"cannot capture kernels of {self._pid}",
            f"its /dev/shm cannot be written: {error.strerror}",
            "run as its user or as root",
        )

    def __exit__(self, *_: object) -> None:
        for name in self._names:
            with suppress(OSError):
                os.unlink(name, dir_fd=self._folder)
        for descriptor in reversed(self._descriptors):
            os.close(descriptor)


def _listen(injector: Injector, answer: int, deadline: float, wanted: Callable[[], bool]) -> _Told:
    """What the target tells until it is done; bounded in time and size."""
    told, rest, at = _Told(), b"", 0
    while not told.over:
        piece = os.pread(answer, 1 << 20, at)
        at += len(piece)
        *lines, rest = (rest + piece).split(b"\n")
        try:
            for line in lines:
                told.take(line)
        except ValueError:
            raise _refused(injector.pid, "what it told is not readable") from None
        if piece:
            continue
        if not injector.identity.alive():
            raise _refused(injector.pid, "it ended")
        last = next(reversed(told.states), "nothing")
        if not wanted():
            raise _refused(injector.pid, f"its profiler was not waited for to the end (last: {last})")
        if time.monotonic() > deadline or at > _MOST_BYTES:
            raise _refused(injector.pid, f"its profiler did not come to an end in time (last: {last})")
        time.sleep(_LOOK_S)
    return told


def _refused(pid: int, why: str) -> TargetRefused:
    return TargetRefused(f"cannot capture kernels of {pid}", why)


def _malformed(pid: int) -> TargetRefused:
    return _refused(pid, "what it told is not of the expected form")


def _result(pid: int, told: _Told, report: InjectReport) -> KernelCapture:
    if "failed" in told.states:
        raise _refused(pid, str(told.states["failed"].get("why"))[:200])
    try:
        done, first = told.states["done"], told.states["preparing"]
        return KernelCapture(
            pid=pid,
            framework=f"torch {first['torch']}"[:100],
            moments={name: int(state["monotonic_ns"]) for name, state in told.states.items()},
            left_out=int(done["left_out"]),
            attach=report,
            lines=told.rows,
            offset_ns=int(done["realtime_ns"]) - int(done["monotonic_ns"]),
        )
    except (KeyError, TypeError, ValueError, OverflowError):
        raise _malformed(pid) from None


def _event(row: list[Any], offset: int) -> KernelEvent:
    """A row of the target's file; ``offset`` is realtime - monotonic, ns. ValueError for what is none."""
    name, kind, *numbers = row
    device, lane, start, duration, correlation = (int(number) for number in numbers)
    if max(map(abs, (device, lane, start, duration, correlation))) > _MOST:
        raise ValueError("a number is out of range")
    begun = start - offset
    return KernelEvent(str(name), str(kind), device, lane, begun, begun + max(duration, 0), correlation)
