"""Captures that no detector asked for: a signal, a file that appears, HTTP, Alertmanager, a schedule."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latencyprism.recorder.trigger import Asked
from latencyprism.sentinel.attendant import Attendant, Raised
from latencyprism.sentinel.receiver import Receiver, Wish
from latencyprism.sentinel.replica_watch import ReplicaWatch

SIGNAL = signal.SIGUSR1


@dataclass(frozen=True)
class TriggerOptions:
    """``listen`` None: no HTTP; ``every_s`` None: no schedule."""

    files: tuple[Path, ...] = ()
    listen: int | None = None
    every_s: float | None = None


class TriggerWatch(Attendant):
    """Which of them are worth a capture is for ``recorder.trigger`` to decide."""

    name = "triggers"
    prompt = False

    def __init__(self, options: TriggerOptions) -> None:
        super().__init__()
        self._options = options
        self._watches: list[ReplicaWatch] = []
        self._seen = {path: _mark(path) for path in options.files}
        self._signalled = 0
        self._due_ns: int | None = None
        self.receiver = Receiver(options.listen) if options.listen is not None else None
        self._said_port = False
        self._before: Any = None
        try:
            self._before = signal.signal(SIGNAL, self._on_signal)
            self._installed = True
        except ValueError:  # not the main thread: signals are somebody else's
            self._installed = False

    def _on_signal(self, number: int, frame: object) -> None:
        self._signalled += 1

    def attached(self, watch: ReplicaWatch) -> None:
        self._watches.append(watch)
        if self.receiver is not None and not self._said_port:
            self._said_port = True
            self.emit("listening", url=f"http://127.0.0.1:{self.receiver.port}/capture")
            self.say(f"captures can be asked for at http://127.0.0.1:{self.receiver.port}/capture")

    def detached(self, watch: ReplicaWatch) -> None:
        if watch in self._watches:
            self._watches.remove(watch)

    def tick(self, now_ns: int) -> Sequence[Raised]:
        raised = [Raised(watch, capture=asked) for asked in self._own(now_ns) for watch in self._watches]
        for wish in self.receiver.wishes() if self.receiver is not None else ():
            raised += [Raised(watch, capture=wish.asked) for watch in self._watches if _is_meant(watch, wish)]
        return raised

    def _own(self, now_ns: int) -> list[Asked]:
        found = []
        if self._signalled:
            self._signalled = 0
            found.append(Asked("signal", SIGNAL.name))
        for path, before in self._seen.items():
            now = _mark(path)
            if now is not None and now != before:
                found.append(Asked("file", f"{path} appeared"))
            self._seen[path] = now
        if self._options.every_s is not None:
            period_ns = int(self._options.every_s * 1e9)
            if self._due_ns is None:
                self._due_ns = now_ns + period_ns
            elif now_ns >= self._due_ns:
                # After a long pause of the machine one is due, not all that were missed.
                self._due_ns = now_ns + period_ns
                found.append(Asked("schedule", f"every {self._options.every_s:g} s"))
        return found

    def close(self) -> None:
        if self.receiver is not None:
            self.receiver.close()
        if self._installed:
            signal.signal(SIGNAL, self._before)


def _mark(path: Path) -> tuple[int, int, int] | None:
    """Tells one file from another that took its place, or that was written to; None: there is none."""
    try:
        seen = os.stat(path)
    except OSError:
        return None
    return seen.st_dev, seen.st_ino, seen.st_mtime_ns


def _is_meant(watch: ReplicaWatch, wish: Wish) -> bool:
    """Labels that name no engine that we know of are about something else, and may be about all."""
    if wish.pid is not None:
        return wish.pid in watch.replica.pids
    if wish.engine is not None and wish.engine != watch.replica.engine:
        return False
    number = wish.replica if wish.engine is not None else None
    return number is None or not number.isdigit() or int(number) == watch.replica.number
