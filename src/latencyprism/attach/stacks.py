"""Python stacks of a live process, read from outside: nothing in it is stopped, written to or run.

Reading races with the target. A stack that does not fit together (a code object that is none, a chain that
does not end) is dropped and counted as torn; what is handed out may still mix two moments a few microseconds
apart.
"""

from __future__ import annotations

import os
import struct
from typing import NamedTuple

from ..errors import TargetRefused
from .interpreter import PythonInfo
from .layout import TOLD_BYTES, Layout, layouts
from .memory import ProcessGone, read_memory, read_scattered
from .process import status_fields

INTERPRETERS_LIMIT = 1024
THREADS_LIMIT = 4096
DEPTH_LIMIT = 400
CODE_LIMIT = 20_000
TEXT_LIMIT = 4096
PROOF_TRIES = 200
PIECES_LIMIT = 256
NEW_ROOT_AFTER = 8
_KINDS = {1: "latin-1", 2: "utf-16-le", 4: "utf-32-le"}
_NO_CODE_OWNER = 3
"""From here on: a frame that C put on the stack as a mark; it runs no Python code."""
_MARK = "<interpreter trampoline>"
"""The code that CPython 3.12 gives to those frames."""
_RESUMED = 0x20 | 0x80 | 0x200
"""Flags of the code of generators and coroutines: somebody resumes them, they are never outermost."""
_TAGS = 7
"""Low bits of a reference that are no part of the address (3.14 and later; zero before)."""
_WORD = struct.Struct("<Q")
_INT = struct.Struct("<i")
COROUTINE = 0x80 | 0x100
GENERATOR = 0x20 | 0x200


class Function(NamedTuple):
    """What a code object says of itself. ``qualname`` is ``name`` before CPython 3.11, which does not keep
    it; ``flags`` are ``co_flags``."""

    name: str
    qualname: str
    file: str
    line: int
    flags: int


class Frame(NamedTuple):
    """``code``: address of the code object, a key for ``StackReader.function``; ``at``: where it is in its
    code, in bytes from an arbitrary but fixed point."""

    code: int
    at: int


Stack = tuple[Frame, ...]
"""Outermost frame first."""


class Thread(NamedTuple):
    """``address`` of its state; ``ident`` as ``threading.get_ident`` says there; ``tid`` of the kernel as
    seen from here, None where it could not be told."""

    address: int
    ident: int
    tid: int | None


class _Torn(Exception):
    pass


class StackReader:
    """Reads stacks of one interpreter. Not for several threads at once.

    Raises TargetRefused when the interpreter's structures are not laid out as known: that is tried on the
    live process, at construction. ``torn`` counts stacks that were dropped, ``whole`` those that were handed
    out.
    """

    def __init__(self, python: PythonInfo) -> None:
        self.pid = python.identity.pid
        self.torn = 0
        self.whole = 0
        self._functions: dict[int, Function] = {}
        self._last: dict[int, list[int]] = {}
        self._roots: dict[int, tuple[int, int]] = {}
        self._code_type = -1
        layout = layouts().get((python.version[0], python.version[1]))
        if layout is None:
            raise self._unfit(f"the layout of CPython {python.version[0]}.{python.version[1]} is not known")
        self.layout = self._prepare(python, layout)
        self._prove()

    # -- what there is ---------------------------------------------------------------------------

    def threads(self) -> list[Thread]:
        """The threads that have run Python code and have not ended. Raises TargetRefused when the list cannot
        be read (it changes all the time: try again)."""
        try:
            return self._threads()
        except _Torn:
            raise self._unfit("its list of threads does not fit together") from None

    def function(self, code: int) -> Function:
        """What runs in a frame with this ``code``. KeyError for an address that no stack had."""
        return self._functions[code]

    def stack(self, thread: Thread) -> Stack | None:
        """The thread's stack now; () when it runs no Python code; None when it was torn.

        Raises ProcessGone when the process ended."""
        try:
            stack = self._stack(thread)
        except _Torn:
            self.torn += 1
            return None
        except ProcessGone:
            raise
        except TargetRefused:
            self.torn += 1
            return None
        self.whole += 1
        return stack

    # -- proof -----------------------------------------------------------------------------------

    def _unfit(self, why: str) -> TargetRefused:
        return TargetRefused(f"cannot read the Python stacks of process {self.pid}", why)

    def _prepare(self, python: PythonInfo, layout: Layout) -> Layout:
        start, end = python.runtime
        try:
            layout = layout.corrected(read_memory(self.pid, start, min(TOLD_BYTES, end - start)))
            self._interpreter = self._main_interpreter(layout, start)
        except ProcessGone:
            raise
        except _Torn:
            raise self._unfit("its list of interpreters does not fit together") from None
        except TargetRefused as error:
            raise self._unfit(error.why) from None
        self._thread_span = _span(
            layout, "thread", ("next", "interpreter", "ident", "native", "frame", "cframe")
        )
        self._frame_span = _span(layout, "frame", ("previous", "code", "at", "owner"))
        self._code_span = _span(layout, "code", ("name", "qualname", "file", "line", "flags"))
        self._tids = _tids(self.pid)
        self._frame_fields = tuple(layout[f"frame.{name}"] for name in ("previous", "code", "at"))
        self._owner_at = layout.get("frame.owner")
        return layout

    def _main_interpreter(self, layout: Layout, runtime: int) -> int:
        """The last of the list: new ones are put before it."""
        address = _word(self._read(runtime + layout["runtime.interpreters"], 8))
        for _ in range(INTERPRETERS_LIMIT):
            after = _word(self._read(address + layout["interpreter.next"], 8))
            if not after:
                return address
            address = after
        raise _Torn

    def _prove(self) -> None:
        """At least one whole stack with readable names, and threads that the kernel knows."""
        why = "no stack of it could be read whole"
        for _ in range(PROOF_TRIES):
            try:
                threads = self._threads()
            except _Torn:
                why = "its list of threads does not fit together"
                continue
            if not threads:
                raise self._unfit("it has no Python thread")
            if self.layout.get("thread.native") is not None and all(one.tid is None for one in threads):
                raise self._unfit("its threads are not laid out as in the builds that are known")
            if any(self.stack(thread) for thread in threads):
                self.torn = self.whole = 0
                return
        raise self._unfit(
            f"{why} (CPython {self.layout.version[0]}.{self.layout.version[1]}, {self.layout.origin})"
        )

    # -- reading ---------------------------------------------------------------------------------

    def _read(self, address: int, size: int) -> bytes:
        if not 4096 <= address < 1 << 47:
            raise _Torn
        return read_memory(self.pid, address, size)

    def _threads(self) -> list[Thread]:
        layout = self.layout
        try:
            address = _word(self._read(self._interpreter + layout["interpreter.threads"], 8))
            found: list[Thread] = []
            while address:
                if len(found) >= THREADS_LIMIT or any(address == one.address for one in found[-2:]):
                    raise _Torn
                raw = self._read(address, self._thread_span)
                if _word(raw, layout["thread.interpreter"]) != self._interpreter:
                    raise _Torn
                ident = _word(raw, layout["thread.ident"])
                found.append(Thread(address, ident, self._tid(raw, ident)))
                address = _word(raw, layout["thread.next"])
        except ProcessGone:
            raise
        except TargetRefused:
            raise _Torn from None
        return found

    def _tid(self, raw: bytes, ident: int) -> int | None:
        native = self.layout.get("thread.native")
        in_ident = self.layout.get("ident.tid")
        if native is not None:
            inside = _word(raw, native)
        elif in_ident is not None:
            try:
                inside = _INT.unpack(self._read(ident + in_ident, 4))[0]
            except (_Torn, TargetRefused):
                return None
        else:
            return None
        if inside not in self._tids:
            self._tids = _tids(self.pid)
        return self._tids.get(inside)

    def _stack(self, thread: Thread) -> Stack:
        """Everything that the last stack of this thread lay in is fetched with one system call: mostly it
        lies there again. What is missing then is read piece by piece."""
        layout = self.layout
        known = self._fetch(thread)
        state = known.get(thread.address)
        if state is None:
            state = self._read(thread.address, self._thread_span)
        if _word(state, layout["thread.interpreter"]) != self._interpreter:
            raise _Torn
        path = [thread.address]
        cframe = layout.get("thread.cframe")
        if cframe is not None:
            place = _word(state, cframe)
            if not place:
                return ()
            address = _word(known.get(place) or self._read(place, self._frame_span), layout["cframe.frame"])
            path.append(place)
        else:
            address = _word(state, layout["thread.frame"])
        frames = self._chain(address, known, path)
        self._last[thread.address] = path[:PIECES_LIMIT]
        if frames and self._functions[frames[-1].code].flags & _RESUMED:
            raise _Torn
        self._same_root(thread.address, path[-1])
        frames.reverse()
        return tuple(frames)

    def _fetch(self, thread: Thread) -> dict[int, bytes]:
        last = self._last.get(thread.address)
        if not last:
            return {}
        pieces = [(address, self._frame_span) for address in last]
        pieces[0] = (thread.address, self._thread_span)
        try:
            return dict(zip(last, read_scattered(self.pid, pieces)))
        except ProcessGone:
            raise
        except TargetRefused:
            del self._last[thread.address]
            return {}

    def _chain(self, address: int, known: dict[int, bytes], path: list[int]) -> list[Frame]:
        previous_at, code_at, at_at = self._frame_fields
        frames: list[Frame] = []
        steps = 0
        while address:
            steps += 1
            if steps > DEPTH_LIMIT:
                raise _Torn
            raw = known.get(address)
            if raw is None:
                raw = self._read(address, self._frame_span)
            path.append(address)
            if self._owner_at is None or raw[self._owner_at] < _NO_CODE_OWNER:
                code = _word(raw, code_at) & ~_TAGS
                if code not in self._functions:
                    self._learn(code)
                at = _INT.unpack_from(raw, at_at)[0] if self._owner_at is None else _word(raw, at_at) - code
                frames.append(Frame(code, at))
            address = _word(raw, previous_at)
        return frames

    def _same_root(self, thread: int, root: int) -> None:
        """A thread keeps its outermost frame. A chain that ends elsewhere was cut while it was read (a
        generator that just stopped has no caller), unless it goes on to end there."""
        usual, others = self._roots.get(thread, (root, 0))
        if usual != root:
            others += 1
            self._roots[thread] = (root, 0) if others >= NEW_ROOT_AFTER else (usual, others)
            raise _Torn
        self._roots[thread] = (usual, 0)

    # -- code objects ----------------------------------------------------------------------------

    def _learn(self, address: int) -> None:
        if len(self._functions) >= CODE_LIMIT:
            raise _Torn
        layout = self.layout
        raw = self._read(address, self._code_span)
        kind = _word(raw, layout["object.type"])
        if kind != self._code_type:
            of_type = _word(self._read(kind + layout["type.name"], 8))
            if self._code_type > 0 or self._read(of_type, 5) != b"code\0":
                raise _Torn
        name = self._text(_word(raw, layout["code.name"]))
        at = layout.get("code.qualname")
        function = Function(
            name,
            self._text(_word(raw, at)) if at is not None else name,
            self._text(_word(raw, layout["code.file"])),
            _INT.unpack_from(raw, layout["code.line"])[0],
            _INT.unpack_from(raw, layout["code.flags"])[0],
        )
        if not function.qualname.endswith(function.name):
            raise _Torn
        if function.name == _MARK:  # is told by its owner: read while it was written
            raise _Torn
        self._code_type = kind
        self._functions[address] = function

    def _text(self, address: int) -> str:
        layout = self.layout
        raw = self._read(address, layout["text.wide"])
        length = _word(raw, layout["text.length"])
        state = _INT.unpack_from(raw, layout["text.state"])[0]
        size, compact, ascii_only = state >> 2 & 7, state >> 5 & 1, state >> 6 & 1
        if not compact or size not in _KINDS or not 0 < length <= TEXT_LIMIT:
            raise _Torn
        start = address + layout["text.ascii" if ascii_only else "text.wide"]
        try:
            text = self._read(start, length * size).decode(_KINDS[size])
        except UnicodeDecodeError:
            raise _Torn from None
        # The target wrote it, and it is shown to people.
        return "".join(char if char.isprintable() else "?" for char in text)


def _word(raw: bytes, at: int = 0) -> int:
    value: int = _WORD.unpack_from(raw, at)[0]
    return value


def _span(layout: Layout, group: str, names: tuple[str, ...]) -> int:
    """Bytes of a structure that hold all these fields."""
    offsets = [layout.get(f"{group}.{name}") for name in names]
    return max(offset for offset in offsets if offset is not None) + 8


def _tids(pid: int) -> dict[int, int]:
    """Thread ids of the kernel: as the process sees them (in its own namespace) -> as we see them."""
    found = {}
    try:
        tasks = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return {}
    own_namespace = True
    try:
        own_namespace = len(status_fields(pid).get("NSpid", "").split()) <= 1
    except OSError:
        return {}
    for task in tasks:
        if own_namespace:
            found[int(task)] = int(task)
            continue
        try:
            with open(f"/proc/{pid}/task/{task}/status", encoding="utf-8", errors="replace") as status:
                line = next((line for line in status if line.startswith("NSpid:")), "")
        except OSError:
            continue
        if line:
            found[int(line.split()[-1])] = int(task)
    return found
