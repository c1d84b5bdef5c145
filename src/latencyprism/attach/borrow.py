"""One stop of the main thread: borrow it for a call, or see why it is not to be borrowed now.

The rules of safety are all here: which points of the thread's life are left alone, that the target needs no
tracer any more once it is let go, and that it is let go whatever happens.
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
import time
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import TargetRefused
from .frame import BLOCKED_SIGNALS, Call, StackImage, scratch_address, stack_image
from .interpreter import PythonInfo
from .memory import Look, ProcessGone, read_memory, write_memory
from .ptrace import Gone, Registers, Tracee, in_tracer_thread
from .syscalls import FUTEX, WAITING, interrupted, resumed

_STOP_LIMIT_S = 0.5
_STACK_REACH = 64 << 20
_SIGRETURN = 15
_FINGERPRINT_BYTES = 64
_USER_CODE_64 = 0x33
# `mov $number, %eax; syscall`
_SYSCALL_BYTES = 7
# More than the XSAVE state of any processor without AMX in use.
_XSTATE_LOOK = 4096


@dataclass(slots=True)
class Attempt:
    """One stop: ``entered`` when the call was begun, else ``why`` not; ``final``: trying again is no use.

    ``stop_us`` from the request to stop until the thread was let go; ``held_us`` the part in which it stood,
    at most: from when it was last seen running.
    """

    entered: bool = False
    why: str = ""
    final: bool = False
    stop_us: float = 0.0
    held_us: float = 0.0


class _Place(NamedTuple):
    """``registers`` at the stop, ``after`` to return to, ``number`` of the interrupted system call if any."""

    registers: Registers
    after: Registers
    number: int | None


class Borrower:
    """Stops the main thread of one prepared target and makes it call what a route calls.

    Raises TargetRefused when the target has no main stack in its map.
    """

    def __init__(self, python: PythonInfo) -> None:
        self.python = python
        self.pid = python.identity.pid
        self.identity = python.identity
        self._api = python.addresses
        ends = [one.end for one in python.maps if one.path == "[stack]"]
        if not ends:
            raise TargetRefused(
                f"process {self.pid} cannot be attached to",
                "its main stack is not to be found",
                "use eBPF and host signals for it",
            )
        self._stack_end = ends[0]
        self._code = (self._api["Py_AddPendingCall"], _FINGERPRINT_BYTES)
        self._fingerprint = read_memory(self.pid, *self._code)
        # The code to be called, that before the instruction pointer, and the thread's restartable sequence.
        self._look = Look(self.pid, (_FINGERPRINT_BYTES, _SYSCALL_BYTES, 8))
        self._rseq: int | None = None

    def attempt(self, route: str, text: int | bytes) -> Attempt:
        """One stop on ``route``: ``pending`` for the zero-ended text at address ``text`` of the target, or
        ``gil`` for the text itself, which is then laid on the borrowed stack.

        Raises Gone when the target ended, TargetRefused when it cannot be traced or is stopped by a signal.
        """
        if isinstance(text, bytes):
            enter = functools.partial(self._enter_gil, text=text)
        else:
            enter = functools.partial(self._enter_pending, text=text)

        def work() -> Attempt:
            self._rehearse()
            asked = time.perf_counter_ns()
            with Tracee(self.pid) as tracee:
                # From here on the pid cannot become another process.
                if not self.identity.alive():
                    raise Gone
                tracee.rehearse()
                stop = tracee.stop(_STOP_LIMIT_S)
                if stop is None:
                    attempt = Attempt(why="the main thread does not stop (uninterruptible wait)")
                elif stop.kind == "group":
                    raise TargetRefused(
                        f"process {self.pid} is stopped", "a stop signal holds it", f"kill -CONT {self.pid}"
                    )
                else:
                    attempt = enter(tracee)
            now = time.perf_counter_ns()
            attempt.stop_us, attempt.held_us = (now - asked) / 1e3, (now - tracee.running_ns) / 1e3
            return attempt

        return in_tracer_thread(work)

    def _rehearse(self) -> None:
        """Do once, on made-up values, what will be done while the target stands: the first time of anything
        takes several times as long (pages, caches, specialised bytecode)."""
        self.same_program()
        made_up = Registers()
        made_up.rsp, made_up.rip, made_up.cs = (
            self._stack_end - _STACK_REACH // 2,
            self._code[0],
            _USER_CODE_64,
        )
        here = ctypes.create_string_buffer(_XSTATE_LOOK)
        call = Call(self._api["Py_AddPendingCall"], (self._api["PyRun_SimpleString"], 0))
        after = resumed(made_up, bytes(7)) or made_up
        image = stack_image(after, here.raw, 0, self.python.restore_rt, [call])
        if len(image.data) <= len(here):
            write_memory(os.getpid(), ctypes.addressof(here), image.data)

    def in_runtime(self, address: int) -> bool:
        """True for a futex of the interpreter itself: the thread is just taking or giving the GIL.

        To take the GIL once more there would wait on the same condition variable twice in one thread, and the
        wake-up meant for the inner wait can go to the outer one, which cannot act on it.
        """
        return self.python.runtime[0] <= address < self.python.runtime[1]

    def _resumed(self, tracee: Tracee) -> _Place | str:
        """Where the thread stands and how it goes on, or why it is not to be borrowed now."""
        registers = tracee.registers()
        if not self._stack_end - _STACK_REACH < registers.rsp < self._stack_end:
            return "the main thread is on another stack"
        if registers.cs != _USER_CODE_64:
            return "the main thread runs 32-bit code"
        if self._rseq is None:
            # The C library registers it once, when the thread starts.
            self._rseq = tracee.rseq_address() or 0
        code, sequence = self._look_at(registers.rip - _SYSCALL_BYTES)
        after = resumed(registers, code)
        if after is None:
            return "the main thread is in a sleep that cannot be resumed exactly"
        if self._rseq and any(sequence):
            return "the main thread is in a restartable sequence"
        return _Place(registers, after, interrupted(registers, code))

    def same_program(self) -> None:
        """Raises TargetRefused when the process has become another program by execve, Gone when it ended."""
        self._look_at(self._code[0])

    def _look_at(self, address: int) -> tuple[bytes, bytes]:
        """The bytes of a system call's code at ``address`` and the thread's rseq_cs, with one look at the
        code that is to be called. Raises as ``same_program``."""
        # rseq_cs is at 8; without a restartable sequence of its own the code is simply looked at twice.
        sequence = self._rseq + 8 if self._rseq else self._code[0]
        try:
            seen = self._look.at(self._code[0], address, sequence)
        except ProcessGone:
            raise Gone from None
        except TargetRefused:
            seen = [b"", b"", b""]
        if seen[0] != self._fingerprint:
            raise TargetRefused(
                f"process {self.pid} has become another program", "it called execve", "attach anew"
            )
        return seen[1], seen[2]

    def _enter_pending(self, tracee: Tracee, text: int) -> Attempt:
        found = self._resumed(tracee)
        if isinstance(found, str):
            return Attempt(why=found)
        registers, after, number = found
        # Asleep in a futex it waits for some lock and does not hold the queue's: nothing is waited for while
        # that is held. An engine loop that waits for its worker's result is mostly asleep like this.
        if number != FUTEX and any(start <= registers.rip < end for start, end in self.python.queue_code):
            return Attempt(why="the main thread may hold the lock of the pending-call queue")
        call = Call(self._api["Py_AddPendingCall"], (self._api["PyRun_SimpleString"], text))
        image = stack_image(after, tracee.xstate(), tracee.signal_mask(), self.python.restore_rt, [call])
        self._enter(tracee, image)
        return Attempt(entered=True, why="the main thread is in native code")

    def _enter(self, tracee: Tracee, image: StackImage) -> None:
        write_memory(self.pid, image.address, image.data)
        # In this order: should the tracer die between the two, the call runs with signals open and the frame
        # sets the mask right; the other way round the mask would stay closed.
        tracee.set_registers(image.entry)
        tracee.set_signal_mask(BLOCKED_SIGNALS)

    def _enter_gil(self, tracee: Tracee, text: bytes) -> Attempt:
        found = self._resumed(tracee)
        if isinstance(found, str):
            return Attempt(why=found)
        registers, after, number = found
        if number not in WAITING:
            return Attempt(why="the main thread just woke up")
        if number == FUTEX and self.in_runtime(registers.rdi):
            return Attempt(why="the main thread is taking or giving the GIL")
        xstate, mask = tracee.xstate(), tracee.signal_mask()
        held = self._holds_gil(tracee, after, xstate, mask)
        if held is None:
            return Attempt(why="the thread did not come back from a look at its GIL state")
        if held:
            why = f"the main thread holds the GIL in system call {WAITING[number]}"
            return Attempt(why=f"{why}, or sub-interpreters are in use", final=True)
        data = text + b"\0"
        calls = [
            Call(self._api["PyGILState_Ensure"]),
            Call(self._api["PyRun_SimpleString"], (scratch_address(after, len(data)),)),
            # Ensure gives UNLOCKED (1) whenever Check gave 0.
            Call(self._api["PyGILState_Release"], (1,)),
        ]
        self._enter(tracee, stack_image(after, xstate, mask, self.python.restore_rt, calls, data))
        return Attempt(entered=True, why="another thread keeps the GIL")

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
