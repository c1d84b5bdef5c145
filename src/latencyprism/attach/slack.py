"""Room for a short text in a target that asks it for nothing: no allocation, no new mapping.

The zero-initialised data of a loaded library ends somewhere in a page; the rest of that page is mapped,
writable, zero and used by nobody. Texts are put there and the zeros put back after use.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import BadInput, TargetRefused
from .elf import PT_LOAD, Segment
from .elf_facts import ask
from .interpreter import executables, load_base
from .maps import PAGE, Mapping
from .memory import read_memory, write_memory
from .process import PID_LIMIT

# A static interpreter maps few libraries, so a small place is better than none.
SLOT_SIZES = (512, 384, 256)
SLOT_BYTES = SLOT_SIZES[0]
# One slot per text, used in turn: a text that runs late must not find another in its place.
MAX_SLOTS = 8
_MARGIN = 64
# Every text begins with a comment that names its writer, so that what a killed one left can be taken away.
_MARK = re.compile(rb"#lp([0-9a-f]{1,7})\n")
_MARK_BYTES = len(f"#lp{PID_LIMIT:x}\n")
MAX_TEXT_BYTES = SLOT_BYTES - 1 - _MARK_BYTES


@dataclass(frozen=True, slots=True)
class Slot:
    """``size`` unused bytes at ``address`` in the target."""

    pid: int
    address: int
    size: int = SLOT_BYTES

    @property
    def text_bytes(self) -> int:
        """The longest text that fits."""
        return self.size - 1 - _MARK_BYTES

    def is_free(self) -> bool:
        return not any(read_memory(self.pid, self.address, self.size))

    def put(self, text: bytes) -> None:
        """Write a text of at most ``text_bytes`` and its terminating zero.

        Raises TargetRefused when the place is not all zero.
        """
        if not self.is_free():
            raise TargetRefused(f"no room in process {self.pid}", "memory that should be unused is not")
        write_memory(self.pid, self.address, b"#lp%x\n%b\0" % (os.getpid(), text))

    def reclaim(self) -> bool:
        """Take away the text of a writer that is gone; True when there was one."""
        mark = _MARK.match(read_memory(self.pid, self.address, self.size))
        if mark is None or os.path.exists(f"/proc/{int(mark[1], 16)}"):
            return False
        self.clear()
        return True

    def clear(self) -> None:
        """Zeros again, if a text is still there (the process may have become another program by execve).

        The first byte goes first: from then on a late reader finds an empty program.
        """
        if _MARK.match(read_memory(self.pid, self.address, self.size)) is None:
            return
        write_memory(self.pid, self.address, b"\0")
        write_memory(self.pid, self.address, bytes(self.size))


def _loader(path: str) -> bool:
    # The dynamic loader allocates from the rest of its own last page.
    name = os.path.basename(path)
    return name.startswith(("ld-linux", "ld-2.", "ld.so", "ld64"))


def _tail(segments: Sequence[Segment], base: int) -> tuple[int, int] | None:
    """Addresses from the end of the last segment to the end of its page."""
    ends = [(one.vaddr + one.memory_size, one.flags) for one in segments if one.kind == PT_LOAD]
    if not ends:
        return None
    end, flags = max(ends)
    last = base + end + -(base + end) % PAGE
    return (base + end, last) if flags & 2 else None


def find_slots(pid: int, maps: list[Mapping]) -> list[Slot]:
    """Unused slots, the roomiest pages first, at most one per page; an empty list when there are none.

    Nothing is changed but that what a killed watcher left is taken away.
    """
    tails = []
    heap = min((one.start for one in maps if one.path == "[heap]"), default=0)
    for group in executables(maps).values():
        if _loader(group[0].path):
            continue
        tail = _tail_of(pid, group)
        # With address randomisation off the heap of the executable begins right behind its data.
        if tail is not None and not tail[0] <= heap <= tail[1] and _writable(maps, tail):
            tails.append(tail)
    tails.sort(key=lambda tail: tail[0] - tail[1])
    slots = [Slot(pid, end - size, size) for start, end in tails if (size := _fitting(end - start))]
    return [slot for slot in slots[: 4 * MAX_SLOTS] if _unused(slot)][:MAX_SLOTS]


def _fitting(room: int) -> int:
    """The largest slot for so much room, 0 for none; the margin keeps off the library's own last bytes."""
    return next((size for size in SLOT_SIZES if room >= size + _MARGIN), 0)


def _tail_of(pid: int, group: list[Mapping]) -> tuple[int, int] | None:
    try:
        segments = ask(pid, group[0], ("segments",), lambda elf: tuple(elf.segments))
    except (TargetRefused, BadInput):
        return None
    base = load_base(segments, group)
    return None if base is None else _tail(segments, base)


def _writable(maps: list[Mapping], tail: tuple[int, int]) -> bool:
    return any(one.start <= tail[0] and tail[1] <= one.end and one.perms[:2] == "rw" for one in maps) or any(
        one.start <= tail[1] - SLOT_SIZES[-1] and tail[1] <= one.end and one.perms[:2] == "rw" for one in maps
    )


def _unused(slot: Slot) -> bool:
    try:
        return slot.is_free() or slot.reclaim()
    except TargetRefused:
        return False
