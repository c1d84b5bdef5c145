"""Symbols of an ELF64 file, read with every offset checked: the file may be broken or made to break a reader.

Files are read with ``pread``, not mapped: a mapped file that shrinks would end this process with SIGBUS.
"""

from __future__ import annotations

import os
import struct
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from ..errors import BadInput

EM_X86_64, EM_AARCH64 = 62, 183
PT_LOAD, PT_INTERP = 1, 3
_SHT_SYMTAB, _SHT_DYNSYM = 2, 11
_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_PROGRAM = struct.Struct("<IIQQQQQQ")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
# A symbol or string table above this is not read: 256 MiB is ten times that of libtorch.
_TABLE_LIMIT = 256 << 20
_PIECE = 1 << 20
_MAX_SEGMENTS, _MAX_SECTIONS = 4096, 65535


@dataclass(frozen=True, slots=True)
class Symbol:
    """``value``: virtual address before relocation; ``size`` in bytes; ``kind``: 1 object, 2 function."""

    value: int
    size: int
    kind: int
    section: int


@dataclass(frozen=True, slots=True)
class Segment:
    """A PT_LOAD or other program header; addresses and sizes in bytes, ``flags`` PF_X 1, PF_W 2, PF_R 4."""

    kind: int
    flags: int
    offset: int
    vaddr: int
    file_size: int
    memory_size: int


@dataclass(frozen=True, slots=True)
class _Section:
    name: int
    kind: int
    address: int
    offset: int
    size: int
    link: int
    entry_size: int


class Elf:
    """One ELF64 little-endian file given as bytes, as a path or as an open descriptor (which stays open).

    Raises BadInput when it is not such a file or its tables lie outside of it.
    """

    def __init__(self, source: bytes | str | os.PathLike[str] | int) -> None:
        self._bytes: bytes | None = None
        self._descriptor = -1
        self._owned = False
        if isinstance(source, (bytes, bytearray, memoryview)):
            self._bytes = bytes(source)
            self._size = len(self._bytes)
        else:
            self._open(source)
        try:
            self._parse()
        except BaseException:
            self.close()
            raise

    def _open(self, source: str | os.PathLike[str] | int) -> None:
        try:
            if isinstance(source, int):
                self._descriptor = source
            else:
                self._descriptor, self._owned = os.open(source, os.O_RDONLY | os.O_CLOEXEC), True
            self._size = os.fstat(self._descriptor).st_size
        except OSError as error:
            self.close()
            raise BadInput("cannot read the ELF file", error.strerror or str(error)) from None

    def close(self) -> None:
        """Close what this object opened itself; safe to repeat."""
        if self._owned:
            self._owned = False
            os.close(self._descriptor)

    def __enter__(self) -> Elf:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, offset: int, size: int) -> bytes:
        """Exactly ``size`` bytes at ``offset`` of the file; raises BadInput when they are not all there."""
        if offset < 0 or size < 0 or offset + size > self._size:
            raise BadInput("not a usable ELF file", "a table lies outside of the file")
        if self._bytes is not None:
            return self._bytes[offset : offset + size]
        try:
            data = os.pread(self._descriptor, size, offset)
            while 0 < len(data) < size:
                more = os.pread(self._descriptor, size - len(data), offset + len(data))
                if not more:
                    break
                data += more
        except OSError as error:
            raise BadInput("cannot read the ELF file", error.strerror or str(error)) from None
        if len(data) != size:
            raise BadInput("not a usable ELF file", "it shrank while it was read")
        return data

    def _parse(self) -> None:
        header = _HEADER.unpack(self.read(0, _HEADER.size))
        ident: bytes = header[0]
        if ident[:4] != b"\x7fELF":
            raise BadInput("not an ELF file", "wrong magic")
        if ident[4] != 2 or ident[5] != 1:
            raise BadInput("not a usable ELF file", "only 64-bit little-endian files are understood")
        self.type: int = header[1]
        self.machine: int = header[2]
        program_offset, section_offset = header[5], header[6]
        program_size, program_count, section_size, section_count, self._names_at = header[9:14]
        self.segments = list(self._segments(program_offset, program_size, program_count))
        self._sections = list(self._section_headers(section_offset, section_size, section_count))

    def _segments(self, offset: int, entry: int, count: int) -> Iterator[Segment]:
        if count == 0:
            return
        if entry != _PROGRAM.size or count > _MAX_SEGMENTS:
            raise BadInput("not a usable ELF file", "odd program headers")
        for kind, flags, start, vaddr, _, file_size, memory_size, _ in _PROGRAM.iter_unpack(
            self.read(offset, entry * count)
        ):
            yield Segment(kind, flags, start, vaddr, file_size, memory_size)

    def _section_headers(self, offset: int, entry: int, count: int) -> Iterator[_Section]:
        # Stripped of its section headers a file still loads; it then simply has no symbols for us.
        if offset == 0 or count == 0:
            return
        if entry != _SECTION.size or count > _MAX_SECTIONS:
            raise BadInput("not a usable ELF file", "odd section headers")
        for fields in _SECTION.iter_unpack(self.read(offset, entry * count)):
            yield _Section(fields[0], fields[1], fields[3], fields[4], fields[5], fields[6], fields[9])

    def section(self, name: str) -> tuple[int, int] | None:
        """(virtual address, size) of the first section of that name; None when there is none."""
        if not 0 < self._names_at < len(self._sections):
            return None
        table = self._sections[self._names_at]
        if table.size > _TABLE_LIMIT:
            return None
        names, wanted = self.read(table.offset, table.size), name.encode() + b"\0"
        for section in self._sections:
            if names.startswith(wanted, section.name):
                return section.address, section.size
        return None

    def _tables(self) -> Iterator[tuple[_Section, _Section]]:
        """(symbol table, its string table), the dynamic one first."""
        for wanted in (_SHT_DYNSYM, _SHT_SYMTAB):
            for section in self._sections:
                if section.kind != wanted or section.entry_size != _SYMBOL.size:
                    continue
                if section.link >= len(self._sections):
                    raise BadInput("not a usable ELF file", "a symbol table without names")
                names = self._sections[section.link]
                if max(section.size, names.size) > _TABLE_LIMIT:
                    raise BadInput("not a usable ELF file", "a symbol table beyond reason")
                yield section, names

    def lookup(self, names: Iterable[str]) -> dict[str, Symbol]:
        """The defined symbols among ``names``; missing ones are left out. Tables are gone through piece by
        piece: those of a large library have hundreds of megabytes."""
        wanted = set(names)
        found: dict[str, Symbol] = {}
        for table, strings in self._tables():
            if wanted <= found.keys():
                break
            places = self._places(strings, wanted - found.keys())
            for offset, symbol in sorted(self._defined_at(table, places).items()):
                found.setdefault(places[offset], symbol)
        return found

    def _places(self, strings: _Section, names: set[str]) -> dict[int, str]:
        """Where in a string table names are: linkers let one string be the tail of another, so every place
        where a name ends a string counts."""
        needles = {name.encode("utf-8", "surrogateescape") + b"\0": name for name in names if name}
        needles = {needle: name for needle, name in needles.items() if needle.count(b"\0") == 1}
        overlap = max(map(len, needles), default=1) - 1
        found: dict[int, str] = {}
        for start in range(0, strings.size, _PIECE):
            piece = self.read(strings.offset + start, min(_PIECE + overlap, strings.size - start))
            for needle, name in needles.items():
                at = piece.find(needle)
                while at >= 0:
                    found[start + at] = name
                    at = piece.find(needle, at + 1)
        return found

    def _defined_at(self, table: _Section, places: Mapping[int, str]) -> dict[int, Symbol]:
        """The first defined symbol at each place of the string table."""
        found: dict[int, Symbol] = {}
        whole = table.size - table.size % _SYMBOL.size
        step = _PIECE - _PIECE % _SYMBOL.size
        for start in range(0, whole if places else 0, step):
            piece = self.read(table.offset + start, min(step, whole - start))
            column = array("I", piece)[0 :: _SYMBOL.size // 4]
            for place in places.keys() & set(column):
                for index in (index for index, value in enumerate(column) if value == place):
                    _, info, _, section, value, size = _SYMBOL.unpack_from(piece, index * _SYMBOL.size)
                    if section != 0:
                        found.setdefault(place, Symbol(value, size, info & 15, section))
        return found

    def symbols(self) -> dict[str, Symbol]:
        """Every defined symbol by name; of two with one name the dynamic, then the first, stays."""
        found: dict[str, Symbol] = {}
        for symbols_at, names_at in self._tables():
            table = self.read(symbols_at.offset, symbols_at.size - symbols_at.size % _SYMBOL.size)
            strings = self.read(names_at.offset, names_at.size)
            for offset, info, _, section, value, size in _SYMBOL.iter_unpack(table):
                if section == 0 or offset >= len(strings):
                    continue
                end = strings.find(b"\0", offset)
                name = strings[offset : end if end >= 0 else len(strings)]
                if name:
                    found.setdefault(
                        name.decode("utf-8", "surrogateescape"), Symbol(value, size, info & 15, section)
                    )
        return found

    def file_offset(self, vaddr: int) -> int | None:
        """Where in the file the byte of address ``vaddr`` lies (what a uprobe wants); None if nowhere."""
        for segment in self.segments:
            if segment.kind == PT_LOAD and 0 <= vaddr - segment.vaddr < segment.file_size:
                return vaddr - segment.vaddr + segment.offset
        return None

    def find_code(self, pattern: bytes) -> int | None:
        """Virtual address of the first occurrence of ``pattern`` in an executable segment."""
        for segment in self.segments:
            if segment.kind != PT_LOAD or not segment.flags & 1 or segment.file_size > _TABLE_LIMIT:
                continue
            at = self.read(segment.offset, segment.file_size).find(pattern)
            if at >= 0:
                return segment.vaddr + at
        return None

    def interpreter(self) -> str | None:
        """Path of the dynamic loader the file asks for; None for a static file or a library."""
        for segment in self.segments:
            if segment.kind == PT_INTERP and 0 < segment.file_size <= 4096:
                return self.read(segment.offset, segment.file_size).rstrip(b"\0").decode("utf-8", "replace")
        return None


def symbols(
    source: bytes | str | os.PathLike[str] | int, names: Iterable[str] | None = None
) -> dict[str, Symbol]:
    """Defined symbols of an ELF64 file (path, bytes, descriptor): all, or only ``names``. Raises BadInput."""
    with Elf(source) as elf:
        return elf.symbols() if names is None else elf.lookup(names)
