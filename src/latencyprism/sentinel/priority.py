"""Being on time beside engines that spin on every core: a real-time slice for short work, with a brake.

The watcher sleeps nearly always and works for a fraction of a millisecond a step. Where engines busy-wait, an
ordinary process can wait for seconds before it gets a core (measured: 3 s on two cores), which would make an
alert late. With SCHED_RR it runs at once. Should it ever run on without sleeping, the kernel says so after
``BRAKE_US`` (RLIMIT_RTTIME) and it becomes ordinary again, though favoured among ordinary threads: one that
is kept from its core while it has the interpreter's lock keeps those threads waiting that must be on time.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import NamedTuple

PRIORITY = 1
BRAKE_US = 150_000
MOST_BRAKES = 5
FAVOURED_NICE = -15


class Standing(NamedTuple):
    """How the kernel schedules this thread."""

    policy: int
    param: os.sched_param
    nice: int

    @classmethod
    def now(cls) -> Standing:
        return cls(os.sched_getscheduler(0), os.sched_getparam(0), os.getpriority(os.PRIO_PROCESS, 0))

    def restore(self) -> None:
        os.sched_setscheduler(0, self.policy, self.param)
        os.setpriority(os.PRIO_PROCESS, 0, self.nice)


@contextlib.contextmanager
def favoured() -> Iterator[None]:
    """This thread before other ordinary ones; what it starts is not. Where it is not permitted, nothing
    changes."""
    before = Standing.now()
    if not favour():
        yield
        return
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            before.restore()


def favour() -> bool:
    """The same for good. False where it is not permitted."""
    try:
        os.setpriority(os.PRIO_PROCESS, 0, FAVOURED_NICE)
        os.sched_setscheduler(0, os.SCHED_OTHER | os.SCHED_RESET_ON_FORK, os.sched_param(0))
    except OSError:
        return False
    return True


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
        self._before: Standing | None = None

    def __enter__(self) -> OnTime:
        OnTime._entered += 1
        if not self._wanted or OnTime._entered > 1:
            return self
        before = Standing.now()
        try:
            self._limit = resource.getrlimit(resource.RLIMIT_RTTIME)
            hard = self._limit[1]
            soft = BRAKE_US if hard == resource.RLIM_INFINITY else min(BRAKE_US, hard // 2)
            self._handler = signal.signal(signal.SIGXCPU, self._brake)
            resource.setrlimit(resource.RLIMIT_RTTIME, (soft, hard))
            os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(PRIORITY))
            self.active, self._before = True, before
        except (OSError, ValueError):  # not permitted, or not the main thread: ordinary then
            self._restore()
        return self

    def _brake(self, _number: int, _frame: FrameType | None) -> None:
        self.braked += 1
        self.active = False
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        favour()

    def again(self) -> None:
        """Back to real time after the brake, a few times; who needs it all the time stays ordinary."""
        if not self.active and 0 < self.braked <= MOST_BRAKES:
            os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(PRIORITY))
            self.active = True

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
            self._before.restore()
            self.active, self._before = False, None
        self._restore()
