"""What this session weighs where the kernel takes sessions for groups (automatic grouping)."""

from __future__ import annotations

import re

_ENABLED, _OWN = "/proc/sys/kernel/sched_autogroup_enabled", "/proc/self/autogroup"


def session_nice(enabled: str = _ENABLED, own: str = _OWN) -> int | None:
    """The nice value of this session's group, -20 to 19; None where the kernel does not group so.

    A process's own nice value counts within its group alone: beside a session of the usual weight, one of
    nice 19 gets about one part in seventy of a core that both want."""
    try:
        with open(enabled, encoding="ascii", errors="replace") as file:
            if file.read(8).strip() != "1":
                return None
        with open(own, encoding="ascii", errors="replace") as file:
            found = re.fullmatch(r"/autogroup-\d+ nice (-?\d{1,2})\s*", file.read(80))
    except OSError:
        return None
    return int(found[1]) if found is not None else None
