"""An engine under watch in this process: no alerts, no files; the records of any stretch of the last minutes.

What is seen is what a watch sees: the same source, samplers and kernel probes.
"""

from __future__ import annotations

import os
import select
import threading
import time
from types import TracebackType

from latencyprism.engines.discovery import discover
from latencyprism.errors import PrismError
from latencyprism.host.neighbours import Neighbours
from latencyprism.records import Window
from latencyprism.sentinel.priority import OnTime, on_time, start_alike
from latencyprism.sentinel.replica_watch import ReplicaWatch
from latencyprism.sentinel.targets import Attachment, attach

HORIZON_S = 240.0
_HOST_S, _NEIGHBOURS_S, _LEASE_S, _SLEEP_S = 0.2, 1.0, 0.5, 0.05


class Observed:
    """Use as a context manager; ``pump`` whenever nothing else is to be done."""

    def __init__(self, pid: int) -> None:
        replica = discover(pid)[0]
        with OnTime():
            attachment = attach(replica)
            self._left = threading.Event()
            self._renewing = threading.Thread(target=self._renew, args=(attachment,), daemon=True)
            start_alike(self._renewing)
            self.watch = ReplicaWatch(attachment, horizon_s=HORIZON_S)
        self._neighbours = Neighbours(exclude=[os.getpid(), *replica.pids])
        self._epoll = select.epoll()
        number = self.watch.attachment.source.fileno()
        if number is not None:
            self._epoll.register(number, select.EPOLLIN)
        self._host_at = self._neighbours_at = self._lease_at = 0.0

    def _renew(self, attachment: Attachment) -> None:
        """By a thread: what is done between two calls of ``pump`` may outlast the lease."""
        on_time()
        while not self._left.wait(_LEASE_S):
            attachment.source.renew()

    def pump(self, seconds: float) -> None:
        """Watch for so long. PrismError if the engine or the probe has gone."""
        end = time.monotonic() + seconds
        with OnTime():
            while (now := time.monotonic()) < end:
                settled = self.watch.settle()
                self._epoll.poll(min(_SLEEP_S, end - now) if settled else 0)
                self.watch.poll()
                self._look(time.monotonic())

    def _look(self, now: float) -> None:
        if now >= self._host_at:
            self._host_at = now + _HOST_S
            self.watch.sample_host(time.monotonic_ns())
        if now >= self._neighbours_at:
            self._neighbours_at = now + _NEIGHBOURS_S
            for counter in self._neighbours.counters(time.monotonic_ns()):
                self.watch.recorder.add_counter(counter)
        if now >= self._lease_at:
            self._lease_at = now + _LEASE_S
            why = self.watch.attachment.source.detached()
            if why is not None or not self.watch.attachment.alive():
                raise PrismError("the engine is no longer observed", why or "it ended")

    def window(self, since_ns: int, until_ns: int) -> Window:
        """What overlaps that time, waits of threads included."""
        below = self.watch.below
        if below is not None:
            below.drain()
        seen = self.watch.recorder.window(since_ns, until_ns)
        if below is not None:
            seen.spans.extend(below.spans(since_ns, until_ns, until_ns))
        return seen

    @property
    def missing(self) -> list[str]:
        """What this machine does not let be seen."""
        below = [self.watch.below_missing] if self.watch.below_missing else []
        return [*self.watch.host.not_available, *below]

    def close(self) -> None:
        self._left.set()
        self._renewing.join()
        self.watch.close()
        self._epoll.close()

    def __enter__(self) -> Observed:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
