"""Standing back: lowering the writing process so that an engine does not notice it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
from collections.abc import Callable
from pathlib import Path

_IOPRIO_SET = {"x86_64": 251, "aarch64": 30}
_IOPRIO_WHO_PROCESS, _IOPRIO_CLASS_IDLE = 1, 3


def step_aside(nice: int = 10) -> list[str]:
    """Lower this process to ``nice``: it gets some CPU next to engines that spin on every core. Returns what
    could not be lowered, in words."""
    nice = max(nice, os.getpriority(os.PRIO_PROCESS, 0))
    # With autogroups, nice counts only inside a session: the session itself must be lowered too.
    return _refused(
        (f"nice {nice}", lambda: os.setpriority(os.PRIO_PROCESS, 0, nice)), ("autogroup", _autogroup(nice))
    )


def stand_back() -> list[str]:
    """Lower this process as far as the kernel lets it: it runs when nobody else wants to, be that late."""
    return _refused(
        ("nice 19", lambda: os.setpriority(os.PRIO_PROCESS, 0, 19)),
        ("SCHED_IDLE", lambda: os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))),
        ("idle disk class", _idle_disk_class),
        ("autogroup", _autogroup(19)),
    )


def come_forward(pid: int) -> list[str]:
    """Undo it for process ``pid``: someone waits for it. Needs privilege for some of it."""
    return _refused(
        ("SCHED_OTHER", lambda: os.sched_setscheduler(pid, os.SCHED_OTHER, os.sched_param(0))),
        ("nice 0", lambda: os.setpriority(os.PRIO_PROCESS, pid, 0)),
        ("autogroup", _autogroup(0, str(pid))),
    )


def _refused(*attempts: tuple[str, Callable[[], object]]) -> list[str]:
    problems = [(name, _problem(attempt)) for name, attempt in attempts]
    return [f"{name}: {problem}" for name, problem in problems if problem]


def _problem(attempt: Callable[[], object]) -> str | None:
    try:
        attempt()
    except OSError as error:
        return error.strerror or str(error)
    return None


def _idle_disk_class() -> None:
    number = _IOPRIO_SET.get(platform.machine())
    if number is None:
        raise OSError(0, "not known on this machine")
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(number, _IOPRIO_WHO_PROCESS, 0, _IOPRIO_CLASS_IDLE << 13) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def _autogroup(nice: int, pid: str = "self") -> Callable[[], None]:
    def write() -> None:
        if pid == "self" and os.getsid(0) != os.getpid():
            return  # a session that is somebody else's, a shell's for instance, stays as it is
        with contextlib.suppress(FileNotFoundError):
            Path(f"/proc/{pid}/autogroup").write_text(str(nice))

    return write
