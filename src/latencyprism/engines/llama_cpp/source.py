"""Steps of a live llama.cpp, read from outside by uprobes: nothing is written into the target's memory but
the kernel's own breakpoints, and these go when this process does."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from latencyprism.attach.elf import Elf
from latencyprism.attach.maps import Mapping, open_mapped, read_maps
from latencyprism.bpf.native import TRUNCATED, UNREAD, Hit, NativeProbe, Point
from latencyprism.engines.llama_cpp.assemble import ENGINE, Assembler, Event, Role, SeenRun
from latencyprism.engines.llama_cpp.pack import Layout, Pack, load_pack
from latencyprism.errors import BadInput, PrismError, TargetRefused
from latencyprism.records import Usual, Window

_HINT = "llama"
_REMEMBERED = 256
WAKE_INTERVAL_NS = 2_000_000
"""Steps shorter than this are handed over a few at a time: waking a reader costs the engine 15 µs on a
virtual machine, which is felt by steps of half a millisecond and by no others."""


def _candidates(pid: int) -> list[Mapping]:
    """One executable mapping of each file that may hold llama.cpp: named after it, or the program itself."""
    try:
        program = os.readlink(f"/proc/{pid}/exe")
    except OSError:
        program = ""
    found: dict[tuple[str, int, str], Mapping] = {}
    for mapping in read_maps(pid):
        if "x" not in mapping.perms or not mapping.inode:
            continue
        if _HINT in os.path.basename(mapping.path).lower() or mapping.path == program:
            found.setdefault(mapping.file, mapping)
    return list(found.values())


@contextmanager
def _opened(pid: int, mappings: list[Mapping]) -> Iterator[list[int]]:
    """Descriptors of the files behind ``mappings``, open for the length of a block."""
    with ExitStack() as stack:
        descriptors = []
        for mapping in mappings:
            descriptor = open_mapped(pid, mapping)
            stack.callback(os.close, descriptor)
            descriptors.append(descriptor)
        yield descriptors


def _present(files: list[int], names: set[str]) -> dict[str, int]:
    """{symbol: index of the file that defines it}; a file that is no ELF file has none."""
    where: dict[str, int] = {}
    for index, file in enumerate(files):
        for name in _defined(file, frozenset(names)):
            where.setdefault(name, index)
    return where


_known: dict[tuple[frozenset[str], int, int, int, int], frozenset[str]] = {}


def _defined(file: int, names: frozenset[str]) -> frozenset[str]:
    """Those of ``names`` that a file defines; remembered, because a search looks into every process and most
    of them run the same few programs."""
    status = os.fstat(file)
    key = (names, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    if key not in _known:
        try:
            with Elf(file) as elf:
                _known[key] = frozenset(elf.lookup(names))
        except BadInput:
            _known[key] = frozenset()
        while len(_known) > _REMEMBERED:
            del _known[next(iter(_known))]
    return _known[key]


def _worth_a_look(pid: int, names: frozenset[str]) -> bool:
    """False where a process maps no file named after llama.cpp and its program is known to define none of
    ``names``: told from the text of its map and one stat, since a search asks this of every process."""
    try:
        with open(f"/proc/{pid}/maps", "rb") as file:
            if _HINT.encode() in file.read().lower():
                return True
        status = os.stat(f"/proc/{pid}/exe")
    except OSError:
        return False
    key = (names, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    return key not in _known or bool(_known[key])


def find(pid: int) -> str | None:
    """Path (in the target's own view) of the mapped file that holds a llama.cpp we can read, else None.

    None also for a process that may not be looked into; ``LlamaSource`` says why.
    """
    pack = load_pack()
    if not _worth_a_look(pid, frozenset(pack.symbols())):
        return None
    try:
        mappings = _candidates(pid)
        with _opened(pid, mappings) as files:
            where = _present(files, pack.symbols())
    except PrismError:
        return None
    layout, _ = pack.choose(where.__contains__)
    return mappings[where[layout.decode]].path if layout else None


def _points(pack: Pack, where: dict[str, int]) -> tuple[Layout, dict[Role, Point]]:
    """What to probe. Raises TargetRefused for a build the pack does not know."""
    layout, roles = pack.choose(where.__contains__)
    if layout is None:
        raise TargetRefused(
            "cannot read steps of llama.cpp", "no known decode function in any library of it",
            "The build may be stripped or newer than this version knows; use one with its symbol table.",
        )  # fmt: skip
    symbols = {Role.DECODE: layout.decode, Role.UBATCH: layout.ubatch}
    if "iteration" in roles and "task" in roles:
        symbols |= {
            Role(role): roles[role] for role in ("iteration", "task", "launch", "sample") if role in roles
        }
    elif "synchronize" in roles:
        symbols[Role.SYNCHRONIZE] = roles["synchronize"]
    else:
        raise TargetRefused(
            "cannot read steps of llama.cpp", "nothing marks the end of a step in this build",
            "Use a build with its symbol table.",
        )  # fmt: skip
    points = {}
    for role, symbol in symbols.items():
        points[role] = Point(
            symbol,
            program="ubatch" if role is Role.UBATCH else "hit",
            wake=role in (Role.TASK, Role.SYNCHRONIZE),
            first=role in (Role.TASK, Role.SAMPLE, Role.SYNCHRONIZE),
            data_arg=1 if role is Role.LAUNCH else -1,
            file=where[symbol],
        )
    return layout, points


class LlamaSource:
    """StepSource of one process that runs llama.cpp; one replica for each thread that drives a model.

    Counts are those of the server's own metrics: prefill tokens sum to its prompt tokens, and decode tokens
    plus finished prompts to its predicted tokens. ``execute_ns`` lasts until sampling starts (for a chunk of
    a prompt, which samples nothing: until the iteration ends); ``update_ns`` is sampling and sending.
    ``pack``: another description of the build than the one that comes with the package.
    """

    engine = ENGINE

    def __init__(self, pid: int, pack: Pack | None = None, first_replica: int = 0) -> None:
        self.pids: tuple[int, ...] = (pid,)
        pack = pack or load_pack()
        mappings = _candidates(pid)
        with _opened(pid, mappings) as files:
            where = _present(files, pack.symbols())
            layout, points = _points(pack, where)
            self.layout = layout.name
            self._roles = list(points)
            constants = {f"ubatch_{name}": offset for name, offset in layout.offsets.items()}
            self._probe = NativeProbe(
                pid, files, list(points.values()), constants, wake_interval_ns=WAKE_INTERVAL_NS
            )
        self._assembler = Assembler(pid, Role.ITERATION in points, first_replica)
        self._usual: Usual | None = None

    @property
    def lost(self) -> int:
        """Records lost because nobody polled: steps around them may be missing or merged."""
        return self._probe.lost

    @property
    def unreadable(self) -> int:
        """Micro-batches whose sequences could not be read: their steps carry times but no counts."""
        return self._assembler.unreadable

    @property
    def step_threads(self) -> tuple[tuple[int, int], ...]:
        """(process, thread) of the loops that emitted steps so far, by the numbers we know them by."""
        return tuple((self.pids[0], tid) for tid in self._assembler.threads)

    def fileno(self) -> int | None:
        """Readable at the end of a step, but at most every WAKE_INTERVAL_NS: poll on a slow timer as well."""
        return self._probe.fileno()

    def poll(self) -> Window:
        """All steps completed since the last call, in order, with a span for each micro-batch."""
        window = Window()
        for hit in self._probe.read():
            self._assembler.add(_event(self._roles[hit.point], hit), window)
        return window

    def settle(self) -> bool:
        """The kernel keeps ``fileno`` readable while there is something to poll."""
        return True

    def wake_beyond(self, usual: Usual | None) -> None:
        self._usual = usual
        self.wake_late(0, 0)

    def wake_late(self, typical_1024: int, spare_ns: int) -> bool:
        usual = self._usual
        if usual is None:
            self._probe.wake_after(0)
        elif usual.decode_ns or usual.prefill_ns:
            prices = (usual.decode_ns, usual.prefill_ns)
            self._probe.wake_after(usual.base_ns + usual.between_ns, *prices, typical_1024, spare_ns)
        else:  # all steps were alike, or what was in them is not known
            self._probe.wake_after(usual.bare_ns)
            return False
        return usual is not None

    def renew(self) -> None:
        """Kernel probes need no lease: they end with this process."""

    def arm_deep(self, seconds: float) -> None:
        """There are no deeper spans: every micro-batch is one already."""

    def detached(self) -> str | None:
        """Nobody else can take kernel probes of ours out."""
        return None

    def notices(self) -> list[str]:
        """There is nothing that it may drop."""
        return []

    def close(self) -> None:
        """Take the probes out; safe to repeat."""
        self._probe.close()


def _event(role: Role, hit: Hit) -> Event:
    if role is Role.UBATCH:
        readable = not hit.flags & (UNREAD | TRUNCATED)
        runs = tuple(SeenRun(*run[:3], bool(run.output)) for run in hit.runs) if readable else None
        tokens: int = struct.unpack_from("<I", hit.data, 4)[0]
        return Event(role, hit.time_ns, hit.tid, *hit.args, tokens=tokens, runs=runs)
    if role is Role.LAUNCH:
        slot: int = struct.unpack_from("<i", hit.data)[0]
        known = not hit.flags & UNREAD and 0 <= slot < 1 << 16
        return Event(role, hit.time_ns, hit.tid, sequence=slot if known else None)
    return Event(role, hit.time_ns, hit.tid, hit.args[0])
