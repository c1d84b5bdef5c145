"""Processes as /proc shows them: who they are, whose children they are, and whether they still are."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass

from ..errors import TargetRefused

# A pid is an int of at most 2**22 on Linux; anything else a person types is refused before /proc is asked.
PID_LIMIT = 1 << 22


@dataclass(frozen=True, slots=True)
class Identity:
    """One process and no other: pids are used again, a pid with its start (clock ticks since boot) is not."""

    pid: int
    start_ticks: int

    def alive(self) -> bool:
        """True while this very process runs; a zombie, a reused pid and a vanished one are all False."""
        try:
            fields = _stat_fields(self.pid)
        except (OSError, ValueError):
            return False
        return fields.start_ticks == self.start_ticks and fields.state not in "ZXx"


@dataclass(frozen=True, slots=True)
class ProcessInfo:
    """What /proc says of one process at one moment.

    ``uid`` is the effective one; ``exe`` is None where reading it is not permitted or there is none (kernel
    threads); ``ns_pid`` is the pid inside the innermost pid namespace; ``root`` is the path under which the
    files of its mount namespace are found; ``tracer_pid`` is 0 when nobody traces it.
    """

    identity: Identity
    ppid: int
    uid: int
    comm: str
    cmdline: list[str]
    exe: str | None
    state: str
    ns_pid: int
    root: str
    tracer_pid: int
    start_ticks: int

    @property
    def pid(self) -> int:
        return self.identity.pid


@dataclass(frozen=True, slots=True)
class _Stat:
    comm: str
    state: str
    ppid: int
    start_ticks: int


def _read(path: str, limit: int = 1 << 20) -> bytes:
    with open(path, "rb") as file:
        return file.read(limit)


def printable(raw: bytes) -> str:
    """Text of another process with every control character made harmless for a terminal."""
    text = raw.decode("utf-8", "replace")
    return "".join(char if char.isprintable() else "?" for char in text)


def parse_stat(raw: bytes) -> tuple[str, str, int, int]:
    """``/proc/PID/stat`` -> (comm, state, ppid, start time in ticks). ``comm`` may hold spaces and brackets.

    Raises ValueError when the line is not one of the kernel's.
    """
    opening, closing = raw.find(b"("), raw.rfind(b")")
    fields = raw[closing + 1 :].split()
    if opening < 0 or closing < opening or len(fields) < 20:
        raise ValueError("not a stat line")
    return printable(raw[opening + 1 : closing]), fields[0].decode("ascii"), int(fields[1]), int(fields[19])


def _stat_fields(pid: int) -> _Stat:
    return _Stat(*parse_stat(_read(f"/proc/{pid}/stat")))


def is_running(pid: int) -> bool:
    """False for a pid that is free, a zombie or on its way out."""
    try:
        return _stat_fields(pid).state not in "ZXx"
    except (OSError, ValueError):
        return False


def parse_cmdline(raw: bytes) -> list[str]:
    """Arguments of a process. One that renamed itself (setproctitle) leaves its title and then padding."""
    parts = raw.rstrip(b"\0 ").split(b"\0")
    return [printable(part) for part in parts] if parts != [b""] else []


def status_fields(pid: int) -> dict[str, str]:
    """The lines of ``/proc/PID/status`` by name. Raises OSError."""
    lines = _read(f"/proc/{pid}/status").decode("utf-8", "replace").splitlines()
    return {name: value.strip() for name, sep, value in (line.partition(":") for line in lines) if sep}


def check_pid(pid: int) -> None:
    """Refuse what cannot be a process id before it becomes part of a path."""
    if isinstance(pid, bool) or not isinstance(pid, int) or not 0 < pid <= PID_LIMIT:
        raise TargetRefused(
            "no such process", f"{pid!r} is not a process id", "give the pid of a running process"
        )


def read_process(pid: int) -> ProcessInfo:
    """Look at one process. Raises TargetRefused when there is none, also when it vanishes meanwhile."""
    check_pid(pid)
    try:
        return _read_process(pid)
    except (FileNotFoundError, ProcessLookupError):
        raise TargetRefused(
            f"process {pid} is gone", "there is no such pid", "list the running processes"
        ) from None
    except PermissionError:
        raise TargetRefused(
            f"process {pid} cannot be read", "/proc hides it from this user", "run as root or as its owner"
        ) from None
    except (OSError, ValueError) as error:
        raise TargetRefused(f"process {pid} cannot be read", str(error)) from None


def _read_process(pid: int) -> ProcessInfo:
    before = _stat_fields(pid)
    status = status_fields(pid)
    cmdline = parse_cmdline(_read(f"/proc/{pid}/cmdline"))
    try:
        exe: str | None = os.readlink(f"/proc/{pid}/exe")
    except (PermissionError, FileNotFoundError):
        exe = None
    after = _stat_fields(pid)
    if after.start_ticks != before.start_ticks:
        raise ProcessLookupError(pid)
    return ProcessInfo(
        identity=Identity(pid, after.start_ticks),
        ppid=after.ppid,
        uid=int(status["Uid"].split()[1]) if "Uid" in status else -1,
        comm=after.comm,
        cmdline=cmdline,
        exe=exe,
        state=after.state,
        ns_pid=int(status.get("NSpid", str(pid)).split()[-1]),
        root=f"/proc/{pid}/root",
        tracer_pid=int(status.get("TracerPid", "0")),
        start_ticks=after.start_ticks,
    )


def list_processes() -> list[ProcessInfo]:
    """Every process this user may see, by pid. Those that vanish while being looked at are left out."""
    found = []
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdigit()):
        with contextlib.suppress(TargetRefused):
            found.append(read_process(pid))
    return found


def _parents() -> dict[int, int]:
    """pid -> parent pid of all processes, from one cheap file each."""
    parents = {}
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            parents[int(name)] = _stat_fields(int(name)).ppid
        except (OSError, ValueError):
            continue
    return parents


def children(pid: int, recursive: bool = True) -> list[ProcessInfo]:
    """Child processes of ``pid`` (with ``recursive`` all descendants), parents first, then by pid."""
    check_pid(pid)
    below: dict[int, list[int]] = {}
    for child, parent in _parents().items():
        below.setdefault(parent, []).append(child)
    found, ahead = [], sorted(below.get(pid, ()))
    seen = {pid}
    while ahead:
        child = ahead.pop(0)
        if child in seen:
            continue
        seen.add(child)
        if recursive:
            ahead.extend(sorted(below.get(child, ())))
        with contextlib.suppress(TargetRefused):
            found.append(read_process(child))
    return found


def ancestors(pid: int) -> list[ProcessInfo]:
    """Parents of ``pid``, nearest first, up to pid 1 or to the edge of what may be seen."""
    found: list[ProcessInfo] = []
    current = read_process(pid).ppid
    while current > 0 and all(current != info.pid for info in found):
        try:
            info = read_process(current)
        except TargetRefused:
            break
        found.append(info)
        current = info.ppid
    return found
