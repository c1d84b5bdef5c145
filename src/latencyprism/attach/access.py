"""Why a process may not be traced: user, capability, Yama."""

from __future__ import annotations

import os

from ..errors import TargetRefused
from .process import status_fields

CAP_SYS_PTRACE = 19
_YAMA = "/proc/sys/kernel/yama/ptrace_scope"


def has_capability(bit: int) -> bool:
    """True when the effective set of this process holds the capability of that number."""
    return bool(int(status_fields(os.getpid()).get("CapEff", "0"), 16) >> bit & 1)


def yama_scope() -> int | None:
    """0 to 3 as in Documentation/admin-guide/LSM/Yama; None where Yama is not built in."""
    try:
        with open(_YAMA) as file:
            return int(file.read().strip())
    except (OSError, ValueError):
        return None


def owner(pid: int) -> int | None:
    """Real user id of a process; None when it cannot be seen."""
    try:
        return int(status_fields(pid)["Uid"].split()[0])
    except (OSError, KeyError, ValueError):
        return None


def denied(pid: int) -> TargetRefused:
    """The refusal that fits what the kernel would say to a tracer of ``pid``: which rule, and its remedy."""
    what = f"process {pid} may not be traced"
    if has_capability(CAP_SYS_PTRACE):
        return TargetRefused(
            what,
            "the kernel refuses although CAP_SYS_PTRACE is held",
            "run on the host or in the target's user namespace; look at seccomp and LSM rules",
        )
    user = owner(pid)
    if user is not None and user != os.geteuid():
        return TargetRefused(
            what,
            f"it belongs to uid {user}, this is uid {os.geteuid()}, and CAP_SYS_PTRACE is missing",
            "run as the same user, or with CAP_SYS_PTRACE (docker: --cap-add SYS_PTRACE; or sudo)",
        )
    scope = yama_scope()
    if scope:
        return TargetRefused(
            what,
            f"Yama ptrace_scope is {scope} and CAP_SYS_PTRACE is missing",
            "run with CAP_SYS_PTRACE, or have the administrator set kernel.yama.ptrace_scope=0",
        )
    return TargetRefused(
        what,
        "CAP_SYS_PTRACE is missing and the target holds more rights, or is not dumpable",
        "run with CAP_SYS_PTRACE (docker: --cap-add SYS_PTRACE; or sudo)",
    )
