"""Running a short text of Python inside a live interpreter, and leaving nothing behind.

Two routes, both with one stop of the main thread after which the target needs no tracer any more:

``pending``
    ``Py_AddPendingCall(PyRun_SimpleString, text)``. The interpreter runs the text as soon as its main thread
    is back in bytecode; no lock is taken, nothing allocated. For a target at work.
``gil``
    ``PyGILState_Ensure``, ``PyRun_SimpleString(text)``, ``PyGILState_Release`` as a chain of calls on the
    main thread. Only while it waits in a known system call and ``PyGILState_Check`` says that it does not
    hold the GIL. For an idle target.
"""

from __future__ import annotations

import contextlib
import os
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from ..errors import TargetRefused
from .frame import BLOCKED_SIGNALS, Call, StackImage, scratch_address, stack_image
from .interpreter import PythonInfo, python_of, refuse_state
from .memory import read_memory, read_scattered, write_memory
from .process import read_process, status_fields
from .ptrace import Gone, Registers, Tracee, in_tracer_thread
from .slack import MAX_TEXT_BYTES, Slot, find_slots
from .syscalls import FUTEX, WAITING, interrupted, resumed

_STOP_LIMIT_S = 0.5
_SETTLED_S = 0.010
_ACK_LOOK_S = 0.050
# Between two tries: a stop is a disturbance, so an unlucky target is not asked a thousand times a second.
_RETRY_S, _RETRY_LIMIT_S = 0.001, 0.050
_STACK_REACH = 64 << 20
_SIGRETURN = 15
_FINGERPRINT_BYTES = 64


@dataclass(frozen=True, slots=True)
class InjectReport:
    """How one text got in.

    ``stop_us`` from the request to stop until the thread was let go, ``held_us`` the part in which it stood
    still, both summed over ``stops``; ``ack_ms`` from the call of ``run`` to the acknowledgement;
    ``pending_left`` when an earlier try on the pending route is still queued (its text is blanked, so it will
    do nothing).
    """

    route: str
    stop_us: float
    held_us: float
    ack_ms: float
    stops: int = 1
    pending_left: bool = False


@dataclass(slots=True)
class _Attempt:
    """One stop: ``entered`` when the call was begun, else ``why`` not; ``final``: trying again is no use."""

    entered: bool = False
    why: str = ""
    final: bool = False


class _Place(NamedTuple):
    """``registers`` at the stop, ``after`` to return to, ``number`` of the interrupted system call if any."""

    registers: Registers
    after: Registers
    number: int | None


@dataclass(slots=True)
class _Progress:
    started: float
    stop_us: float = 0.0
    held_us: float = 0.0
    stops: int = 0
    queued: bool = False
    entered: bool = False
    gil_held: bool = False
    pause_s: float = _RETRY_S
    why: str = "it could not be stopped"
    route: str = field(default="pending")


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
        self._api = self.python.addresses
        self._slots: list[Slot] = find_slots(pid, self.python.maps)
        self._turn = 0
        stacks = [one for one in self.python.maps if one.path == "[stack]"]
        if not self._slots or not stacks:
            raise TargetRefused(
                f"process {pid} cannot be attached to",
                "no loaded library leaves room for a text" if stacks else "its main stack is not to be found",
                "use eBPF and host signals for it",
            )
        self._stack_end = stacks[0].end
        self._code = (self._api["Py_AddPendingCall"], _FINGERPRINT_BYTES)
        self._fingerprint = read_memory(pid, *self._code)

    def run(self, text: str, acknowledged: Callable[[], bool], timeout_s: float = 2.0) -> InjectReport:
        """Have the target run ``text`` and wait until ``acknowledged()`` is true.

        ``text`` is Python source below ``MAX_TEXT_BYTES`` bytes. It must not raise and must not print:
        wrap it in ``try``/``except BaseException``. It runs with ``__main__`` as its globals, so it should be
        one ``exec`` into a dict of its own. It must tell that it ran through something ``acknowledged`` can
        see (a ring's header, a file).

        It may run **more than once, and later than this call returns**: a call queued while the target is
        idle runs when its main thread is back in bytecode, and both routes may be tried. So the text must
        be idempotent: give every command a nonce and let the target drop one that it has seen.

        Raises TargetRefused when the text did not run in ``timeout_s`` (the main thread is in native code, or
        waits holding the GIL) or the target ended. The text is blanked then: it will not run later.
        """
        data = _checked(text)
        if not self.identity.alive():
            raise TargetRefused(f"process {self.pid} is gone", "it ended since it was looked at")
        refuse_state(read_process(self.pid))
        self._same_program([])
        slot = self._next_slot()
        slot.put(data)
        progress = _Progress(time.monotonic())
        try:
            return self._drive(slot, acknowledged, progress, progress.started + timeout_s)
        except Gone:
            raise TargetRefused(f"process {self.pid} is gone", "it ended while it was attached to") from None
        finally:
            self._blank(slot)

    def _next_slot(self) -> Slot:
        for _ in self._slots:
            slot = self._slots[self._turn % len(self._slots)]
            self._turn += 1
            if slot.is_free():
                return slot
        raise TargetRefused(f"no room in process {self.pid}", "memory that should be unused is not")

    def _blank(self, slot: Slot) -> None:
        # It fails when the target is ending or has unloaded that library; the text is gone with either.
        with contextlib.suppress(TargetRefused):
            slot.clear()

    def _drive(
        self, slot: Slot, acknowledged: Callable[[], bool], progress: _Progress, deadline: float
    ) -> InjectReport:
        while True:
            self._step(slot, progress)
            until = min(deadline, time.monotonic() + _ACK_LOOK_S) if progress.queued else 0.0
            until = deadline if progress.entered else until
            if _wait(acknowledged, until):
                return _report(progress)
            if time.monotonic() >= deadline:
                raise self._timed_out(progress)
            if not self.identity.alive():
                raise Gone
            time.sleep(progress.pause_s)

    def _step(self, slot: Slot, progress: _Progress) -> None:
        """At most one stop, on the route that fits what the main thread does now."""
        if not progress.gil_held and self._waits():
            attempt = self._stop(progress, lambda tracee: self._enter_gil(tracee, slot))
            progress.gil_held = attempt.final
            if attempt.entered:
                progress.entered, progress.route = True, "gil"
        elif not progress.queued:
            progress.pause_s = min(2 * progress.pause_s, _RETRY_LIMIT_S)
            attempt = self._stop(progress, lambda tracee: self._enter_pending(tracee, slot))
            if attempt.entered:
                progress.queued, progress.route = True, "pending"
        else:
            return
        if attempt.final or not progress.gil_held:
            progress.why = attempt.why

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
        if number not in WAITING or (number == FUTEX and self._in_runtime(int(fields[1], 16))):
            return None
        return call, sleeps

    def _in_runtime(self, address: int) -> bool:
        """True for a futex of the interpreter itself: the thread is just taking or giving the GIL.

        To take the GIL once more there would wait on the same condition variable twice in one thread, and the
        wake-up meant for the inner wait can go to the outer one, which cannot act on it.
        """
        return self.python.runtime[0] <= address < self.python.runtime[1]

    def _stop(self, progress: _Progress, enter: Callable[[Tracee], _Attempt]) -> _Attempt:
        """Stop the main thread, let ``enter`` change it, let go; times go to ``progress``."""

        def work() -> _Attempt:
            asked = time.perf_counter_ns()
            stood = asked
            try:
                with Tracee(self.pid) as tracee:
                    # From here on the pid cannot become another process.
                    if not self.identity.alive():
                        raise Gone
                    stop = tracee.stop(_STOP_LIMIT_S)
                    stood = time.perf_counter_ns()
                    if stop is None:
                        return _Attempt(why="the main thread does not stop (uninterruptible wait)")
                    if stop.kind == "group":
                        raise TargetRefused(
                            f"process {self.pid} is stopped",
                            "a stop signal holds it",
                            f"kill -CONT {self.pid}",
                        )
                    return enter(tracee)
            finally:
                now = time.perf_counter_ns()
                progress.stop_us += (now - asked) / 1e3
                progress.held_us += (now - stood) / 1e3
                progress.stops += 1

        return in_tracer_thread(work)

    def _resumed(self, tracee: Tracee) -> _Place | str:
        """Where the thread stands and how it goes on, or why it is not to be borrowed now."""
        registers = tracee.registers()
        if not self._stack_end - _STACK_REACH < registers.rsp < self._stack_end:
            return "the main thread is on another stack"
        if registers.cs != 0x33:
            return "the main thread runs 32-bit code"
        # Without a restartable sequence of its own (rseq_cs at 8) the code is simply looked at twice.
        sequence, code = ((tracee.rseq_address() or 0) + 8, 8), (registers.rip - 7, 7)
        seen = self._same_program([code, sequence if sequence[0] > 8 else code])
        after = resumed(registers, seen[0])
        if after is None:
            return "the main thread is in a sleep that cannot be resumed exactly"
        if sequence[0] > 8 and any(seen[1]):
            return "the main thread is in a restartable sequence"
        return _Place(registers, after, interrupted(registers, seen[0]))

    def _same_program(self, more: list[tuple[int, int]]) -> list[bytes]:
        """The bytes at ``more`` (address, size); a look at the code that is to be called comes with them.

        Raises TargetRefused when that is not there any more: the process became another program by execve.
        """
        try:
            seen = read_scattered(self.pid, [self._code, *more])
        except TargetRefused:
            seen = [b""]
        if seen[0] != self._fingerprint:
            raise TargetRefused(
                f"process {self.pid} has become another program", "it called execve", "attach anew"
            )
        return seen[1:]

    def _enter_pending(self, tracee: Tracee, slot: Slot) -> _Attempt:
        found = self._resumed(tracee)
        if isinstance(found, str):
            return _Attempt(why=found)
        registers, after, _ = found
        if any(start <= registers.rip < end for start, end in self.python.queue_code):
            return _Attempt(why="the main thread may hold the lock of the pending-call queue")
        call = Call(self._api["Py_AddPendingCall"], (self._api["PyRun_SimpleString"], slot.address))
        image = stack_image(after, tracee.xstate(), tracee.signal_mask(), self.python.restore_rt, [call])
        self._enter(tracee, image)
        return _Attempt(entered=True, why="the main thread is in native code")

    def _enter(self, tracee: Tracee, image: StackImage) -> None:
        write_memory(self.pid, image.address, image.data)
        # In this order: should the tracer die between the two, the call runs with signals open and the frame
        # sets the mask right; the other way round the mask would stay closed.
        tracee.set_registers(image.entry)
        tracee.set_signal_mask(BLOCKED_SIGNALS)

    def _enter_gil(self, tracee: Tracee, slot: Slot) -> _Attempt:
        found = self._resumed(tracee)
        if isinstance(found, str):
            return _Attempt(why=found)
        registers, after, number = found
        if number not in WAITING:
            return _Attempt(why="the main thread just woke up")
        if number == FUTEX and self._in_runtime(registers.rdi):
            return _Attempt(why="the main thread is taking or giving the GIL")
        xstate, mask = tracee.xstate(), tracee.signal_mask()
        held = self._holds_gil(tracee, after, xstate, mask)
        if held is None:
            return _Attempt(why="the thread did not come back from a look at its GIL state")
        if held:
            return _Attempt(why=f"the main thread holds the GIL in system call {WAITING[number]}", final=True)
        calls = [
            Call(self._api["PyGILState_Ensure"]),
            Call(self._api["PyRun_SimpleString"], (slot.address,)),
            # Ensure gives UNLOCKED (1) whenever Check gave 0.
            Call(self._api["PyGILState_Release"], (1,)),
        ]
        self._enter(tracee, stack_image(after, xstate, mask, self.python.restore_rt, calls))
        return _Attempt(entered=True, why="another thread keeps the GIL")

    def _holds_gil(self, tracee: Tracee, after: Registers, xstate: bytes, mask: int) -> bool | None:
        """``PyGILState_Check()`` on the stopped thread; None when the call went wrong and was undone.

        Its result would be lost with the registers that the return restores. So it is made the comparison
        function of POSIX ``lsearch``, which counts its table one up when the comparison is not 0; the table
        and the count are on the borrowed stack.
        """
        table = struct.pack("<QQQQ", 1, 0, 0, 0)
        at = scratch_address(after, len(table))
        call = Call(self._api["lsearch"], (at + 24, at + 8, at, 8, self._api["PyGILState_Check"]))
        image = stack_image(after, xstate, mask, self.python.restore_rt, [call], table)
        self._enter(tracee, image)
        if self._returned(tracee, after):
            return read_memory(self.pid, at, 1) != b"\1"
        if tracee.stopped:
            tracee.drop_fault()
            tracee.set_registers(after)
            tracee.set_xstate(xstate)
            tracee.set_signal_mask(mask)
        return None

    def _returned(self, tracee: Tracee, after: Registers) -> bool:
        """Follow the thread through its signal return; True when it stands at ``after`` again."""
        for expected in (_SIGRETURN, None):
            tracee.resume(to_syscall=True)
            stop = tracee.wait_stop(_STOP_LIMIT_S)
            if stop is None or stop.kind != "syscall":
                return False
            if expected is not None and tracee.registers().orig_rax != expected:
                return False
        now = tracee.registers()
        return (now.rip, now.rsp) == (after.rip, after.rsp)

    def _timed_out(self, progress: _Progress) -> TargetRefused:
        return TargetRefused(
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
        pending_left=progress.queued and progress.route == "gil",
    )
