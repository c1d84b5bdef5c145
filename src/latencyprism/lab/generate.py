"""The load generator's loop: one thread, non-blocking sockets, a timestamp for every arrival.

Light, because it shares two cores with the engine it measures: about 20 us for one event of one stream.
Times are CLOCK_MONOTONIC nanoseconds, taken right after the bytes were read.
"""

from __future__ import annotations

import errno
import heapq
import random
import selectors
import socket
import time
from array import array
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from latencyprism.lab.profiles import Profile
from latencyprism.lab.wire import EventStream, completion_body, request_bytes


@dataclass(frozen=True)
class Target:
    """Where the load goes: a port of 127.0.0.1 and how that engine wants to be asked."""

    engine: str
    port: int
    model: str


@dataclass
class Request:
    """One request as its client saw it. ``outcome``: ok, failed (``why``), or cut (the load ended first);
    ``name``: what it was sent with as X-Request-Id.

    ``due_ns`` is when it should have been sent: TTFT counts from there. Token figures are the server's,
    None where it reported none.
    """

    number: int
    due_ns: int
    sent_ns: int
    asked_prompt_tokens: int
    asked_output_tokens: int
    first_ns: int | None = None
    end_ns: int | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    outcome: str = "cut"
    why: str = ""
    name: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class _Flight:
    """A request under way on its socket."""

    __slots__ = ("last_ns", "request", "sock", "stream", "unsent")

    def __init__(self, request: Request, sock: socket.socket, unsent: bytes, engine: str) -> None:
        self.request, self.sock, self.unsent = request, sock, unsent
        self.stream = EventStream(engine)
        self.last_ns = 0


class Generator:
    """Sends what ``profile`` says to ``target`` until it ends or ``stopping()`` is true, then lets the
    requests in flight finish for ``drain_s`` seconds. ``gaps`` collects, for each arrival: time, gap since
    the one before in the same request, request number, number of events with a token it brought (see
    ``outcome.GAP``)."""

    def __init__(
        self,
        target: Target,
        profile: Profile,
        stopping: Callable[[], bool],
        *,
        timeout_s: float = 60.0,
        drain_s: float = 20.0,
    ) -> None:
        self.target, self.profile = target, profile
        self.requests: list[Request] = []
        self.gaps: array[int] = array("q")
        self._stopping, self._timeout_ns, self._drain_ns = stopping, int(timeout_s * 1e9), int(drain_s * 1e9)
        self._lengths = random.Random(profile.seed)
        self._times = random.Random(profile.seed + 1)
        self._selector = selectors.DefaultSelector()
        self._flights: set[_Flight] = set()
        self._due: list[int] = []

    def run(self) -> tuple[int, int]:
        """Returns when it started and ended to send (CLOCK_MONOTONIC ns)."""
        began = time.monotonic_ns()
        if self.profile.rate is None:
            self._due = [began] * self.profile.clients
        else:
            self._due = [began]
        ends = began + int((self.profile.duration_s or 1e9) * 1e9)
        while not self._finished_sending(ends):
            self._send_due()
            self._step(min([ends, *self._due[:1]]))
        ended = time.monotonic_ns()
        while self._flights and time.monotonic_ns() < ended + self._drain_ns:
            self._step(ended + self._drain_ns)
        for flight in list(self._flights):
            self._close(flight, "cut", "the load ended")
        self._selector.close()
        return began, ended

    def _finished_sending(self, ends: int) -> bool:
        most = self.profile.requests
        return (
            time.monotonic_ns() >= ends
            or self._stopping()
            or (most is not None and len(self.requests) >= most)
        )

    def _send_due(self) -> None:
        now = time.monotonic_ns()
        most = self.profile.requests
        while self._due and self._due[0] <= now and len(self._flights) < self.profile.clients:
            if most is not None and len(self.requests) >= most:
                return
            due = heapq.heappop(self._due)
            self._send(due)
            if self.profile.rate is not None:
                heapq.heappush(self._due, due + int(self._times.expovariate(self.profile.rate) * 1e9))

    def _send(self, due: int) -> None:
        prompt, output = self.profile.draw(self._lengths)
        target = self.target
        body = completion_body(target.engine, target.model, prompt, output, stream=True)
        request = Request(len(self.requests), due, time.monotonic_ns(), len(prompt), output)
        request.name = f"{self.profile.name}-{self.profile.seed}-{request.number}"
        self.requests.append(request)
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        sock.setblocking(False)
        flight = _Flight(
            request, sock, request_bytes(f"127.0.0.1:{target.port}", body, request.name), target.engine
        )
        self._flights.add(flight)
        self._selector.register(sock, selectors.EVENT_WRITE, flight)
        result = sock.connect_ex(("127.0.0.1", target.port))
        if result not in (0, errno.EINPROGRESS):
            self._close(flight, "failed", errno.errorcode.get(result, str(result)))

    def _step(self, until_ns: int) -> None:
        """Wait for something to happen, at most 50 ms so that a request to stop is seen, and take it in."""
        wait_s = min(0.05, max(0.0, (until_ns - time.monotonic_ns()) / 1e9))
        if len(self._flights) >= self.profile.clients:
            wait_s = 0.05
        for key, _ in self._selector.select(wait_s):
            flight: _Flight = key.data
            try:
                if flight.unsent:
                    self._write(flight)
                else:
                    self._read(flight)
            except OSError as failure:
                self._close(flight, "failed", errno.errorcode.get(failure.errno or 0, str(failure)))
        oldest = time.monotonic_ns() - self._timeout_ns
        for flight in [flight for flight in self._flights if flight.request.sent_ns < oldest]:
            self._close(flight, "failed", "timeout")

    def _write(self, flight: _Flight) -> None:
        error = flight.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            raise OSError(error, "connect")
        flight.unsent = flight.unsent[flight.sock.send(flight.unsent) :]
        if not flight.unsent:
            self._selector.modify(flight.sock, selectors.EVENT_READ, flight)

    def _read(self, flight: _Flight) -> None:
        data = flight.sock.recv(65536)
        now = time.monotonic_ns()
        if not data:
            self._end(flight, now)
            return
        events = flight.stream.feed(data)
        request = flight.request
        if events:
            since = request.first_ns is not None
            if not since:
                request.first_ns = now
            self.gaps.extend((now, now - flight.last_ns if since else -1, request.number, events))
            flight.last_ns = now
        if flight.stream.done and request.end_ns is None:
            request.end_ns = now

    def _end(self, flight: _Flight, now: int) -> None:
        """The server closed the connection: was it all that was asked for?"""
        request, stream = flight.request, flight.stream
        request.prompt_tokens = stream.usage("prompt_tokens")
        request.output_tokens = stream.usage("completion_tokens")
        request.cached_tokens = stream.usage("cached_tokens")
        request.end_ns = request.end_ns or now
        if stream.status != 200:
            self._close(flight, "failed", f"status {stream.status}")
        elif not stream.done:
            self._close(flight, "failed", "stream broke off")
        elif request.output_tokens != request.asked_output_tokens:
            self._close(flight, "failed", f"{request.output_tokens} of {request.asked_output_tokens} tokens")
        else:
            self._close(flight, "ok", "")

    def _close(self, flight: _Flight, outcome: str, why: str) -> None:
        self._selector.unregister(flight.sock)
        flight.sock.close()
        self._flights.discard(flight)
        flight.request.outcome, flight.request.why = outcome, why
        if self.profile.rate is None:
            # A client whose request was refused at once must not spin.
            pause_ms = self._times.expovariate(1 / self.profile.think_ms) if self.profile.think_ms else 0.0
            pause_ms = max(pause_ms, 100.0 if outcome == "failed" else 0.0)
            heapq.heappush(self._due, time.monotonic_ns() + int(pause_ms * 1e6))
