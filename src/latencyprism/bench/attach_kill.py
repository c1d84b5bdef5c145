"""The tracer is killed while it attaches, again and again: does the target go on as if nothing had been?

Each time a forked copy of this process attaches and is killed (SIGKILL) by a timer of the kernel at a random
moment of the attempt; one in four kills itself exactly between setting the registers and the signal mask.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import signal
import struct
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from latencyprism.attach import borrow
from latencyprism.attach.inject import Injector
from latencyprism.attach.memory import write_memory
from latencyprism.attach.process import read_process
from latencyprism.attach.ptrace import Tracee
from latencyprism.bench.attach_stand_in import StandIn
from latencyprism.errors import TargetRefused

STAGES = (
    "before the stop",
    "asked to stop",
    "stopped, looking",
    "stack written",
    "registers set",
    "signal mask set",
    "let go",
)
_LOOKING, _WRITTEN, _REGISTERS, _MASK, _LET_GO = 2, 3, 4, 5, 6
_TEXT = "pass\n"
_MEASURED = 10
_ATTEMPT_S = 5.0
_CLOCK_MONOTONIC = 1


class _Event(ctypes.Structure):
    """``struct sigevent`` with SIGEV_SIGNAL."""

    _fields_ = (
        ("value", ctypes.c_void_p),
        ("signal", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("rest", ctypes.c_char * 48),
    )


def _die_in(delay_s: float) -> None:
    """Have the kernel kill this process after ``delay_s``."""
    libc = ctypes.CDLL(None, use_errno=True)
    timer = ctypes.c_void_p()
    event = _Event(signal=signal.SIGKILL, notify=0)
    spec = (ctypes.c_long * 4)(0, 0, int(delay_s), max(1, int(delay_s % 1 * 1e9)))
    made = libc.timer_create(_CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(timer))
    if made or libc.timer_settime(timer, 0, spec, None):
        os.kill(os.getpid(), signal.SIGKILL)


class _Tale:
    """How far an attempt has come, told through memory that outlives the one who attempts it."""

    def __init__(self) -> None:
        self._shared = mmap.mmap(-1, mmap.PAGESIZE)

    @property
    def stage(self) -> int:
        return self._shared[0]

    @stage.setter
    def stage(self, value: int) -> None:
        self._shared[0] = value

    @property
    def length_s(self) -> float:
        seconds: float = struct.unpack_from("<d", self._shared, 8)[0]
        return seconds

    @length_s.setter
    def length_s(self, value: float) -> None:
        struct.pack_into("<d", self._shared, 8, value)

    def listen(self, die_at_entry: int) -> None:
        """Make the tracing of this process tell its stages, and die right after it has set the registers for
        the entry of that number (0: never). For a forked copy only: it is not undone."""
        entries = 0
        whole = {name: getattr(Tracee, name) for name in ("interrupt", "registers", "detach", "resume")}
        set_registers, set_mask, write = Tracee.set_registers, Tracee.set_signal_mask, write_memory

        def after(name: str, stage: int) -> Callable[..., Any]:
            def told(*args: Any, **kwargs: Any) -> Any:
                result = whole[name](*args, **kwargs)
                self.stage = stage
                return result

            return told

        def written(pid: int, address: int, data: bytes) -> None:
            write(pid, address, data)
            if pid != os.getpid():
                self.stage = _WRITTEN

        def registers_set(tracee: Tracee, registers: Any) -> None:
            nonlocal entries
            set_registers(tracee, registers)
            self.stage = _REGISTERS
            entries += 1
            if entries == die_at_entry:
                os.kill(os.getpid(), signal.SIGKILL)

        def mask_set(tracee: Tracee, blocked: int) -> None:
            set_mask(tracee, blocked)
            self.stage = _MASK

        Tracee.interrupt = after("interrupt", 1)  # type: ignore[method-assign]
        Tracee.registers = after("registers", _LOOKING)  # type: ignore[method-assign]
        Tracee.detach = after("detach", _LET_GO)  # type: ignore[method-assign]
        Tracee.set_registers = registers_set  # type: ignore[assignment,method-assign]
        Tracee.set_signal_mask = mask_set  # type: ignore[assignment,method-assign]
        # What is rehearsed is no stage.
        Tracee.rehearse = lambda tracee: None  # type: ignore[assignment,method-assign]
        borrow.write_memory = written  # type: ignore[attr-defined]


def run(python: str, kills: int, seed: int, *, idle: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """Kill ``kills`` attempts on a stand-in on ``python``: at work, or with ``idle`` resting in a wait.

    Raises PrismError when it does not start, TargetRefused when it cannot be attached to.
    """
    chance, tale = random.Random(seed), _Tale()
    stages: Counter[str] = Counter()
    survived = 0
    with StandIn(python) as target:
        target.rest(idle)
        time.sleep(0.2)
        usual_s = _usual_length_s(target.pid, tale, idle)
        for number in range(kills):
            # In a wait the thread is entered twice: for the look at its GIL state, and for the text.
            between = (1 + number // 4 % 2 if idle else 1) if number % 4 == 3 else 0
            tale.stage = 0
            _attempt_and_die(target.pid, tale, chance.uniform(0.0, 1.2 * usual_s), between, idle)
            stages[STAGES[tale.stage]] += 1
            if not _goes_on(target):
                break
            survived += 1
            if number % 50 == 49:
                say(f"{number + 1} killed, {survived} survived")
        told = target.finish()
    return {
        "path": "the main thread waits" if idle else "the main thread is at work",
        "kills": sum(stages.values()),
        "survived": survived,
        "wrong": None if told is None else told["wrong"],
        "between_registers_and_mask": stages[STAGES[_REGISTERS]],
        "died": {stage: stages[stage] for stage in STAGES if stages[stage]},
        "attempt_us": round(usual_s * 1e6),
    }


def _usual_length_s(pid: int, tale: _Tale, idle: bool) -> float:
    """Of an attempt by a forked copy, whose first touch of every page makes it slower."""
    lengths = []
    for _ in range(_MEASURED):
        injector = Injector(pid)
        child = os.fork()
        if child == 0:
            try:
                tale.listen(0)
                tale.length_s = _attempt(injector, idle)
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        lengths.append(tale.length_s)
    return sorted(lengths)[_MEASURED // 2]


def _attempt(injector: Injector, idle: bool, arm: Callable[[], None] = lambda: None) -> float:
    """One stop (or request) on the route that fits, ``arm`` called right before it; how long it took, in
    seconds.

    Whether it got in does not matter here."""
    slot = None if idle or injector._remote is not None else injector._slots[0]
    began = time.perf_counter()
    with suppress(TargetRefused):
        if slot is not None:
            slot.put(_TEXT.encode())
        arm()
        began = time.perf_counter()
        if idle:
            injector._tracer.attempt("gil", _TEXT.encode())
        elif injector._remote is not None:
            injector._remote.request(_TEXT.encode())
        elif slot is not None:
            injector._tracer.attempt("pending", slot.address)
    length = time.perf_counter() - began
    time.sleep(0.002)
    with suppress(TargetRefused):
        if slot is not None:
            slot.clear()
        elif injector._remote is not None:
            injector._remote.withdraw()
    return length


def _attempt_and_die(pid: int, tale: _Tale, delay_s: float, between: int, idle: bool) -> None:
    injector = Injector(pid)
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    try:
        tale.listen(between)
        _attempt(injector, idle, (lambda: None) if between else (lambda: _die_in(delay_s)))
        if between:
            # It was turned away before it came so far (the thread was at a point that is left alone).
            until = time.monotonic() + _ATTEMPT_S
            while time.monotonic() < until:
                _attempt(injector, idle)
        time.sleep(_ATTEMPT_S)
    finally:
        os._exit(0)


def _goes_on(target: StandIn) -> bool:
    if not target.gets_on():
        return False
    with suppress(TargetRefused):
        now = read_process(target.pid)
        return now.tracer_pid == 0 and now.state not in "tT"
    return False
