"""What attaching to a process needs, condition by condition, each with its remedy; nothing is touched."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass

from ..errors import BadInput, TargetRefused
from .access import CAP_SYS_PTRACE, denied, has_capability, yama_scope
from .elf import EM_X86_64, Elf
from .interpreter import NEWEST_STOPPED, PythonInfo, machine_name, python_of, uses_musl
from .maps import read_maps
from .process import ProcessInfo, read_process
from .remote_exec import RemoteExec
from .shared_folder import shared_folder
from .slack import find_slots
from .syscalls import WAITING


@dataclass(frozen=True, slots=True)
class Condition:
    """One thing that attaching needs: ``ok``, what was found, and what to do where it is not met."""

    name: str
    ok: bool
    detail: str
    remedy: str = ""


def conditions(pid: int) -> list[Condition]:
    """All conditions of attaching to ``pid``, in the order in which they matter; does not raise."""
    try:
        info = read_process(pid)
    except TargetRefused as error:
        return [Condition("process", False, error.why or error.what, error.remedy)]
    found = [
        Condition("process", True, f"{info.comm} (pid {pid}, uid {info.uid})"),
        _state(info),
        _tracer(info),
        _rights(info),
        _access(pid),
        _yama(),
        _machine(pid),
        _libc(pid),
    ]
    interpreter = _interpreter(info)
    if interpreter[0].ok:
        interpreter += [_folder(pid), _main_thread(info)]
    return [*found, *interpreter, _namespaces(info)]


def process_conditions(pid: int) -> list[Condition]:
    """Those that hold for any way of looking at ``pid``, from outside too; does not raise."""
    try:
        info = read_process(pid)
    except TargetRefused as error:
        return [Condition("process", False, error.why or error.what, error.remedy)]
    found = Condition("process", True, f"{info.comm} (pid {pid}, uid {info.uid})")
    return [found, _state(info), _namespaces(info)]


def _state(info: ProcessInfo) -> Condition:
    if info.state in "ZXx":
        return Condition("state", False, "it has ended (zombie)", "choose a running process")
    if info.state == "T":
        return Condition("state", False, "stopped by a signal", f"kill -CONT {info.pid}")
    words = {"R": "running", "S": "sleeping", "D": "in an uninterruptible wait", "I": "idle"}
    return Condition("state", True, words.get(info.state, f"state {info.state}"))


def _tracer(info: ProcessInfo) -> Condition:
    if info.tracer_pid:
        return Condition("tracer", False, f"traced by process {info.tracer_pid}", "end that debugger first")
    return Condition("tracer", True, "not traced")


def _rights(info: ProcessInfo) -> Condition:
    own = os.geteuid()
    if has_capability(CAP_SYS_PTRACE):
        return Condition("rights", True, f"uid {own} with CAP_SYS_PTRACE")
    if info.uid == own:
        return Condition("rights", True, f"same user (uid {own}), without CAP_SYS_PTRACE")
    return Condition(
        "rights",
        False,
        f"target is uid {info.uid}, this is uid {own} without CAP_SYS_PTRACE",
        "run as the same user, or with CAP_SYS_PTRACE (docker: --cap-add SYS_PTRACE; or sudo)",
    )


def _access(pid: int) -> Condition:
    """The kernel's own answer: opening ``mem`` asks for the same permission as ptrace."""
    try:
        os.close(os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC))
    except PermissionError:
        error = denied(pid)
        return Condition("access", False, error.why, error.remedy)
    except OSError as error:
        return Condition("access", False, error.strerror or str(error), "choose a running process")
    return Condition("access", True, "the kernel permits tracing it")


def _yama() -> Condition:
    scope = yama_scope()
    if scope is None:
        return Condition("yama", True, "not built into this kernel")
    ok = scope == 0 or (scope < 3 and has_capability(CAP_SYS_PTRACE))
    remedy = "run with CAP_SYS_PTRACE, or kernel.yama.ptrace_scope=0" if scope < 3 else "needs a reboot"
    return Condition("yama", ok, f"ptrace_scope {scope}", "" if ok else remedy)


def _machine(pid: int) -> Condition:
    try:
        with Elf(f"/proc/{pid}/exe") as elf:
            machine = elf.machine
    except BadInput as error:
        return Condition(
            "machine",
            False,
            f"executable: {error.why}",
            "only 64-bit x86_64 programs are attached to; see `access` if it cannot be read",
        )
    own = platform.machine()
    ok = machine == EM_X86_64 and own == "x86_64"
    detail = f"{machine_name(machine)} on {own}"
    return Condition(
        "machine", ok, detail, "" if ok else "only x86_64 is supported; use eBPF and host signals"
    )


def _libc(pid: int) -> Condition:
    try:
        maps = read_maps(pid)
    except TargetRefused as error:
        return Condition("libc", False, error.why, error.remedy)
    if uses_musl(maps):
        return Condition("libc", False, "musl", "use an image based on glibc (Debian, Ubuntu, RHEL)")
    return Condition("libc", True, "no musl")


def _interpreter(info: ProcessInfo) -> list[Condition]:
    try:
        python = python_of(info.pid)
    except TargetRefused as error:
        return [Condition("python", False, error.why or error.what, error.remedy)]
    told = ".".join(map(str, python.version))
    kind = "static" if python.static else "shared"
    found = Condition("python", True, f"CPython {told} ({kind}: {os.path.basename(python.module)})")
    if python.version[:2] > NEWEST_STOPPED:
        return [found, _asked(python, info)]
    return [found, _stopped(), _room(python)]


def _asked(python: PythonInfo, info: ProcessInfo) -> Condition:
    try:
        remote = RemoteExec(python, info.ns_pid)
    except TargetRefused as error:
        return Condition("route", False, error.why, error.remedy)
    detail = "asked through its own interface, without a stop; one stop while its main thread waits"
    return Condition("route", True, detail if remote.verified else f"{detail} (not run against this version)")


def _stopped() -> Condition:
    return Condition("route", True, "one stop of the main thread; pending call, or GIL calls while it waits")


def _room(python: PythonInfo) -> Condition:
    slots = find_slots(python.identity.pid, python.maps)
    if slots:
        return Condition("room", True, f"{len(slots)} unused slots in loaded libraries")
    return Condition(
        "room",
        False,
        "no loaded library leaves room for a text, so it is entered only while its main thread waits",
        "attach while it has nothing to do, or use a CPython with a shared libpython",
    )


def _folder(pid: int) -> Condition:
    try:
        outside, inside = shared_folder(pid)
    except TargetRefused as error:
        return Condition("folder", False, error.why, error.remedy)
    where = inside if str(outside) == inside else f"{inside} of its own"
    return Condition("folder", True, f"{where} takes the probe's files until it has answered")


def _main_thread(info: ProcessInfo) -> Condition:
    """What it does at this moment; never in the way, since it is waited for."""
    try:
        with open(f"/proc/{info.pid}/task/{info.pid}/syscall") as file:
            first = file.read(64).split()[:1]
    except OSError:
        return Condition("main thread", True, "what it does cannot be seen")
    if first and first[0].isdigit():
        number = int(first[0])
        if number in WAITING:
            return Condition("main thread", True, f"waits in {WAITING[number]}: entered there")
        return Condition("main thread", True, f"in system call {number}: entered when it is back in Python")
    return Condition("main thread", True, "at work: entered between two instructions of Python")


def _namespaces(info: ProcessInfo) -> Condition:
    def differs(kind: str) -> bool | None:
        try:
            return os.readlink(f"/proc/{info.pid}/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}")
        except OSError:
            return None

    told = {None: "unknown", True: "its own", False: "shared"}
    detail = ", ".join(f"{kind} {told[differs(kind)]}" for kind in ("pid", "mnt", "user"))
    inside = f" (pid {info.ns_pid} inside)" if info.ns_pid != info.pid else ""
    return Condition("namespaces", True, detail + inside)
