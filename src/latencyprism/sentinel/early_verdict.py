"""A verdict while it happens: a forked copy looks at what was recorded so far, and says what it thinks.

The watch goes on meanwhile: to diagnose takes tenths of a second, which an alert must not wait for.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

from latencyprism.recorder.capture import Capture
from latencyprism.recorder.forked import part_from_watch
from latencyprism.sentinel.finish import finish

FIRST_S, NEXT_S = 1.0, 2.5
"""After the alert; the final verdict comes with the capture."""
_NICE, _MOST_BYTES, _CPU_S = 5, 1 << 20, 20


_ending: list[int] = []
"""Killed, and not gone yet."""


def reap() -> None:
    """Call now and again: takes note of killed copies that are gone. To wait for one would keep the watch
    from its steps: beside an engine that spins on every core even dying can take seconds."""
    for pid in list(_ending):
        try:
            gone, _ = os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            gone = pid
        if gone:
            _ending.remove(pid)


class EarlyVerdict:
    """``make`` is called in the copy. ``poll`` until ``over``; nothing here raises."""

    def __init__(self, make: Callable[[], Capture]) -> None:
        self.verdict: dict[str, Any] | None = None
        self.over = False
        self._said = b""
        self._pid = -1
        self._read_fd = -1
        try:
            self._read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
        except OSError:
            self.over = True
            return
        os.set_blocking(self._read_fd, False)
        try:
            with warnings.catch_warnings():
                # Python 3.12 warns of forks beside threads; the copy takes no lock of theirs.
                warnings.simplefilter("ignore", DeprecationWarning)
                pid = os.fork()
        except OSError:
            self.over = True
            os.close(self._read_fd)
        else:
            if pid == 0:
                _look(make, write_fd)
            self._pid = pid
        os.close(write_fd)

    def poll(self) -> None:
        """Takes microseconds; sets ``verdict`` and ``over`` when there is something to say."""
        if self.over:
            return
        ended, _ = os.waitpid(self._pid, os.WNOHANG)
        with contextlib.suppress(BlockingIOError):
            while len(self._said) < _MOST_BYTES and (piece := os.read(self._read_fd, 65536)):
                self._said += piece
        if ended:
            self._finish()

    def close(self) -> None:
        """End it, heard or not, and wait for nothing; ``reap`` later."""
        if not self.over:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
            _ending.append(self._pid)
            reap()
            self._said = b""
            self._finish()

    def _finish(self) -> None:
        self.over = True
        os.close(self._read_fd)
        with contextlib.suppress(ValueError):
            told = json.loads(self._said)
            self.verdict = told if isinstance(told, dict) else None


def _look(make: Callable[[], Capture], said_fd: int) -> NoReturn:
    """In the copy: let go of what is the watcher's, diagnose, say it, end."""
    try:
        part_from_watch([said_fd], _NICE)
        signal.setitimer(signal.ITIMER_PROF, _CPU_S)
        verdict = finish(make()).verdict
        if verdict is not None:
            text = json.dumps(verdict.to_dict()).encode()
            while text:
                text = text[os.write(said_fd, text) :]
    finally:
        os._exit(0)
