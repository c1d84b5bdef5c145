"""Holds a process back and always lets it go: ``python -E -s -S holder.py SPEC`` with SPEC a JSON object.

Two processes: the *actor* does it, its parent, the *keeper*, undoes it when the actor is gone for whatever
reason. The actor ends at ``until_ns`` (CLOCK_MONOTONIC), when standard input closes (the injector is gone)
or when the keeper is gone, and undoes it too. Undoing twice does no harm. Both have sessions of their own, so
that no signal to a process group reaches both.

``kind``: ``stop`` sends SIGSTOP for ``stop_ns`` every ``every_ns`` through ``pidfd``; ``group`` puts the
process into the control group ``directory`` until the end, then back into ``home``; ``narrow`` lets all its
threads run on ``cpus`` alone for ``narrow_ns`` every ``every_ns``, then where each was allowed before;
``clock`` and ``power`` lower an NVIDIA device's highest clock or power limit to ``left`` of what it was.

One JSON line per stop, per stay in the group, and at the end of narrowing and of a setting.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import time
from types import FrameType
from typing import Any

Spec = dict[str, Any]

LOOK_S = 0.01
FIRST_NS = 500_000_000
"""The first stop comes no later than this after the start."""


class Stop:
    def __init__(self, spec: Spec) -> None:
        self.pidfd, self.pid = spec["pidfd"], spec["pid"]
        self.stop_ns, self.every_ns = spec["stop_ns"], spec["every_ns"]

    def state(self) -> str:
        try:
            with open(f"/proc/{self.pid}/stat", "rb") as file:
                data = file.read()
            return data[data.rfind(b")") + 2 : data.rfind(b")") + 3].decode()
        except OSError:
            return "X"

    def undo(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGCONT)

    def act(self, bounds: Bounds) -> None:
        next_ns = time.monotonic_ns() + min(self.every_ns // 2, FIRST_NS)
        while bounds.wait_until(next_ns):
            begun_ns = time.monotonic_ns()
            try:
                signal.pidfd_send_signal(self.pidfd, signal.SIGSTOP)
                goes_on = bounds.wait_until(begun_ns + self.stop_ns)
                state = self.state()
            finally:
                self.undo()
            say(begun_ns=begun_ns, ended_ns=time.monotonic_ns(), stopped=state == "T")
            if not goes_on:
                return
            next_ns += self.every_ns


class Group:
    def __init__(self, spec: Spec) -> None:
        self.pid, self.directory, self.home = spec["pid"], spec["directory"], spec["home"]

    def undo(self) -> None:
        """All members go home, what the target started meanwhile included; then the group goes."""
        for _ in range(50):
            try:
                with open(os.path.join(self.directory, "cgroup.procs")) as file:
                    members = file.read().split()
            except FileNotFoundError:
                return
            for member in members:
                with contextlib.suppress(OSError), open(os.path.join(self.home, "cgroup.procs"), "w") as file:
                    file.write(member)
            with contextlib.suppress(OSError):
                os.rmdir(self.directory)
                return
            time.sleep(0.02)

    def act(self, bounds: Bounds) -> None:
        begun_ns = time.monotonic_ns()
        with open(os.path.join(self.directory, "cgroup.procs"), "w") as file:
            file.write(str(self.pid))
        bounds.wait_until(bounds.until_ns)
        statistics = {}
        with contextlib.suppress(OSError), open(os.path.join(self.directory, "cpu.stat")) as file:
            statistics = {key: int(value) for key, value in (line.split() for line in file)}
        spent = statistics.get("throttled_time", statistics.get("throttled_usec", 0) * 1000)
        ended_ns = time.monotonic_ns()
        say(
            begun_ns=begun_ns,
            ended_ns=ended_ns,
            periods=statistics.get("nr_throttled", 0),
            throttled_ns=spent,
        )


class Narrow:
    """``before``: thread id and the CPUs that it may use, as it was at the start; a thread that has begun
    since gets what its process's main thread has."""

    def __init__(self, spec: Spec) -> None:
        self.pid, self.cpus = spec["pid"], set(spec["cpus"])
        self.narrow_ns, self.every_ns = spec["narrow_ns"], spec["every_ns"]
        self.before = {int(tid): set(cpus) for tid, cpus in spec["before"].items()}

    def threads(self) -> list[int]:
        try:
            return [int(name) for name in os.listdir(f"/proc/{self.pid}/task")]
        except OSError:
            return []

    def waited_ns(self) -> int:
        """Run-queue wait of all threads."""
        total = 0
        for tid in self.threads():
            with (
                contextlib.suppress(OSError, IndexError),
                open(f"/proc/{self.pid}/task/{tid}/schedstat") as file,
            ):
                total += int(file.read().split()[1])
        return total

    def undo(self) -> None:
        for tid in self.threads():
            with contextlib.suppress(OSError):
                if os.sched_getaffinity(tid) == self.cpus:
                    os.sched_setaffinity(tid, self.before.get(tid, self.before[self.pid]))

    def act(self, bounds: Bounds) -> None:
        begun_ns = next_ns = time.monotonic_ns()
        waited_ns, rounds, goes_on = 0, 0, True
        while goes_on:
            before_ns = self.waited_ns()
            for tid in self.threads():
                with contextlib.suppress(OSError):
                    os.sched_setaffinity(tid, self.cpus)
            try:
                goes_on = bounds.wait_until(time.monotonic_ns() + self.narrow_ns)
            finally:
                if self.narrow_ns < self.every_ns or not goes_on:
                    self.undo()
            waited_ns += self.waited_ns() - before_ns
            rounds += 1
            next_ns = max(next_ns + self.every_ns, time.monotonic_ns())
            goes_on = goes_on and bounds.wait_until(next_ns)
        say(begun_ns=begun_ns, ended_ns=time.monotonic_ns(), waited_ns=waited_ns, rounds=rounds)


class Setting:
    """Of ``device``, by the management library, which does not tell locked clocks: back means unlocked."""

    def __init__(self, spec: Spec) -> None:
        import ctypes  # dear to load, and for nobody else

        self.c, self.kind, self.left = ctypes, spec["kind"], spec["left"]
        self.lib, self.handle = ctypes.CDLL(spec["library"]), ctypes.c_void_p()
        self.must("nvmlInit_v2")
        self.must("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(spec["device"]), ctypes.byref(self.handle))
        self.before = self.limit()

    def must(self, name: str, *arguments: Any) -> None:
        code = getattr(self.lib, name)(*arguments)
        if code:
            raise OSError(code, f"{name} says {code}")

    def number(self, name: str, *arguments: Any) -> int:
        value = self.c.c_uint()
        self.must(name, self.handle, *arguments, self.c.byref(value))
        return int(value.value)

    def limit(self) -> int:
        """The highest clock in MHz, or the power limit in mW."""
        if self.kind == "clock":
            return self.number("nvmlDeviceGetMaxClockInfo", self.c.c_int(1))
        return self.number("nvmlDeviceGetPowerManagementLimit")

    def set(self, value: int) -> None:
        if self.kind == "clock":
            least = self.c.c_uint(min(210, value))
            self.must("nvmlDeviceSetGpuLockedClocks", self.handle, least, self.c.c_uint(value))
        else:
            self.must("nvmlDeviceSetPowerManagementLimit", self.handle, self.c.c_uint(value))

    def now(self) -> int:
        if self.kind == "clock":
            return self.number("nvmlDeviceGetClockInfo", self.c.c_int(1))
        return self.limit()

    def undo(self) -> None:
        with contextlib.suppress(OSError):
            if self.kind == "clock":
                self.must("nvmlDeviceResetGpuLockedClocks", self.handle)
            else:
                self.set(self.before)

    def act(self, bounds: Bounds) -> None:
        asked = int(self.before * self.left)
        begun_ns = time.monotonic_ns()
        self.set(asked)
        bounds.wait_until(bounds.until_ns - 20_000_000)
        now, unit = self.now(), "MHz" if self.kind == "clock" else "mW"
        say(
            begun_ns=begun_ns,
            ended_ns=time.monotonic_ns(),
            before=self.before,
            now=now,
            asked=asked,
            unit=unit,
        )


class Bounds:
    def __init__(self, until_ns: int, keeper: int) -> None:
        self.until_ns, self.keeper = until_ns, keeper

    def wait_until(self, moment_ns: int) -> bool:
        """Waits; False as soon as it is time to end altogether."""
        while True:
            now_ns = time.monotonic_ns()
            if now_ns >= self.until_ns or os.getppid() != self.keeper:
                return False
            if now_ns >= moment_ns:
                return True
            left_s = (min(moment_ns, self.until_ns) - now_ns) / 1e9
            # Nothing is ever written to standard input: readable means closed.
            if select.select([0], [], [], min(left_s, LOOK_S))[0]:
                return False


Harm = Stop | Group | Narrow | Setting
KINDS: dict[str, type[Stop] | type[Group] | type[Narrow] | type[Setting]] = {
    "stop": Stop,
    "group": Group,
    "narrow": Narrow,
    "clock": Setting,
    "power": Setting,
}


def say(**fields: object) -> None:
    """Never blocks: a full pipe must not keep a target stopped."""
    with contextlib.suppress(OSError):
        os.write(1, (json.dumps(fields) + "\n").encode())


def act(spec: Spec, harm: Harm, keeper: int) -> None:
    os.setsid()

    def leave(_number: int, _frame: FrameType | None) -> None:
        raise SystemExit(0)

    signal.signal(signal.SIGTERM, leave)
    try:
        harm.act(Bounds(spec["until_ns"], keeper))
    except OSError as error:
        say(error=f"{error.strerror}: {error.filename or ''}")
    finally:
        harm.undo()


def keep(spec: Spec, harm: Harm, actor: int) -> None:
    """Waits for the actor, a second longer than it may take, then undoes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        while os.waitpid(actor, os.WNOHANG)[0] == 0:
            if time.monotonic_ns() > spec["until_ns"] + 1_000_000_000:
                os.kill(actor, signal.SIGKILL)
                os.waitpid(actor, 0)
                break
            time.sleep(LOOK_S)
    finally:
        harm.undo()


def main() -> None:
    spec = json.loads(sys.argv[1])
    os.set_blocking(1, False)
    with contextlib.suppress(OSError):
        # To be on time although the machine is busy; it sleeps nearly always.
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(2))
    try:
        harm = KINDS[spec["kind"]](spec)
    except (OSError, AttributeError) as error:  # a library that is not there, or that refuses
        say(error=str(error)[:300])
        return
    keeper = os.getpid()
    actor = os.fork()
    if actor == 0:
        act(spec, harm, keeper)
    else:
        keep(spec, harm, actor)


if __name__ == "__main__":
    main()
