"""Signals that end the watch, as a file descriptor of its loop."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Callable
from contextlib import suppress


class SignalPipe:
    """SIGINT and SIGTERM wake the loop and ask it to stop; the handlers of before come back at ``close``."""

    def __init__(self, epoll: select.epoll, stop: Callable[[], None]) -> None:
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.fd = self._read
        self._before = {}
        try:
            self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, lambda *_: stop())
            self.installed = True
        except ValueError:  # not the main thread: whoever runs us calls stop()
            self.installed = False
        epoll.register(self._read, select.EPOLLIN)

    def drain(self) -> None:
        """A signal that does not end the watch must not keep it awake."""
        with suppress(BlockingIOError):
            os.read(self._read, 64)

    def close(self) -> None:
        if self.installed:
            signal.set_wakeup_fd(self._wakeup)
            for number, handler in self._before.items():
                signal.signal(number, handler)
        os.close(self._read)
        os.close(self._write)
