"""ptrace(2) of one thread: seize, interrupt, look, change, let go.

Two rules keep a target from being left stopped. All calls are made in a thread of their own
(``in_tracer_thread``), which no KeyboardInterrupt reaches, and when a tracer thread ends, the kernel detaches
whatever it still traces. And no wait is without an end: each has a limit, sleeps between looks, never spins.
"""

from __future__ import annotations

import _thread
import contextlib
import ctypes
import errno
import functools
import gc
import os
import threading
import time
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from ..errors import TargetRefused
from .process import is_running

_libc = ctypes.PyDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
_libc.waitid.argtypes = (ctypes.c_int, ctypes.c_uint, ctypes.c_void_p, ctypes.c_int)
_libc.usleep.argtypes = (ctypes.c_uint,)

_DETACH, _SYSCALL, _CONT = 17, 24, 7
_SEIZE, _INTERRUPT = 0x4206, 0x4207
_GETREGSET, _SETREGSET = 0x4204, 0x4205
_GETSIGMASK, _SETSIGMASK = 0x420A, 0x420B
_GET_RSEQ = 0x420F
_NT_PRSTATUS, _NT_XSTATE = 1, 0x202
_O_TRACESYSGOOD = 1
_EVENT_STOP = 128
_P_PID = 1
_WNOHANG, _WSTOPPED, _WEXITED, _WNOWAIT, _WNOTHREAD, _WALL = 1, 2, 4, 0x1000000, 0x20000000, 0x40000000
_SIGTRAP = 5
_CLD_ENDED = (1, 2, 3)
_FAULTS = (4, 5, 7, 8, 11)
_XSTATE_LIMIT = 65536
_XSTATE_HEADER, _XSTATE_SSE = 512, 2
_MXCSR, _MXCSR_INITIAL = 24, (0x1F80).to_bytes(4, "little")
_PR_SET_TIMERSLACK = 29
_BEGIN_LIMIT_S = 2.0
# Between two looks whether a thread has stopped: microseconds, and for how long they stay like that.
_CLOSE_US, _CLOSEST_LOOKS_S = 20, 0.005
_LESS_CLOSE_US, _CLOSE_LOOKS_S = 60, 0.1
T = TypeVar("T")


class Registers(ctypes.Structure):
    """``struct user_regs_struct`` of x86-64."""

    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in (
            *(
                "r15",
                "r14",
                "r13",
                "r12",
                "rbp",
                "rbx",
                "r11",
                "r10",
                "r9",
                "r8",
                "rax",
                "rcx",
                "rdx",
                "rsi",
                "rdi",
            ),
            *("orig_rax", "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs"),
        )
    )
    r15: int
    r14: int
    r13: int
    r12: int
    rbp: int
    rbx: int
    r11: int
    r10: int
    r9: int
    r8: int
    rax: int
    rcx: int
    rdx: int
    rsi: int
    rdi: int
    orig_rax: int
    rip: int
    cs: int
    eflags: int
    rsp: int
    ss: int
    fs_base: int
    gs_base: int
    ds: int
    es: int
    fs: int
    gs: int

    def copy(self) -> Registers:
        return Registers.from_buffer_copy(self)


class _IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class Stop(NamedTuple):
    """Why the thread stopped: ``kind`` interrupt, syscall, signal or group; ``signal`` the one concerned."""

    kind: str
    signal: int


class Gone(Exception):
    """The traced thread ended while it was traced."""


def in_tracer_thread(work: Callable[[], T]) -> T:
    """Run ``work`` in a thread of its own and hand back its result or its exception.

    The thread ends with ``work``, and with it every tracing it began, whatever happened.
    """
    results: list[T] = []
    errors: list[BaseException] = []
    begun, done = threading.Event(), threading.Event()

    def body() -> None:
        begun.set()
        _libc.prctl(_PR_SET_TIMERSLACK, ctypes.c_ulong(1000))
        # For this thread alone, where permitted: a tracer that loses its processor keeps the target waiting.
        # It works for well under a millisecond and sleeps between its looks, so it starves nobody.
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001  # handed to the caller below
            errors.append(error)
        finally:
            done.set()

    collecting = gc.isenabled()
    gc.disable()
    _has_xsaves()
    try:
        _start_and_wait(body, begun, done)
    finally:
        if collecting:
            gc.enable()
    if errors:
        raise errors[0]
    return results[0]


def _start_and_wait(body: Callable[[], None], begun: threading.Event, done: threading.Event) -> None:
    """Wait for the tracer thread also through KeyboardInterrupt, which is raised when it is done.

    A plain ``_thread``: to start a ``Thread`` takes so much Python that an interrupt often falls into it, and
    its weak references swallow one that falls into them.
    """
    interrupted: BaseException | None = None
    tried = False
    while True:
        try:
            if done.is_set():
                break
            if not tried:
                tried = True
                _thread.start_new_thread(body, ())
            elif not begun.wait(_BEGIN_LIMIT_S):
                break  # the interrupt came before the thread was started
            done.wait()
        except BaseException as error:  # noqa: BLE001  # raised below
            interrupted = error
    if interrupted is not None:
        raise interrupted


class Tracee:
    """One traced thread. Use as a context manager: leaving it detaches."""

    def __init__(self, tid: int) -> None:
        self.tid = tid
        self.seized = False
        self.stopped = False
        self.running_ns = 0
        """When (perf_counter_ns) it was last seen running while a stop was waited for."""
        self._signal = 0
        self._info = ctypes.create_string_buffer(128)
        self._buffer = ctypes.create_string_buffer(_XSTATE_LIMIT)
        # Made beforehand: while the thread stands, nothing is allocated that need not be.
        self._registers, self._mask = Registers(), ctypes.c_uint64()
        self._register_vector = _IoVec(ctypes.addressof(self._registers), ctypes.sizeof(self._registers))

    def __enter__(self) -> Tracee:
        try:
            self._call(_SEIZE, 0, _O_TRACESYSGOOD)
        except TargetRefused:
            # A process on its way out is refused like one that another tracer has.
            if not is_running(self.tid):
                raise Gone from None
            raise
        self.seized = True
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def _call(self, request: int, address: int, data: int) -> int:
        result: int = _libc.ptrace(request, self.tid, address, data)
        if result == -1:
            number = ctypes.get_errno()
            if number == errno.ESRCH:
                raise Gone
            raise _refused(self.tid, number)
        return result

    def rehearse(self) -> None:
        """Make the calls that will be made while the thread stands; running, it refuses them (ESRCH)."""
        for look in (self.registers, self.xstate, self.signal_mask):
            with contextlib.suppress(Gone, TargetRefused):
                look()

    def interrupt(self) -> None:
        """Ask the thread to stop; ``wait_stop`` tells when it has."""
        self._call(_INTERRUPT, 0, 0)

    def wait_stop(self, limit_s: float) -> Stop | None:
        """The next stop, or None when there is none within ``limit_s``. Raises Gone when the thread ended."""
        began = time.perf_counter()
        self.running_ns = time.perf_counter_ns()
        while True:
            now_ns = time.perf_counter_ns()
            stop = self._stop_now()
            if stop is not None:
                self.stopped = True
                return stop
            self.running_ns = now_ns
            waited_s = time.perf_counter() - began
            if waited_s > limit_s:
                return None
            # A stop that is not seen holds the target for nothing, so the looks stay close together; it comes
            # late where the thread has to wait for a processor. Short pauses keep this interpreter's lock: to
            # get it back could take 5 ms.
            if waited_s < _CLOSE_LOOKS_S:
                _libc.usleep(_CLOSE_US if waited_s < _CLOSEST_LOOKS_S else _LESS_CLOSE_US)
            else:
                time.sleep(_LESS_CLOSE_US / 1e6)

    def _stop_now(self) -> Stop | None:
        # Looked at first, taken second: the end of a thread must stay for the parent that waits for it, and
        # a traced thread's stop is reported whatever is asked for.
        if not self._wait_id(_WSTOPPED | _WEXITED | _WNOWAIT):
            return None
        if int.from_bytes(self._info.raw[8:12], "little") in _CLD_ENDED:
            raise Gone
        if not self._wait_id(_WSTOPPED):
            return None
        return self._classify(int.from_bytes(self._info.raw[24:28], "little"))

    def _wait_id(self, wanted: int) -> bool:
        """waitid without waiting; True when ``_info`` holds an event. Raises Gone when the thread is gone."""
        ctypes.memset(self._info, 0, 128)
        if _libc.waitid(_P_PID, self.tid, self._info, _WNOHANG | _WALL | _WNOTHREAD | wanted) == -1:
            if ctypes.get_errno() == errno.EINTR:
                return False
            raise Gone
        return int.from_bytes(self._info.raw[16:20], "little") != 0

    def _classify(self, status: int) -> Stop:
        number, event = status & 0xFF, status >> 8
        if event == _EVENT_STOP:
            return Stop("interrupt" if number == _SIGTRAP else "group", number)
        if number == _SIGTRAP | 0x80:
            return Stop("syscall", 0)
        self._signal = number
        return Stop("signal", number)

    def stop(self, limit_s: float = 0.5) -> Stop | None:
        """Interrupt and wait; a signal that gets in between is delivered first. None when it did not stop."""
        self.interrupt()
        deadline = time.monotonic() + limit_s
        while True:
            stop = self.wait_stop(max(0.0, deadline - time.monotonic()))
            if stop is None or stop.kind != "signal":
                return stop
            self.resume()

    def resume(self, to_syscall: bool = False) -> None:
        """Let the thread run on, with the signal it stopped for; with ``to_syscall`` up to the next call."""
        number, self._signal, self.stopped = self._signal, 0, False
        self._call(_SYSCALL if to_syscall else _CONT, 0, number)

    def drop_fault(self) -> None:
        """Forget the signal of the last stop if it is one the borrowed call itself caused (SEGV, BUS)."""
        if self._signal in _FAULTS:
            self._signal = 0

    def detach(self) -> None:
        """Let go; safe to repeat. A thread that never stopped is let go by the end of the tracer thread."""
        if not self.seized:
            return
        number, self._signal = self._signal, 0
        result = _libc.ptrace(_DETACH, self.tid, 0, number)
        if result == 0 or ctypes.get_errno() == errno.ESRCH:
            self.seized = False

    def _regset(self, request: int, kind: int, address: int, size: int) -> int:
        vector = _IoVec(address, size)
        self._call(request, kind, ctypes.addressof(vector))
        return int(vector.length)

    def registers(self) -> Registers:
        self._call(_GETREGSET, _NT_PRSTATUS, ctypes.addressof(self._register_vector))
        return self._registers.copy()

    def set_registers(self, registers: Registers) -> None:
        vector = _IoVec(ctypes.addressof(registers), ctypes.sizeof(registers))
        self._call(_SETREGSET, _NT_PRSTATUS, ctypes.addressof(vector))

    def xstate(self) -> bytes:
        """x87, SSE, AVX and further state in the uncompacted XSAVE format."""
        where = ctypes.addressof(self._buffer)
        size = self._regset(_GETREGSET, _NT_XSTATE, where, _XSTATE_LIMIT)
        return true_mxcsr(ctypes.string_at(where, size))

    def set_xstate(self, state: bytes) -> None:
        buffer = ctypes.create_string_buffer(state, len(state))
        self._regset(_SETREGSET, _NT_XSTATE, ctypes.addressof(buffer), len(state))

    def signal_mask(self) -> int:
        """Blocked signals, bit n-1 for signal n."""
        self._call(_GETSIGMASK, 8, ctypes.addressof(self._mask))
        return self._mask.value

    def set_signal_mask(self, blocked: int) -> None:
        mask = ctypes.c_uint64(blocked)
        self._call(_SETSIGMASK, 8, ctypes.addressof(mask))

    def rseq_address(self) -> int | None:
        """Where the thread's ``struct rseq`` is; None when it has none or the kernel does not tell."""
        buffer = (ctypes.c_uint64 * 3)()
        if _libc.ptrace(_GET_RSEQ, self.tid, 24, ctypes.cast(buffer, ctypes.c_void_p)) < 0:
            return None
        return int(buffer[0]) or None


def true_mxcsr(state: bytes, compacting: bool | None = None) -> bytes:
    """XSAVE state with the MXCSR that the thread really has.

    XSAVES leaves MXCSR out when the SSE registers are unused and it has its initial value; the kernel hands
    on whatever was in memory then; 0 would unmask every floating-point exception. Intel SDM vol. 1, 13.11:
    with XSAVES, "SSE unused" includes "MXCSR is 1F80H". ``compacting``: whether this processor has it.
    """
    if len(state) < _XSTATE_HEADER + 8 or state[_XSTATE_HEADER] & _XSTATE_SSE:
        return state
    compacting = _has_xsaves() if compacting is None else compacting
    if not compacting and state[_MXCSR : _MXCSR + 4] != bytes(4):
        return state
    return state[:_MXCSR] + _MXCSR_INITIAL + state[_MXCSR + 4 :]


@functools.cache
def _has_xsaves() -> bool:
    with open("/proc/cpuinfo") as file:
        return any(line.startswith("flags") and " xsaves" in line for line in file)


def _refused(pid: int, number: int) -> TargetRefused:
    if number in (errno.EPERM, errno.EACCES):
        return TargetRefused(
            f"process {pid} may not be traced",
            "the kernel refuses: another tracer, missing rights, or a seccomp filter",
            "run as its owner or with CAP_SYS_PTRACE, and end other tracers",
        )
    return TargetRefused(f"tracing process {pid} failed", os.strerror(number))
