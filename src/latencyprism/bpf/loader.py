"""Load a prebuilt eBPF object: create its maps, set its constants, relocate and verify its programs."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources

from latencyprism.bpf import kernel
from latencyprism.bpf.btf import DATASEC, FUNC, STRUCT, TYPEDEF, Btf, kernel_type, parse_ext
from latencyprism.bpf.object_file import ObjectFile, Section, parse_object
from latencyprism.errors import BadInput, PrismError

_R_64 = 1
_PSEUDO_MAP_FD, _PSEUDO_MAP_VALUE, _PSEUDO_FUNC = 1, 2, 4
_TEXT = ".text"
_DATA_SECTIONS = (".rodata", ".bss", ".data")
_LOAD_IMM64 = 0x18
_KERNEL_FUNCTIONS = {
    bytes((0x85, 0x20, 0, 0, 0x51, 0xE5, 0x51, 0xE5)): "bpf_session_cookie",
    bytes((0x85, 0x20, 0, 0, 0x52, 0xE5, 0x52, 0xE5)): "bpf_session_is_return",
}


@dataclass(frozen=True)
class LoadedMap:
    """A map in the kernel; sizes in bytes, ``entries`` is bytes for a ring buffer."""

    descriptor: int
    kind: int
    key_size: int
    value_size: int
    entries: int

    def __setitem__(self, key: int, value: bytes) -> None:
        kernel.map_update(self.descriptor, key.to_bytes(self.key_size, "little"), value)

    def __delitem__(self, key: int) -> None:
        kernel.map_delete(self.descriptor, key.to_bytes(self.key_size, "little"))


def read_object(name: str) -> bytes:
    """The bytes of a packaged object, such as ``sched``."""
    try:
        return resources.files("latencyprism.bpf").joinpath("programs", f"{name}.bpf.o").read_bytes()
    except OSError as error:
        raise PrismError(
            f"the eBPF object {name} is missing", error.strerror or "", "Reinstall the package."
        ) from None


class LoadedObject:
    """Maps and programs of one object, in the kernel until ``close``.

    ``constants`` sets variables of ``.rodata`` (numbers, or lists for arrays) before programs are
    verified; ``entries`` overrides a map's size. Variables of ``.bss`` are read with ``counter``.
    Programs are loaded one by one with ``load``, so that only what is needed is verified.
    """

    def __init__(
        self,
        data: bytes,
        constants: Mapping[str, int] | None = None,
        entries: Mapping[str, int] | None = None,
    ) -> None:
        self._descriptors: list[int] = []
        self._memory: mmap.mmap | bytes = b""
        self.maps: dict[str, LoadedMap] = {}
        self._object = parse_object(data)
        self._variables = self._place_variables()
        try:
            self._load_types()
            self._create_maps(dict(entries or {}))
            self._create_data(dict(constants or {}))
        except BaseException:
            self.close()
            raise

    def _place_variables(self) -> dict[str, tuple[int, int, int]]:
        """{variable: (section number, offset, size)}"""
        names = {index: section.name for index, section in enumerate(self._object.sections)}
        return {
            symbol.name: (symbol.section, symbol.value, symbol.size)
            for symbol in self._object.symbols
            if symbol.kind == 1 and symbol.section in names
        }

    def _keep(self, descriptor: int) -> int:
        self._descriptors.append(descriptor)
        return descriptor

    def _load_types(self) -> None:
        types, extra = self._object.section(".BTF"), self._object.section(".BTF.ext")
        if types is None or extra is None:
            raise BadInput("not a usable eBPF object", "it carries no type information")
        self._btf = Btf(types.data)
        offsets = {name: place[1] for name, place in self._variables.items()}
        for kind in self._btf.types:
            if kind.kind == DATASEC:
                section = self._object.section(kind.name)
                self._btf.complete_data_section(kind, len(section.data) if section else 0, offsets)
        self._info = parse_ext(extra.data, self._btf)
        self._btf_descriptor = self._keep(kernel.btf_load(bytes(self._btf.data)))

    def _create_maps(self, entries: dict[str, int]) -> None:
        section = next((t for t in self._btf.types if t.kind == DATASEC and t.name == ".maps"), None)
        for variable, _, _ in list(self._btf.members(section)) if section else []:
            of = self._btf.type(variable)
            definition = self._btf.type(of.size)
            while definition.kind == TYPEDEF:
                definition = self._btf.type(definition.size)
            if definition.kind != STRUCT:
                raise BadInput("not a usable eBPF object", f"map {of.name} has no definition")
            fields = {self._btf.string(name): kind for name, kind, _ in self._btf.members(definition)}
            key = self._btf.size_of(self._btf.type(fields["key"]).size) if "key" in fields else 0
            value = self._btf.size_of(self._btf.type(fields["value"]).size) if "value" in fields else 0
            kind = self._btf.array_length(fields["type"]) if "type" in fields else 0
            count = self._btf.array_length(fields["max_entries"]) if "max_entries" in fields else 0
            count = entries.get(of.name, count)
            descriptor = self._keep(kernel.map_create(kind, key, value, count, 0, of.name))
            self.maps[of.name] = LoadedMap(descriptor, kind, key, value, count)

    def _create_data(self, constants: dict[str, int]) -> None:
        """One array map per data section; constants are written and frozen, counters are mapped here."""
        for index, section in enumerate(self._object.sections):
            if section.name not in _DATA_SECTIONS or not section.data:
                continue
            content = bytearray(section.data)
            constant = section.name == ".rodata"
            if constant:
                self._set_constants(index, content, constants)
            flags = kernel.F_RDONLY_PROG if constant else kernel.F_MMAPABLE
            descriptor = self._keep(
                kernel.map_create(kernel.MAP_ARRAY, 4, len(content), 1, flags, section.name.replace(".", ""))
            )
            kernel.map_update(descriptor, bytes(4), bytes(content))
            self.maps[section.name] = LoadedMap(descriptor, kernel.MAP_ARRAY, 4, len(content), 1)
            if constant:
                kernel.map_freeze(descriptor)
            elif section.name == ".bss":
                self._memory = mmap.mmap(descriptor, mmap.PAGESIZE, mmap.MAP_SHARED, mmap.PROT_READ)
        if constants:
            raise BadInput("cannot configure the eBPF object", f"no constant {next(iter(constants))}")

    def _set_constants(self, index: int, content: bytearray, constants: dict[str, int]) -> None:
        for name, (section, offset, size) in self._variables.items():
            if section == index and name in constants:
                content[offset : offset + size] = constants.pop(name).to_bytes(size, "little")

    def counter(self, name: str) -> int:
        """An integer variable of ``.bss``, read from shared memory without a system call; after ``close`` its
        last value."""
        section, offset, size = self._variables[name]
        if self._object.sections[section].name != ".bss":
            raise KeyError(name)
        return int.from_bytes(self._memory[offset : offset + size], "little")

    def load(self, section_name: str, kind: int, attach_type: int = 0, attach_btf_id: int = 0) -> int:
        """Verify the program of a section; the descriptor stays owned by this object."""
        section = self._object.section(section_name)
        if section is None or not section.executable:
            raise BadInput("not a usable eBPF object", f"no program {section_name}")
        code, needs_text = self._relocate(section, len(section.data))
        functions, relocations = self._info.get(section_name, (b"", b""))
        text = self._object.section(_TEXT)
        if needs_text and text is not None:
            # Functions that are called back lie in a section of their own and are appended.
            at = len(code)
            more_functions, more_relocations = self._info.get(_TEXT, (b"", b""))
            functions += _moved(more_functions, "<II", at // 8)
            relocations += _moved(more_relocations, "<IIII", at)
            code += self._relocate(text, 0)[0]
        code = _with_kernel_functions(code)
        return self._keep(
            kernel.program_load(
                kind,
                section_name.split("/")[-1],
                code,
                btf=self._btf_descriptor,
                func_info=functions,
                core_relocations=relocations,
                attach_type=attach_type,
                attach_btf_id=attach_btf_id,
            )
        )

    def _relocate(self, section: Section, text_at: int) -> tuple[bytes, bool]:
        """Put map descriptors and function addresses in where instructions refer to them.

        ``text_at``: byte at which ``.text`` will follow. Returns the code and whether it needs ``.text``.
        """
        code = bytearray(section.data)
        needs_text = False
        for relocation in section.relocations:
            at = relocation.offset
            if relocation.kind != _R_64 or at % 8 or at + 16 > len(code) or code[at] != _LOAD_IMM64:
                raise BadInput("not a usable eBPF object", "a relocation of an unknown kind")
            symbol = self._object.symbols[relocation.symbol]
            target = _name_of(self._object, symbol.section)
            addend: int = struct.unpack_from("<I", code, at + 4)[0]
            if target == _TEXT and section.name != _TEXT:
                needs_text = True
                source, low, high = _PSEUDO_FUNC, (text_at + symbol.value + addend - at) // 8 - 1, 0
            elif target == ".maps" and symbol.name in self.maps:
                source, low, high = _PSEUDO_MAP_FD, self.maps[symbol.name].descriptor, 0
            elif target in self.maps:
                source, low = _PSEUDO_MAP_VALUE, self.maps[target].descriptor
                high = symbol.value + addend
            else:
                raise BadInput("not a usable eBPF object", f"a reference to unknown {symbol.name or target}")
            code[at + 1] = code[at + 1] & 0x0F | source << 4
            struct.pack_into("<I", code, at + 4, low)
            struct.pack_into("<I", code, at + 12, high)
        return bytes(code), needs_text

    def close(self) -> None:
        """Give everything back to the kernel; safe to repeat."""
        if isinstance(self._memory, mmap.mmap):
            last = self._memory[:]
            self._memory.close()
            self._memory = last
        while self._descriptors:
            os.close(self._descriptors.pop())


def _with_kernel_functions(code: bytes) -> bytes:
    """Calls of kernel functions carry a mark of ours instead of the number, which differs between kernels."""
    if not any(mark in code for mark in _KERNEL_FUNCTIONS):
        return code
    numbers = _kernel_function_numbers()
    for mark, name in _KERNEL_FUNCTIONS.items():
        if mark in code and name not in numbers:
            raise kernel.FeatureMissing(
                "cannot load the eBPF program", f"no kernel function {name}", kernel.KERNEL
            )
        code = code.replace(mark, mark[:4] + struct.pack("<I", numbers.get(name, 0)))
    return code


@cache
def _kernel_function_numbers() -> dict[str, int]:
    """Once: the kernel tells a hundred thousand types, and a deep dive must not wait for that."""
    return kernel_type(FUNC, list(_KERNEL_FUNCTIONS.values()))


def _name_of(file: ObjectFile, section: int) -> str:
    return file.sections[section].name if section < len(file.sections) else ""


def _moved(records: bytes, layout: str, by: int) -> bytes:
    """Records whose first word is a place in the code, for code that moved by ``by``."""
    return b"".join(
        struct.pack(layout, record[0] + by, *record[1:]) for record in struct.iter_unpack(layout, records)
    )
