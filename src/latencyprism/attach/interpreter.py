"""Which Python a process runs, where its functions are, and why it would be refused; nothing is touched."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ..errors import BadInput, TargetRefused
from .access import denied
from .elf import EM_AARCH64, EM_X86_64, PT_LOAD, Elf, Segment, Symbol
from .elf_facts import ask
from .maps import PAGE, Mapping, read_maps
from .memory import read_memory
from .process import Identity, ProcessInfo, read_process, status_fields

OLDEST, NEWEST = (3, 10), (3, 15)
# Up to here by a stop of the main thread; later ones are asked through their own interface (remote_exec).
NEWEST_STOPPED = (3, 13)
API = (
    "Py_AddPendingCall",
    "PyRun_SimpleString",
    "PyGILState_Check",
    "PyGILState_Ensure",
    "PyGILState_Release",
)
# While the main thread is inside one of these it may hold the lock of the pending-call queue.
QUEUE_CODE = (
    "Py_MakePendingCalls",
    "_Py_HandlePending",
    "make_pending_calls",
    "_PyEval_AddPendingCall",
    "PyThread_acquire_lock",
    "PyThread_acquire_lock_timed",
    "PyThread_release_lock",
    "PyMutex_Lock",
    "PyMutex_Unlock",
    "_PyMutex_LockTimed",
)
# A function that only a free-threaded build has.
_FREE_THREADED = "_Py_MergeZeroLocalRefcount"
_OPTIONAL = ("Py_Version", _FREE_THREADED)
_RUNTIME = "_PyRuntime"
# Stripped of its symbols, an executable still names the section that holds nothing but it.
_RUNTIME_SECTION = ".PyRuntime"
_LIBC_CODE = ("sem_wait", "sem_trywait", "sem_timedwait", "sem_clockwait", "sem_post")
_LIBC_CALLS = ("lsearch",)
# `mov $15, %rax; syscall`: the return trampoline of signal handlers, a local symbol of glibc.
RESTORE_RT = bytes.fromhex("48c7c00f0000000f05")
_LIBPYTHON = re.compile(r"libpython(3)\.(\d+)(t?)(?:d|m)?\.so")
_PROGRAM = re.compile(r"python(3)(?:\.(\d+)(t?))?")
_EXTENSION = re.compile(r"\.cpython-3(\d+)(t?)-")
_LIBC = re.compile(r"(?:^|/)libc(?:-2\.\d+\.so|\.so\.6)$")
_MUSL = re.compile(r"(?:^|/)(?:ld-musl-|libc\.musl-)")
_MACHINES = {EM_X86_64: "x86_64", EM_AARCH64: "aarch64", 3: "i386", 40: "arm", 243: "riscv"}


@dataclass(frozen=True, slots=True)
class Module:
    """One loaded ELF file. ``base`` is what relocation adds to a symbol's value; addresses in bytes."""

    path: str
    base: int
    static: bool
    addresses: dict[str, int]
    code: tuple[tuple[int, int], ...]
    runtime: tuple[int, int] | None
    restore_rt: int | None


@dataclass(frozen=True, slots=True)
class PythonInfo:
    """The interpreter of a live process.

    ``version`` is (major, minor) or (major, minor, micro) where the interpreter tells; ``base`` the load
    address that symbols of ``module`` are relative to; ``static`` when the interpreter is part of the
    executable; ``addresses`` of the C functions used; ``queue_code`` address ranges in which the main thread
    may hold the pending-call lock; ``restore_rt`` address of glibc's signal return trampoline; ``runtime``
    address range of ``_PyRuntime``, in which the GIL with its condition variables lies.
    """

    identity: Identity
    version: tuple[int, ...]
    module: str
    base: int
    static: bool
    free_threaded: bool
    musl: bool
    machine: str
    addresses: dict[str, int] = field(repr=False)
    queue_code: tuple[tuple[int, int], ...] = field(repr=False)
    restore_rt: int = field(repr=False)
    runtime: tuple[int, int] = field(repr=False)
    maps: list[Mapping] = field(repr=False)


def python_of(pid: int) -> PythonInfo:
    """Find the interpreter of ``pid`` and everything injection needs to know of it.

    Raises TargetRefused with the reason, before anything is touched, for: no such process, a zombie, a
    stopped or already traced process, missing rights, another machine, musl, no Python, an unsupported
    version, a free-threaded build, a shadow stack.
    """
    info = read_process(pid)
    refuse_state(info)
    try:
        return _python_of(info)
    except TargetRefused:
        # What was refused may be no more than the half of a process that was just ending.
        if not info.identity.alive():
            raise TargetRefused(f"process {pid} is gone", "it ended while it was looked at") from None
        raise


def _python_of(info: ProcessInfo) -> PythonInfo:
    pid = info.pid
    _refuse_machine(info)
    maps = read_maps(pid)
    _refuse_musl(pid, maps)
    interpreter = _interpreter_module(info, maps)
    if interpreter is None:
        raise TargetRefused(
            f"process {pid} is not Python",
            "no interpreter with the C API is mapped into it",
            "give the pid of the engine process itself; `check` lists candidates",
        )
    version, free_threaded = _version(pid, interpreter, maps)
    _refuse_version(pid, version, free_threaded)
    libc = _libc_module(info, maps, interpreter)
    missing = [name for name in API if name not in interpreter.addresses]
    if libc.restore_rt is None or interpreter.runtime is None or "lsearch" not in libc.addresses or missing:
        raise TargetRefused(
            f"process {pid} cannot be attached to",
            "its interpreter or C library lacks a function that attaching needs",
            "use a CPython built against glibc",
        )
    return PythonInfo(
        identity=info.identity,
        version=version,
        module=interpreter.path,
        base=interpreter.base,
        static=interpreter.static,
        free_threaded=free_threaded,
        musl=False,
        machine="x86_64",
        addresses={**libc.addresses, **interpreter.addresses},
        queue_code=interpreter.code + libc.code,
        restore_rt=libc.restore_rt,
        runtime=interpreter.runtime,
        maps=maps,
    )


def refuse_state(info: ProcessInfo) -> None:
    """Raise TargetRefused for a process that is ending, stopped or already traced."""
    pid = info.pid
    if info.state in "ZXx":
        raise TargetRefused(f"process {pid} has ended", "it is a zombie", "choose a running process")
    if info.tracer_pid:
        raise TargetRefused(
            f"process {pid} is already traced",
            f"process {info.tracer_pid} traces it",
            "end that debugger or tracer first",
        )
    if info.state in "Tt":
        raise TargetRefused(f"process {pid} is stopped", "a stop signal holds it", f"kill -CONT {pid}")


def _refuse_machine(info: ProcessInfo) -> None:
    pid = info.pid
    try:
        descriptor = os.open(f"/proc/{pid}/exe", os.O_RDONLY | os.O_CLOEXEC)
    except PermissionError:
        raise denied(pid) from None
    except OSError:
        raise TargetRefused(f"process {pid} is not Python", "it has no executable", "") from None
    try:
        with Elf(descriptor) as elf:
            machine = elf.machine
    except BadInput as error:
        raise TargetRefused(
            f"process {pid} cannot be attached to",
            f"its executable: {error.why}",
            "only x86_64 processes with glibc are supported",
        ) from None
    finally:
        os.close(descriptor)
    own = platform.machine()
    if machine != EM_X86_64 or own != "x86_64" or sys.platform != "linux":
        raise TargetRefused(
            f"process {pid} cannot be attached to",
            f"it is {machine_name(machine)} code on {own}; only x86_64 is supported",
            "use eBPF and host signals for it",
        )
    features = status_fields(pid).get("x86_Thread_features", "")
    if "shstk" in features.split():
        raise TargetRefused(
            f"process {pid} cannot be attached to",
            "it runs with a hardware shadow stack",
            "start it without GLIBC_TUNABLES=glibc.cpu.hwcaps=SHSTK",
        )


def machine_name(number: int) -> str:
    """e_machine of an ELF header in words."""
    return _MACHINES.get(number, f"machine {number}")


def uses_musl(maps: list[Mapping]) -> bool:
    """True when the musl loader or C library is mapped."""
    return any(_MUSL.search(mapping.path) for mapping in maps)


def _refuse_musl(pid: int, maps: list[Mapping]) -> None:
    if uses_musl(maps):
        raise TargetRefused(
            f"process {pid} cannot be attached to",
            "it runs on musl; only glibc is supported",
            "use an image based on glibc (Debian, Ubuntu, RHEL)",
        )


def _refuse_version(pid: int, version: tuple[int, ...], free_threaded: bool) -> None:
    told = ".".join(map(str, version))
    if free_threaded:
        raise TargetRefused(
            f"process {pid} cannot be attached to",
            f"its Python {told} is free-threaded, which is not supported",
            "use the build with the GIL",
        )
    if not OLDEST <= version[:2] <= NEWEST:
        raise TargetRefused(
            f"process {pid} cannot be attached to",
            f"it runs Python {told}; 3.10 to 3.15 are supported",
            "use eBPF and host signals for it",
        )


def executables(maps: list[Mapping]) -> dict[tuple[str, int, str], list[Mapping]]:
    """Mappings grouped by file, of the files that have code mapped."""
    groups: dict[tuple[str, int, str], list[Mapping]] = {}
    for mapping in maps:
        if mapping.inode and mapping.path.startswith("/"):
            groups.setdefault(mapping.file, []).append(mapping)
    return {key: group for key, group in groups.items() if any("x" in one.perms for one in group)}


def load_base(segments: Sequence[Segment], group: list[Mapping]) -> int | None:
    """What the loader added to the file's virtual addresses; None when the map does not fit the file."""
    for segment in segments:
        if segment.kind != PT_LOAD:
            continue
        skew = segment.offset % PAGE
        for mapping in group:
            if mapping.offset == segment.offset - skew:
                return mapping.start - (segment.vaddr - skew)
    return None


class _Look(NamedTuple):
    """What one file holds for us, before relocation; ``runtime``: (address, size) of its section for that."""

    segments: tuple[Segment, ...]
    symbols: dict[str, Symbol]
    trampoline: int | None
    runtime: tuple[int, int] | None


def _module(
    pid: int, group: list[Mapping], wanted: tuple[str, ...], code: tuple[str, ...], static: bool
) -> Module | None:
    """Look into one loaded file; None when it is not a usable ELF file or does not match its mappings."""
    names = (*wanted, *code, _RUNTIME)
    with_trampoline = wanted == _LIBC_CALLS or static

    def look(elf: Elf) -> _Look:
        trampoline = elf.find_code(RESTORE_RT) if with_trampoline else None
        return _Look(tuple(elf.segments), elf.lookup(names), trampoline, elf.section(_RUNTIME_SECTION))

    try:
        seen = ask(pid, group[0], ("module", names, with_trampoline), look)
    except BadInput:
        return None
    base = load_base(seen.segments, group)
    if base is None:
        return None
    found, trampoline = seen.symbols, seen.trampoline
    runtime = found.get(_RUNTIME)
    area = seen.runtime if runtime is None else (runtime.value, runtime.size)
    return Module(
        path=group[0].path,
        base=base,
        static=static,
        addresses={name: base + symbol.value for name, symbol in found.items() if name in wanted},
        code=_ranges(found, code, base),
        runtime=None if area is None else (base + area[0], base + area[0] + area[1]),
        restore_rt=None if trampoline is None else base + trampoline,
    )


def _ranges(found: dict[str, Symbol], names: tuple[str, ...], base: int) -> tuple[tuple[int, int], ...]:
    return tuple(
        (base + found[name].value, base + found[name].value + found[name].size)
        for name in names
        if name in found
    )


def _interpreter_module(info: ProcessInfo, maps: list[Mapping]) -> Module | None:
    """The loaded file with the C API: a libpython if there is one, else the executable itself."""
    groups = list(executables(maps).values())
    shared = [group for group in groups if _LIBPYTHON.search(os.path.basename(group[0].path))]
    exe = [
        group
        for group in groups
        if info.exe is not None and group[0].path == info.exe.removesuffix(" (deleted)")
    ]
    # Started through the dynamic loader, the program is one more mapped file and the loader the executable.
    started = [group for group in groups if _PROGRAM.fullmatch(os.path.basename(group[0].path))]
    for group in shared + exe + started:
        module = _module(info.pid, group, API + _OPTIONAL, QUEUE_CODE, static=group not in shared)
        if module is not None and "Py_AddPendingCall" in module.addresses:
            return module
    return None


def _libc_module(info: ProcessInfo, maps: list[Mapping], interpreter: Module) -> Module:
    for group in executables(maps).values():
        if _LIBC.search(group[0].path):
            module = _module(info.pid, group, _LIBC_CALLS, _LIBC_CODE, static=False)
            if module is not None:
                return module
    if interpreter.static and interpreter.restore_rt is not None:
        return interpreter
    raise TargetRefused(
        f"process {info.pid} cannot be attached to",
        "no glibc is mapped into it",
        "use a CPython built against glibc",
    )


def _version(pid: int, module: Module, maps: list[Mapping]) -> tuple[tuple[int, ...], bool]:
    """(version, free-threaded?) from the interpreter itself where it tells (3.11+), else from file names."""
    free_threaded = _FREE_THREADED in module.addresses
    address = module.addresses.get("Py_Version")
    if address is not None:
        number = int.from_bytes(read_memory(pid, address, 4), "little")
        return (number >> 24, number >> 16 & 255, number >> 8 & 255), free_threaded
    name = _LIBPYTHON.search(os.path.basename(module.path))
    if name is not None:
        return (int(name[1]), int(name[2])), free_threaded or bool(name[3])
    for mapping in maps:
        extension = _EXTENSION.search(os.path.basename(mapping.path))
        if extension is not None:
            return (3, int(extension[1])), free_threaded or bool(extension[2])
    binary = _PROGRAM.fullmatch(os.path.basename(module.path))
    if binary is not None and binary[2]:
        return (int(binary[1]), int(binary[2])), free_threaded or bool(binary[3])
    raise TargetRefused(
        f"process {pid} cannot be attached to",
        "the version of its Python cannot be told",
        "use CPython 3.10 to 3.15",
    )
