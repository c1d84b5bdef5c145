"""Four-time-stamp exchanges over UDP: what ties the clock of another node to ours.

One side answers, the other asks now and then and gives what it learns to a ``ClockTrack``. A datagram is a
magic, the asker's number of the question and three time stamps. What is not an answer to the question that
was asked last is dropped; an answer that does not come is an exchange less.
"""

from __future__ import annotations

import secrets
import select
import socket
import struct
import time
from collections.abc import Callable

from latencyprism.errors import BadInput, PrismError
from latencyprism.timeline.clocks import ClockTrack

Clock = Callable[[], int]
"""Reads a clock, ns."""

_MAGIC = 0x4C_50_43_4B  # "LPCK"
_DATAGRAM = struct.Struct("!IQqqq")  # magic, question, sent, arrived, answered
_ASK, _ANSWER_S = 0, 1.0
_AT_ONCE = 1000


class Answering:
    """Answers on a UDP socket. ``serve`` handles what has come in by then; call it when ``fileno`` is
    readable."""

    def __init__(self, host: str = "127.0.0.1", port: int = 0, clock: Clock = time.monotonic_ns) -> None:
        self._socket = _bound(host, port)
        self._clock = clock
        self.address: tuple[str, int] = self._socket.getsockname()[:2]

    def fileno(self) -> int:
        return self._socket.fileno()

    def serve(self) -> int:
        """How many questions were answered; anything else is dropped."""
        answered = 0
        for _ in range(_AT_ONCE):
            try:
                data, asker = self._socket.recvfrom(_DATAGRAM.size + 1)
            except BlockingIOError:
                break
            except OSError:
                continue
            arrived = self._clock()
            if len(data) != _DATAGRAM.size:
                continue
            magic, question, sent, _, stamp = _DATAGRAM.unpack(data)
            if magic != _MAGIC or stamp != _ASK:
                continue
            try:
                self._socket.sendto(_DATAGRAM.pack(_MAGIC, question, sent, arrived, self._clock()), asker)
                answered += 1
            except OSError:
                continue
        return answered

    def close(self) -> None:
        self._socket.close()


class Asking:
    """Asks one node. ``track`` learns from each answer."""

    def __init__(self, host: str, port: int, track: ClockTrack, clock: Clock = time.monotonic_ns) -> None:
        self.track = track
        self.asked = self.answered = 0
        self._clock = clock
        try:
            self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
            self._socket.connect((host, port))
        except (OSError, OverflowError) as error:
            raise PrismError(f"cannot ask {host}:{port} for its time", str(error)) from None

    def ask(self, timeout_s: float = _ANSWER_S) -> bool:
        """One exchange; False where no answer came in time."""
        question = secrets.randbits(63)
        self.asked += 1
        sent = self._clock()
        try:
            self._socket.send(_DATAGRAM.pack(_MAGIC, question, sent, 0, _ASK))
        except OSError:
            return False
        until = time.monotonic() + timeout_s
        while (left := until - time.monotonic()) > 0:
            if not select.select([self._socket], [], [], left)[0]:
                return False
            try:
                data = self._socket.recv(_DATAGRAM.size + 1)
            except OSError:
                continue
            received = self._clock()
            if self._take(data, question, sent, received):
                return True
        return False

    def _take(self, data: bytes, question: int, sent: int, received: int) -> bool:
        if len(data) != _DATAGRAM.size:
            return False
        magic, answers, told_sent, arrived, answered = _DATAGRAM.unpack(data)
        if magic != _MAGIC or answers != question or told_sent != sent or answered < arrived:
            return False
        self.track.exchange(sent, arrived, answered, received)
        self.answered += 1
        return True

    def close(self) -> None:
        self._socket.close()


def _bound(host: str, port: int) -> socket.socket:
    found = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    try:
        found.bind((host, port))
    except (OSError, OverflowError) as error:
        found.close()
        raise BadInput(f"cannot answer on {host}:{port}", str(error)) from None
    return found
