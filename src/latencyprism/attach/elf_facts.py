"""What was found in a mapped file, kept for the next process that maps the same file.

Ranks of one engine map the same hundreds of libraries, and one process is looked at more than once.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

from .elf import Elf
from .maps import Mapping, open_mapped

# Some 500 files of an engine with a few questions each; beyond that the oldest answers are asked for again.
_MOST = 4096
_kept: dict[tuple[object, ...], Any] = {}
T = TypeVar("T")


def ask(pid: int, mapping: Mapping, question: tuple[object, ...], look: Callable[[Elf], T]) -> T:
    """``look`` at the file behind ``mapping``; the answer to the same ``question`` is kept for that very file
    (device, inode, size, times). Raises TargetRefused when it is out of reach, BadInput when it is no ELF."""
    descriptor = open_mapped(pid, mapping)
    try:
        seen = os.fstat(descriptor)
        key = (seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns, *question)
        if key in _kept:
            known: T = _kept[key]
            return known
        with Elf(descriptor) as elf:
            answer = look(elf)
    finally:
        os.close(descriptor)
    while len(_kept) >= _MOST:
        del _kept[next(iter(_kept))]
    _kept[key] = answer
    return answer
