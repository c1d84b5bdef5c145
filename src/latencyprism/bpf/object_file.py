"""A compiled eBPF object (ELF64, little endian, relocatable): sections, symbols, relocations.

Every offset is checked before use, so a broken file gives BadInput and nothing else.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from latencyprism.errors import BadInput

_EM_BPF, _ET_REL = 247, 1
_SHT_NOBITS, _SHT_SYMTAB, _SHT_REL = 8, 2, 9
_SHF_EXECINSTR = 4
_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_RELOCATION = struct.Struct("<QQ")
_MAX_BYTES = 16 << 20


@dataclass(frozen=True)
class Relocation:
    """Byte ``offset`` in the section refers to symbol ``symbol``; ``kind`` is R_BPF_*."""

    offset: int
    kind: int
    symbol: int


@dataclass
class Section:
    name: str
    data: bytes
    """Content; zeros for a section without content in the file."""
    executable: bool
    relocations: list[Relocation] = field(default_factory=list)


@dataclass(frozen=True)
class ObjectSymbol:
    name: str
    section: int
    value: int
    size: int
    kind: int


@dataclass
class ObjectFile:
    sections: list[Section]
    symbols: list[ObjectSymbol]

    def section(self, name: str) -> Section | None:
        """The section of that name, None if there is none."""
        return next((section for section in self.sections if section.name == name), None)


def _broken(why: str) -> BadInput:
    return BadInput("not a usable eBPF object", why, "Reinstall the package.")


def _slice(data: bytes, offset: int, size: int) -> bytes:
    if offset + size > len(data):
        raise _broken("a table lies outside of the file")
    return data[offset : offset + size]


def _string(table: bytes, offset: int) -> str:
    end = table.find(b"\0", offset)
    if offset >= len(table) or end < 0:
        raise _broken("a name lies outside of its table")
    return table[offset:end].decode("utf-8", "replace")


def parse_object(data: bytes) -> ObjectFile:
    """Sections, symbols and relocations of an object file. Raises BadInput on anything odd."""
    if len(data) > _MAX_BYTES:
        raise _broken("larger than any object of ours")
    header = _HEADER.unpack(_slice(data, 0, _HEADER.size))
    ident: bytes = header[0]
    if ident[:4] != b"\x7fELF" or ident[4] != 2 or ident[5] != 1:
        raise _broken("not a little-endian ELF64 file")
    if header[1] != _ET_REL or header[2] != _EM_BPF:
        raise _broken("not a relocatable file for eBPF")
    start, entry, count, names_at = header[6], header[11], header[12], header[13]
    if entry != _SECTION.size or names_at >= count:
        raise _broken("odd section headers")
    raw = list(_SECTION.iter_unpack(_slice(data, start, entry * count)))
    names = _slice(data, raw[names_at][4], raw[names_at][5])
    sections = []
    for name, kind, flags, _, offset, size, *_rest in raw:
        if kind == _SHT_NOBITS and size > _MAX_BYTES:
            raise _broken("a section larger than any of ours")
        content = bytes(size) if kind == _SHT_NOBITS else (b"" if kind == 0 else _slice(data, offset, size))
        sections.append(Section(_string(names, name), content, bool(flags & _SHF_EXECINSTR)))
    symbols = _symbols(raw, sections)
    _relocations(raw, sections, len(symbols))
    return ObjectFile(sections, symbols)


def _symbols(raw: list[tuple[int, ...]], sections: list[Section]) -> list[ObjectSymbol]:
    for index, header in enumerate(raw):
        if header[1] != _SHT_SYMTAB:
            continue
        if header[6] >= len(sections) or len(sections[index].data) % _SYMBOL.size:
            raise _broken("odd symbol table")
        strings = sections[header[6]].data
        return [
            ObjectSymbol(_string(strings, name), section, value, size, info & 15)
            for name, info, _, section, value, size in _SYMBOL.iter_unpack(sections[index].data)
        ]
    raise _broken("no symbols")


def _relocations(raw: list[tuple[int, ...]], sections: list[Section], symbols: int) -> None:
    for index, header in enumerate(raw):
        if header[1] != _SHT_REL:
            continue
        target = header[7]
        if target >= len(sections) or len(sections[index].data) % _RELOCATION.size:
            raise _broken("odd relocations")
        for offset, info in _RELOCATION.iter_unpack(sections[index].data):
            if info >> 32 >= symbols or offset >= max(len(sections[target].data), 1):
                raise _broken("a relocation points outside of the file")
            sections[target].relocations.append(Relocation(offset, info & 0xFFFFFFFF, info >> 32))
