"""Standing back: a process that only the idle CPU runs, so that an engine does not notice it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
from collections.abc import Callable
from pathlib import Path

_IOPRIO_SET = {"x86_64": 251, "aarch64": 30}
_IOPRIO_WHO_PROCESS, _IOPRIO_CLASS_IDLE = 1, 3


def stand_back() -> list[str]:
    """Lower this process as far as the kernel lets it; returns what could not be lowered, in words."""
    refused = []
    attempts = (
        ("nice 19", lambda: os.nice(19)),
        ("SCHED_IDLE", lambda: os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))),
        ("idle disk class", _idle_disk_class),
        # With autogroups, nice counts only inside a session: the session itself must be lowered too.
        ("autogroup 19", lambda: _autogroup(19)),
    )
    for name, attempt in attempts:
        problem = _problem(attempt)
        if problem:
            refused.append(f"{name}: {problem}")
    return refused


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


def _autogroup(nice: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        Path("/proc/self/autogroup").write_text(str(nice))
