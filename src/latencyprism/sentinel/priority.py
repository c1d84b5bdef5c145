"""Being on time beside engines that spin on every core: a real-time slice for short work, with a brake.

The watcher sleeps nearly always and works for a fraction of a millisecond a step. Where engines busy-wait, an
ordinary process can wait for seconds before it gets a core (measured: 3 s on two cores), which would make an
alert late. With SCHED_RR it runs at once. Should it ever run on without sleeping, the kernel says so after
``BRAKE_US`` (RLIMIT_RTTIME) and it has to sleep, the longer the more often it happens. To make it ordinary
instead would do more than that: for seconds it would neither run nor give the interpreter's lock away, and
lose the lease of its probes.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import threading
import time
from types import FrameType, TracebackType

PRIORITY = 1
BRAKE_US = 150_000
PAUSE_S, LONGEST_PAUSE_S, CALM_S = 0.02, 2.0, 5.0
"""What a thread sleeps that ran on: twice as long each time, until it has not done so for ``CALM_S``. Who
runs wild is left some 7 % of a core at real time; the longest pause is within the lease of the probes."""


def on_time() -> bool:
    """This thread at the lowest real-time priority for good, for one that sleeps nearly always; threads and
    processes that it starts are ordinary. False where it is not permitted."""
    try:
        os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(PRIORITY))
    except OSError:
        return False
    return True


def ordinary() -> None:
    """This thread as any, for one that was started by ``start_alike`` and has longer work to do."""
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def start_alike(thread: threading.Thread) -> None:
    """Start ``thread`` scheduled as this one is. ``start`` returns when the new thread has run, and beside
    engines that spin an ordinary one may not for seconds, which one at real time would wait for."""
    policy, param = os.sched_getscheduler(0), os.sched_getparam(0)
    inherited = policy & ~os.SCHED_RESET_ON_FORK
    try:
        if policy != inherited:
            os.sched_setscheduler(0, inherited, param)
    except OSError:  # not permitted: an ordinary one then
        thread.start()
        return
    try:
        thread.start()
    finally:
        if policy != inherited:
            os.sched_setscheduler(0, policy, param)


class OnTime:
    """Context manager. ``active`` tells whether it was permitted; children never inherit it. One within
    another does nothing: the outer one has seen to it."""

    _entered = 0

    def __init__(self, wanted: bool = True) -> None:
        self.active = False
        self.braked = 0
        """How often the brake was needed."""
        self._wanted = wanted
        self._limit: tuple[int, int] | None = None
        self._handler: object = None
        self._before: tuple[int, os.sched_param] | None = None
        self._soft_us = BRAKE_US
        self._pause_s = PAUSE_S
        self._braked_at = -CALM_S

    def __enter__(self) -> OnTime:
        OnTime._entered += 1
        if not self._wanted or OnTime._entered > 1:
            return self
        before = os.sched_getscheduler(0), os.sched_getparam(0)
        try:
            self._limit = resource.getrlimit(resource.RLIMIT_RTTIME)
            hard = self._limit[1]
            self._soft_us = BRAKE_US if hard == resource.RLIM_INFINITY else min(BRAKE_US, hard // 2)
            self._handler = signal.signal(signal.SIGXCPU, self._brake)
            resource.setrlimit(resource.RLIMIT_RTTIME, (self._soft_us, hard))
            os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(PRIORITY))
            self.active, self._before = True, before
        except (OSError, ValueError):  # not permitted, or not the main thread: ordinary then
            self._restore()
        return self

    def _brake(self, _number: int, _frame: FrameType | None) -> None:
        self.braked += 1
        now = time.monotonic()
        calm = now - self._braked_at > CALM_S
        self._pause_s = PAUSE_S if calm else min(2.0 * self._pause_s, LONGEST_PAUSE_S)
        if self._limit is not None:  # each time the kernel adds a second to it
            resource.setrlimit(resource.RLIMIT_RTTIME, (self._soft_us, self._limit[1]))
        time.sleep(self._pause_s)
        self._braked_at = time.monotonic()

    def _restore(self) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGXCPU, self._handler)  # type: ignore[arg-type]
            self._handler = None
        if self._limit is not None:
            resource.setrlimit(resource.RLIMIT_RTTIME, self._limit)
            self._limit = None

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        OnTime._entered -= 1
        if self._before is not None:
            os.sched_setscheduler(0, *self._before)
            self.active, self._before = False, None
        self._restore()
