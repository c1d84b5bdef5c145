"""Running a short text of Python inside a live interpreter, and leaving nothing behind.

Two routes with one stop of the main thread, after which the target needs no tracer any more; one with none:

``pending``
    ``Py_AddPendingCall(PyRun_SimpleString, text)``. The interpreter runs the text as soon as its main thread
    is back in bytecode; no lock is taken, nothing allocated. For a target at work.
``gil``
    ``PyGILState_Ensure``, ``PyRun_SimpleString(text)``, ``PyGILState_Release`` as a chain of calls on the
    main thread. Only while it waits in a known system call and ``PyGILState_Check`` says that it does not
    hold the GIL. For an idle target. The text is laid on the borrowed stack.
``remote``
    Python 3.14 and later: the interpreter is asked by words in its memory (``remote_exec``); nothing is
    stopped. For a target at work; an idle one is taken by ``gil``.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from ..errors import TargetBusy, TargetRefused
from .borrow import Attempt, Borrower
from .interpreter import NEWEST_STOPPED, PythonInfo, python_of, refuse_state
from .outside import tracer_for
from .process import read_process, status_fields
from .ptrace import Gone
from .remote_exec import RemoteExec
from .slack import MAX_TEXT_BYTES, Slot, find_slots
from .syscalls import FUTEX, WAITING

_SETTLED_S = 0.010
_ACK_LOOK_S = 0.050
# Between two tries: a stop is a disturbance, so an unlucky target is not asked a thousand times a second.
_RETRY_S, _RETRY_LIMIT_S = 0.001, 0.050


@dataclass(frozen=True, slots=True)
class InjectReport:
    """How one text got in.

    ``stop_us`` from the request to stop until the thread was let go, ``held_us`` the part in which it stood
    still (at most: from when it was last seen running), both summed over ``stops`` (which is 0 on the remote
    route); ``ack_ms`` from the call of ``run`` to the acknowledgement; ``pending_left`` when an earlier try
    on the pending route is still queued (its text is blanked, so it will do nothing).
    """

    route: str
    stop_us: float
    held_us: float
    ack_ms: float
    stops: int = 1
    pending_left: bool = False


@dataclass(slots=True)
class _Progress:
    started: float
    stop_us: float = 0.0
    held_us: float = 0.0
    stops: int = 0
    queued: bool = False
    asked: bool = False
    entered: bool = False
    done: bool = False
    gil_held: bool = False
    pause_s: float = _RETRY_S
    why: str = "it could not be stopped"
    route: str = field(default="pending")


class _Text(NamedTuple):
    """What is to run; ``slot``: where it lies in the target for a call that is made later."""

    data: bytes
    slot: Slot | None


class Injector:
    """Everything about one target that can be found out before it is stopped, and the way in.

    Making one reads the target's maps and ELF files (some 10 ms to 100 ms) and changes nothing. Raises
    TargetRefused with the reason when the target is unsuitable. One injector serves any number of texts, one
    at a time; it is not for use by several threads at once.
    """

    def __init__(self, pid: int) -> None:
        if pid == os.getpid():
            raise TargetRefused(
                f"process {pid} is this one", "a process cannot stop itself", "give another pid"
            )
        self.python: PythonInfo = python_of(pid)
        self.pid = pid
        self.identity = self.python.identity
        self._remote: RemoteExec | None = None
        if self.python.version[:2] > NEWEST_STOPPED:
            self._remote = RemoteExec(self.python, read_process(pid).ns_pid)
        self._borrower = Borrower(self.python)
        self._tracer = tracer_for(self._borrower)
        # Without room for a text a target can still be entered while it waits.
        self._slots: list[Slot] = [] if self._remote else find_slots(pid, self.python.maps)
        self._turn = 0

    def run(self, text: str, acknowledged: Callable[[], bool], timeout_s: float = 2.0) -> InjectReport:
        """Have the target run ``text`` and wait until ``acknowledged()`` is true.

        ``text`` is Python source below ``MAX_TEXT_BYTES`` bytes. It must not raise and must not print:
        wrap it in ``try``/``except BaseException``. It runs with ``__main__`` as its globals, so it should be
        one ``exec`` into a dict of its own. It must tell that it ran through something ``acknowledged`` can
        see (a ring's header, a file).

        It may run **more than once, and later than this call returns**: a call queued while the target is
        idle runs when its main thread is back in bytecode, and both routes may be tried. So the text must
        be idempotent: give every command a nonce and let the target drop one that it has seen.

        Raises TargetBusy when the text did not run in ``timeout_s`` (the main thread is in native code, or
        waits holding the GIL), TargetRefused when the target ended. The text is blanked then: it will not run
        later.
        """
        data = _checked(text)
        if not self.identity.alive():
            raise TargetRefused(f"process {self.pid} is gone", "it ended since it was looked at")
        refuse_state(read_process(self.pid))
        try:
            return self._run(data, acknowledged, timeout_s)
        except Gone:
            raise TargetRefused(f"process {self.pid} is gone", "it ended while it was attached to") from None

    def _run(self, data: bytes, acknowledged: Callable[[], bool], timeout_s: float) -> InjectReport:
        self._borrower.same_program()
        slot = None if self._remote else self._free_slot(len(data))
        if slot is not None:
            slot.put(data)
        progress = _Progress(time.monotonic())
        try:
            return self._drive(_Text(data, slot), acknowledged, progress, progress.started + timeout_s)
        finally:
            # It fails when the target is ending or has unloaded that library; the text is gone with either.
            with contextlib.suppress(TargetRefused):
                if slot is not None:
                    slot.clear()
                if self._remote is not None:
                    self._remote.withdraw(progress.route == "remote" and progress.done)

    def _free_slot(self, size: int) -> Slot | None:
        for _ in self._slots:
            slot = self._slots[self._turn % len(self._slots)]
            self._turn += 1
            if slot.text_bytes >= size and slot.is_free():
                return slot
        return None

    def _drive(
        self, text: _Text, acknowledged: Callable[[], bool], progress: _Progress, deadline: float
    ) -> InjectReport:
        while True:
            self._step(text, progress)
            until = min(deadline, time.monotonic() + _ACK_LOOK_S) if progress.queued else 0.0
            until = deadline if progress.entered else until
            if _wait(acknowledged, until):
                progress.done = True
                return _report(progress)
            if time.monotonic() >= deadline:
                raise self._timed_out(progress)
            if not self.identity.alive():
                raise Gone
            time.sleep(progress.pause_s)

    def _step(self, text: _Text, progress: _Progress) -> None:
        """At most one stop, on the route that fits what the main thread does now."""
        if not progress.gil_held and self._waits():
            attempt = self._attempt(progress, "gil", text.data)
            progress.gil_held = attempt.final
            if attempt.entered:
                progress.entered, progress.route = True, "gil"
        elif progress.queued:
            return
        else:
            attempt = self._queue(text, progress)
        if attempt.final or not progress.gil_held:
            progress.why = attempt.why

    def _queue(self, text: _Text, progress: _Progress) -> Attempt:
        """Ask a main thread at work to run the text when it can."""
        progress.pause_s = min(2 * progress.pause_s, _RETRY_LIMIT_S)
        if self._remote is not None:
            self._remote.request(text.data)
            progress.queued, progress.asked, progress.route = True, True, "remote"
            return Attempt(entered=True, why="the main thread is in native code")
        if text.slot is None:
            return Attempt(why="its main thread is at work, and no loaded library leaves room for a text")
        attempt = self._attempt(progress, "pending", text.slot.address)
        if attempt.entered:
            progress.queued, progress.route = True, "pending"
        return attempt

    def _attempt(self, progress: _Progress, route: str, text: int | bytes) -> Attempt:
        attempt = self._tracer.attempt(route, text)
        progress.stop_us += attempt.stop_us
        progress.held_us += attempt.held_us
        progress.stops += 1
        return attempt

    def _waits(self) -> bool:
        """True when the main thread has stayed in one of the ``WAITING`` calls for ``_SETTLED_S``."""
        first = self._whereabouts()
        if first is None:
            return False
        time.sleep(_SETTLED_S)
        return self._whereabouts() == first

    def _whereabouts(self) -> tuple[str, str] | None:
        """(system call with arguments, times the thread went to sleep), None when it is not waiting."""
        try:
            with open(f"/proc/{self.pid}/task/{self.pid}/syscall") as file:
                call = file.read(256)
            sleeps = status_fields(self.pid).get("voluntary_ctxt_switches", "")
        except FileNotFoundError:
            return None
        except OSError:
            raise Gone from None
        fields = call.split()
        number = int(fields[0]) if fields and fields[0].isdigit() else -1
        if number not in WAITING or (number == FUTEX and self._borrower.in_runtime(int(fields[1], 16))):
            return None
        return call, sleeps

    def _timed_out(self, progress: _Progress) -> TargetBusy:
        return TargetBusy(
            f"process {self.pid} did not run the text in time",
            progress.why,
            "try again when it is between two native calls; nothing was left in it",
        )


def _checked(text: str) -> bytes:
    data = text.encode("utf-8")
    if b"\0" in data or not data or len(data) > MAX_TEXT_BYTES:
        raise ValueError(
            f"the text must have 1 to {MAX_TEXT_BYTES} bytes and no zero byte, it has {len(data)}"
        )
    return data


def _wait(acknowledged: Callable[[], bool], until: float) -> bool:
    pause = 0.0001
    while not acknowledged():
        if time.monotonic() >= until:
            return False
        time.sleep(pause)
        pause = min(pause * 1.5, 0.002)
    return True


def _report(progress: _Progress) -> InjectReport:
    return InjectReport(
        route=progress.route,
        stop_us=progress.stop_us,
        held_us=progress.held_us,
        ack_ms=(time.monotonic() - progress.started) * 1e3,
        stops=progress.stops,
        pending_left=progress.queued and not progress.asked and progress.route == "gil",
    )
