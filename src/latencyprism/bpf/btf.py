"""BTF, the kernel's type information: as much of it as loading a program needs.

Two users: our own objects (map definitions, data sections to complete, function and relocation records)
and the running kernel's (finding one tracepoint's type number among 150,000 types).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from latencyprism.errors import BadInput, PrismError

_MAGIC = 0xEB9F
_HEADER = struct.Struct("<HBBIIIII")
_TYPE = struct.Struct("<III")
_MEMBER = struct.Struct("<III")
_VMLINUX = Path("/sys/kernel/btf/vmlinux")

INT, PTR, ARRAY, STRUCT, UNION, ENUM, FWD, TYPEDEF = 1, 2, 3, 4, 5, 6, 7, 8
VOLATILE, CONST, RESTRICT, FUNC, FUNC_PROTO, VAR, DATASEC = 9, 10, 11, 12, 13, 14, 15
FLOAT, DECL_TAG, TYPE_TAG, ENUM64 = 16, 17, 18, 19
# Bytes after a type's 12-byte head: (fixed, per element).
_TAIL = {
    INT: (4, 0), PTR: (0, 0), ARRAY: (12, 0), STRUCT: (0, 12), UNION: (0, 12), ENUM: (0, 8), FWD: (0, 0),
    TYPEDEF: (0, 0), VOLATILE: (0, 0), CONST: (0, 0), RESTRICT: (0, 0), FUNC: (0, 0), FUNC_PROTO: (0, 8),
    VAR: (4, 0), DATASEC: (0, 12), FLOAT: (0, 0), DECL_TAG: (4, 0), TYPE_TAG: (0, 0), ENUM64: (0, 12),
}  # fmt: skip


def _broken(why: str) -> BadInput:
    return BadInput("not usable BTF", why)


@dataclass(frozen=True)
class Type:
    """One type: ``at`` is its byte offset in the blob, ``size`` its size or the type it refers to."""

    name: str
    kind: int
    count: int
    size: int
    at: int


class Btf:
    """A parsed blob; ``types[0]`` is void. Raises BadInput when tables do not fit."""

    def __init__(self, data: bytes) -> None:
        self.data = bytearray(data)
        self._types_at, types_size, self._strings_at, self._strings_size = _bounds(data)
        self.types: list[Type] = [Type("void", 0, 0, 0, 0)]
        at, end = self._types_at, self._types_at + types_size
        while at < end:
            if at + 12 > end:
                raise _broken("a type is cut off")
            name, info, size = _TYPE.unpack_from(self.data, at)
            kind, count = info >> 24 & 31, info & 0xFFFF
            if kind not in _TAIL:
                raise _broken(f"type kind {kind}")
            fixed, each = _TAIL[kind]
            self.types.append(Type(self.string(name), kind, count, size, at))
            at += 12 + fixed + each * count
        if at != end:
            raise _broken("types do not end where they should")

    def string(self, offset: int) -> str:
        """The string at ``offset`` of the string table."""
        start = self._strings_at + offset
        end = self.data.find(b"\0", start, self._strings_at + self._strings_size)
        if offset >= self._strings_size or end < 0:
            raise _broken("a name outside of the table")
        return self.data[start:end].decode("utf-8", "replace")

    def type(self, number: int) -> Type:
        if not 0 <= number < len(self.types):
            raise _broken("a type that is not there")
        return self.types[number]

    def members(self, of: Type) -> Iterator[tuple[int, int, int]]:
        """3-word elements of a structure (name, type, bit offset) or data section (type, offset, size)."""
        for index in range(of.count):
            yield _MEMBER.unpack_from(self.data, of.at + 12 + 12 * index)

    def size_of(self, number: int, depth: int = 0) -> int:
        """Size in bytes of a type, through typedefs and qualifiers."""
        if depth > 32:
            raise _broken("types refer to each other in a circle")
        found = self.type(number)
        if found.kind in (INT, STRUCT, UNION, ENUM, FLOAT, DATASEC, ENUM64):
            return found.size
        if found.kind == PTR:
            return 8
        if found.kind == ARRAY:
            element, _, length = struct.unpack_from("<III", self.data, found.at + 12)
            return self.size_of(element, depth + 1) * int(length)
        if found.kind in (TYPEDEF, VOLATILE, CONST, RESTRICT, VAR):
            return self.size_of(found.size, depth + 1)
        raise _broken(f"no size for type kind {found.kind}")

    def array_length(self, number: int) -> int:
        """Length of the array that pointer type ``number`` points to: how map definitions hold numbers."""
        pointee = self.type(self.type(number).size)
        if pointee.kind != ARRAY:
            raise _broken("a map attribute that is not a number")
        length: int = struct.unpack_from("<I", self.data, pointee.at + 20)[0]
        return length

    def complete_data_section(self, section: Type, size: int, offsets: dict[str, int]) -> None:
        """Write a data section's size and its variables' offsets, which compilers leave at zero."""
        struct.pack_into("<I", self.data, section.at + 8, size)
        for index, (variable, _, length) in enumerate(list(self.members(section))):
            name = self.type(variable).name
            if name not in offsets:
                raise _broken(f"variable {name} has no symbol")
            where = section.at + 12 + 12 * index
            _MEMBER.pack_into(self.data, where, variable, offsets[name], length)


def _bounds(data: bytes) -> tuple[int, int, int, int]:
    """(types at, size, strings at, size), checked against the blob."""
    if len(data) < _HEADER.size:
        raise _broken("too short")
    magic, version, _, header, types_at, types_size, strings_at, strings_size = _HEADER.unpack_from(data)
    if magic != _MAGIC or version != 1 or header < _HEADER.size:
        raise _broken("wrong header")
    types_at += header
    strings_at += header
    if types_at + types_size > len(data) or strings_at + strings_size > len(data):
        raise _broken("a table lies outside")
    return types_at, types_size, strings_at, strings_size


def parse_ext(data: bytes, btf: Btf) -> dict[str, tuple[bytes, bytes]]:
    """``.BTF.ext`` as {section name: (func_info, core_relos)} in the form that bpf(2) takes.

    func_info offsets are turned from bytes into instructions; relocations keep bytes, as the kernel wants.
    """
    if len(data) < 24 or struct.unpack_from("<HB", data)[:2] != (_MAGIC, 1):
        raise _broken("wrong .BTF.ext header")
    header, functions_at, functions_size, _, _ = struct.unpack_from("<IIIII", data, 4)
    relocations_at, relocations_size = (
        struct.unpack_from("<II", data, 24) if header >= 32 <= len(data) else (0, 0)
    )
    functions = _by_section(data, header + functions_at, functions_size, 8, btf)
    relocations = _by_section(data, header + relocations_at, relocations_size, 16, btf)
    result = {}
    for name, records in functions.items():
        scaled = b"".join(
            struct.pack("<II", at // 8, kind) for at, kind in struct.iter_unpack("<II", records)
        )
        result[name] = (scaled, relocations.get(name, b""))
    return result


def _by_section(data: bytes, start: int, size: int, expected: int, btf: Btf) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    if size == 0:
        return found
    if start + size > len(data) or size < 4:
        raise _broken("a table of .BTF.ext lies outside")
    record_size: int = struct.unpack_from("<I", data, start)[0]
    if record_size != expected:
        raise _broken("records of .BTF.ext of another size")
    at, end = start + 4, start + size
    while at < end:
        if at + 8 > end:
            raise _broken("a table of .BTF.ext is cut off")
        name, count = struct.unpack_from("<II", data, at)
        length = count * record_size
        at += 8
        if at + length > end:
            raise _broken("a table of .BTF.ext is cut off")
        found[btf.string(name)] = data[at : at + length]
        at += length
    return found


def kernel_type(kind: int, names: list[str], path: Path = _VMLINUX) -> dict[str, int]:
    """Type numbers in the running kernel's BTF of the given kind and names; those not there are left out.

    Walks the types without building anything: about 50 ms for the 5 MB of a distribution kernel.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise PrismError(
            "cannot read the kernel's type information", f"{path}: {error.strerror}",
            "The kernel must be built with CONFIG_DEBUG_INFO_BTF.",
        ) from None  # fmt: skip
    types_at, types_size, strings_at, strings_size = _bounds(data)
    strings = data[strings_at : strings_at + strings_size]
    wanted = {}
    for name in names:
        offset = strings.find(b"\0" + name.encode() + b"\0")
        if offset >= 0:
            wanted[offset + 1] = name
    return _walk(data[types_at : types_at + types_size], kind, wanted)


def tracepoint_types(names: list[str]) -> dict[str, int]:
    """{tracepoint: type number to attach a tp_btf program to}; PrismError when one is not there."""
    found = kernel_type(TYPEDEF, [f"btf_trace_{name}" for name in names])
    for name in names:
        if f"btf_trace_{name}" not in found:
            raise PrismError("cannot trace the kernel", f"this kernel has no tracepoint {name}")
    return {name: found[f"btf_trace_{name}"] for name in names}


def _walk(types: bytes, kind: int, wanted: dict[int, str]) -> dict[str, int]:
    tails = [_TAIL.get(index, (0, 0)) for index in range(32)]
    found: dict[str, int] = {}
    at, end, number = 0, len(types) - 11, 0
    unpack = struct.Struct("<II").unpack_from
    while at < end and len(found) < len(wanted):
        name, info = unpack(types, at)
        number += 1
        of = info >> 24 & 31
        if of == kind and name in wanted:
            found[wanted[name]] = number
        fixed, each = tails[of]
        at += 12 + fixed + each * (info & 0xFFFF)
    return found
