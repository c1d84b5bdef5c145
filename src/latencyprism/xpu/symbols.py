"""Which functions of which accelerator libraries are worth a probe, and what is there in a given process."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

from latencyprism.attach.elf import Elf
from latencyprism.attach.maps import Mapping, open_mapped, read_maps
from latencyprism.bpf.native import entry_offset
from latencyprism.bpf.stubs import OTHER, class_of
from latencyprism.errors import PrismError
from latencyprism.tomlfile import parse_toml

KINDS = ("launch", "graph", "copy", "wait", "memory", "matmul", "communicator", "collective", "group")
_SO_VERSION = re.compile(r"\.so\.(\d+)")


@dataclass(frozen=True, slots=True)
class Function:
    """``integers``: {what: position among the integer registers}, as ``{"communicator": 5}``."""

    name: str
    kind: str
    twin: str
    integers: tuple[tuple[str, int], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The symbol and its twin for programs with a stream per thread."""
        return (self.name, self.name + self.twin) if self.twin else (self.name,)


@dataclass(frozen=True, slots=True)
class Library:
    """``since`` <= major version < ``below`` was checked; another is tried, and said to be unchecked."""

    vendor: str
    name: str
    file: re.Pattern[str]
    since: int
    below: int
    functions: tuple[Function, ...]


class Symbol(NamedTuple):
    """A function found in a mapped file. ``prologue``: a class of ``bpf.stubs`` (``push`` and ``nop`` are
    cheap to probe, ``other`` costs about ten times as much); ``endbr64+`` before it: probed behind that.
    ``offset``: in the file, where it is probed; None: not found out."""

    name: str
    kind: str
    function: Function
    prologue: str
    offset: int | None = None

    @property
    def probed_class(self) -> str:
        """The class that sets the price of a probe (``bpf.prices``)."""
        return self.prologue.removeprefix("endbr64+")


@dataclass(frozen=True, slots=True)
class Mapped:
    """A known library as one process maps it. ``note``: why its symbols may not fit, or could not be read."""

    library: Library
    mapping: Mapping
    version: int | None
    symbols: tuple[Symbol, ...]
    note: str | None


@cache
def load_libraries() -> tuple[Library, ...]:
    """Everything in ``symbols.toml``."""
    text = files("latencyprism.xpu").joinpath("symbols.toml").read_text(encoding="utf-8")
    table = parse_toml(text, "the accelerator symbols")
    return tuple(_library(entry) for entry in table["library"])


def _library(entry: dict[str, Any]) -> Library:
    functions = tuple(
        Function(
            each["name"],
            each["kind"],
            each.get("twin", entry["twin"]),
            tuple((name, int(at)) for name, at in each.get("integers", {}).items()),
        )
        for each in entry["functions"]
    )
    pattern = re.compile(entry["file"])
    return Library(entry["vendor"], entry["name"], pattern, entry["from"], entry["below"], functions)


def find_libraries(pid: int, kinds: Sequence[str] = KINDS) -> list[Mapped]:
    """The known libraries that ``pid`` maps, each file once, with those of their functions that are there.

    Raises TargetRefused when the map may not be read. A file that cannot be read has a ``note`` instead."""
    found: dict[tuple[str, int, str], Mapped] = {}
    for mapping in read_maps(pid):
        if mapping.file in found or not mapping.inode or "x" not in mapping.perms:
            continue
        base = os.path.basename(mapping.path)
        library = next((known for known in load_libraries() if known.file.match(base)), None)
        if library is not None:
            found[mapping.file] = _look(pid, mapping, library, kinds)
    return list(found.values())


def _look(pid: int, mapping: Mapping, library: Library, kinds: Sequence[str]) -> Mapped:
    match = _SO_VERSION.search(mapping.path)
    version = int(match[1]) if match else None
    note = None
    if version is not None and not library.since <= version < library.below:
        note = f"{library.name} {version} is outside the versions that were checked"
    try:
        descriptor = open_mapped(pid, mapping)
        try:
            with Elf(descriptor) as elf:
                symbols = _symbols(elf, library, kinds)
        finally:
            os.close(descriptor)
    except PrismError as error:
        return Mapped(library, mapping, version, (), str(error))
    return Mapped(library, mapping, version, symbols, note)


def _symbols(elf: Elf, library: Library, kinds: Sequence[str]) -> tuple[Symbol, ...]:
    wanted = {
        name: function for function in library.functions for name in function.names if function.kind in kinds
    }
    there = elf.lookup(wanted)
    return tuple(
        Symbol(
            name,
            function.kind,
            function,
            prologue(elf, there[name].value),
            entry_offset(elf, there[name].value),
        )
        for name, function in wanted.items()
        if name in there
    )


def prologue(elf: Elf, vaddr: int) -> str:
    """How a function begins; see ``Symbol``."""
    begin, probed = elf.file_offset(vaddr), entry_offset(elf, vaddr)
    if begin is None or probed is None:
        return OTHER
    kind = class_of(elf.read(probed, 8))
    return f"endbr64+{kind}" if probed != begin else kind
