"""ELF symbols: right on real files, harmless on broken ones."""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latencyprism.attach.elf import Elf, symbols
from latencyprism.attach.interpreter import load_base
from latencyprism.attach.maps import read_maps
from latencyprism.errors import BadInput


def mapped(part: str) -> str:
    found = [one.path for one in read_maps(os.getpid()) if part in os.path.basename(one.path)]
    if not found:
        pytest.skip(f"no {part} in this process")
    return found[0]


def small_elf(names: tuple[str, ...] = ("alpha", "beta"), shared_tail: bool = True) -> bytes:
    """A minimal ELF file: one loadable segment at 0x1000, a symbol table of ``names`` 16 bytes apart."""
    strings = b"\0" + b"".join((b"x" if shared_tail else b"") + name.encode() + b"\0" for name in names)
    table = bytes(24)
    for index, name in enumerate(names):
        at = strings.index(name.encode() + b"\0")
        table += struct.pack("<IBBHQQ", at, 0x12, 0, 1, 0x1000 + 16 * index, 8)
    header, program, section = 64, 56, 64
    code_at = header + program
    table_at = code_at + 256
    strings_at = table_at + len(table)
    sections_at = strings_at + len(strings)
    out = struct.pack(
        "<16sHHIQQQIHHHHHH",
        b"\x7fELF\2\1\1",
        3,
        62,
        1,
        0,
        header,
        sections_at,
        0,
        header,
        program,
        1,
        section,
        3,
        0,
    )
    out += struct.pack("<IIQQQQQQ", 1, 5, code_at, 0x1000, 0x1000, 256, 256, 4096)
    out += bytes(256) + table + strings
    out += bytes(64)
    out += struct.pack("<IIQQQQIIQQ", 0, 11, 0, 0, table_at, len(table), 2, 1, 8, 24)
    out += struct.pack("<IIQQQQIIQQ", 0, 3, 0, 0, strings_at, len(strings), 0, 0, 1, 0)
    return out


def test_made_file() -> None:
    found = symbols(small_elf(), ["alpha", "beta", "gamma", "lpha"])
    assert {name: one.value for name, one in found.items()} == {"alpha": 0x1000, "beta": 0x1010}
    assert symbols(small_elf()) == found
    with Elf(small_elf()) as elf:
        assert elf.machine == 62
        assert elf.file_offset(0x1010) == 64 + 56 + 16
        assert elf.file_offset(0x10_0000) is None


def test_addresses_are_those_of_the_loaded_library() -> None:
    path = mapped("libc.so.6")
    group = [one for one in read_maps(os.getpid()) if one.path == path]
    with Elf(path) as elf:
        base = load_base(elf.segments, group)
        assert base is not None
        for name in ("getpid", "lsearch", "malloc"):
            symbol = elf.lookup([name])[name]
            assert base + symbol.value == ctypes.cast(getattr(ctypes.CDLL(None), name), ctypes.c_void_p).value
            offset = elf.file_offset(symbol.value)
            assert offset is not None
            code = ctypes.string_at(base + symbol.value, 8)
            assert elf.read(offset, 8) == code


def test_lookup_agrees_with_the_whole_table() -> None:
    path = mapped("libc.so.6")
    every = symbols(path)
    some = list(every)[:: max(1, len(every) // 50)]
    assert symbols(path, some) == {name: every[name] for name in some}


def test_sixty_thousand_symbols_are_searched_fast(tmp_path: Path) -> None:
    names = tuple(f"symbol_number_{index:06d}" for index in range(60_000))
    strings = b"\0" + b"".join(name.encode() + b"\0" for name in names)
    rows = b"".join(
        struct.pack("<IBBHQQ", 1 + index * 21, 0x12, 0, 1, 0x1000 + index, 1) for index in range(len(names))
    )
    base = small_elf()
    table_at = len(base)
    sections = table_at + len(rows) + len(strings)
    image = bytearray(base + rows + strings)
    image += bytes(64) + struct.pack("<IIQQQQIIQQ", 0, 2, 0, 0, table_at, len(rows), 2, 1, 8, 24)
    image += struct.pack("<IIQQQQIIQQ", 0, 3, 0, 0, table_at + len(rows), len(strings), 0, 0, 1, 0)
    image[40:48] = struct.pack("<Q", sections)
    path = tmp_path / "big.so"
    path.write_bytes(image)
    began = time.process_time()
    found = symbols(path, ["symbol_number_059999", "symbol_number_000000", "not_there"])
    took_s = time.process_time() - began
    assert sorted(one.value for one in found.values()) == [0x1000, 0x1000 + 59_999]
    assert took_s < 0.3


@given(st.binary(max_size=500))
def test_any_bytes(raw: bytes) -> None:
    with contextlib.suppress(BadInput):
        symbols(b"\x7fELF\2\1\1" + raw, ["alpha"])


@settings(max_examples=300)
@given(st.data())
def test_damaged_file_is_refused_or_read(data: st.DataObject) -> None:
    image = bytearray(small_elf())
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(image) - 8))
        image[at : at + 8] = data.draw(st.binary(min_size=8, max_size=8))
    cut = data.draw(st.integers(0, len(image)))
    for raw in (bytes(image), bytes(image[:cut])):
        try:
            with Elf(raw) as elf:
                elf.symbols()
                elf.lookup(["alpha", "beta"])
                elf.file_offset(0x1000)
                elf.find_code(b"\x0f\x05")
                elf.interpreter()
        except BadInput:
            pass


def test_missing_file() -> None:
    with pytest.raises(BadInput):
        symbols("/nonexistent/file.so")
