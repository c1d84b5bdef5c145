"""The committed objects and the parsers that read them: whole, in step with their sources, never crashing."""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latencyprism.bpf import btf
from latencyprism.bpf.btf import Btf, parse_ext
from latencyprism.bpf.loader import read_object
from latencyprism.bpf.native import parse_hit
from latencyprism.bpf.object_file import parse_object
from latencyprism.errors import BadInput, PrismError

PROGRAMS = Path(btf.__file__).parent / "programs"
NAMES = (
    "native_step.x86_64", "native_step.aarch64", "below", "calls.x86_64", "calls.aarch64",
)  # fmt: skip


def test_objects_were_built_from_the_sources_that_are_here() -> None:
    for line in (PROGRAMS / "sources.sha256").read_text().splitlines():
        digest, name = line.split()
        assert hashlib.sha256((PROGRAMS / name).read_bytes()).hexdigest() == digest, (
            f"run scripts/build_bpf.sh: {name}"
        )


@pytest.mark.parametrize("name", NAMES)
def test_objects_do_not_tell_where_they_were_built(name: str) -> None:
    types = parse_object(read_object(name)).section(".BTF")
    assert types and re.search(rb"[\w.]+\.bpf\.c\0", types.data)
    assert not re.search(rb"\0/[\w/.-]+\.[ch]\0", types.data)


@pytest.mark.skipif(not shutil.which("clang-14"), reason="clang-14 is not installed")
def test_rebuilding_gives_the_same_code(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "scripts" / "build_bpf.sh"
    subprocess.run([str(script), str(tmp_path)], check=True, timeout=120)
    for name in NAMES:
        fresh, committed = (
            parse_object((tmp_path / f"{name}.bpf.o").read_bytes()),
            parse_object(read_object(name)),
        )
        code = [(s.name, s.data, s.relocations) for s in fresh.sections if s.executable]
        assert code == [(s.name, s.data, s.relocations) for s in committed.sections if s.executable]


@pytest.mark.parametrize("name", NAMES)
def test_every_program_has_function_information(name: str) -> None:
    parsed = parse_object(read_object(name))
    types, extra = parsed.section(".BTF"), parsed.section(".BTF.ext")
    assert types and extra
    information = parse_ext(extra.data, Btf(types.data))
    for section in parsed.sections:
        if section.executable and section.data:
            assert information[section.name][0], section.name


def test_scheduler_programs_carry_relocations_for_kernel_structures() -> None:
    parsed = parse_object(read_object("below"))
    types, extra = parsed.section(".BTF"), parsed.section(".BTF.ext")
    assert types and extra
    information = parse_ext(extra.data, Btf(types.data))
    assert all(information[f"tp_btf/{name}"][1] for name in ("sched_switch", "sched_waking"))


def _read_everything(data: bytes) -> None:
    parsed = parse_object(data)
    types, extra = parsed.section(".BTF"), parsed.section(".BTF.ext")
    if types is None:
        return
    parsed_types = Btf(types.data)
    for number, kind in enumerate(parsed_types.types):
        if kind.kind in (btf.STRUCT, btf.DATASEC):
            list(parsed_types.members(kind))
        if kind.kind in (btf.STRUCT, btf.ARRAY, btf.PTR, btf.VAR):
            parsed_types.size_of(number)
    if extra is not None:
        parse_ext(extra.data, parsed_types)


@settings(deadline=None)  # a busy machine is no finding
@given(st.data())
def test_a_damaged_object_is_refused_or_read_but_never_crashes(data: st.DataObject) -> None:
    whole = bytearray(read_object(data.draw(st.sampled_from(NAMES))))
    for _ in range(data.draw(st.integers(1, 8))):
        at = data.draw(st.integers(0, len(whole) - 4))
        whole[at : at + 4] = data.draw(st.one_of(st.binary(min_size=4, max_size=4), st.just(b"\xff" * 4)))
    cut = data.draw(st.one_of(st.just(len(whole)), st.integers(0, len(whole))))
    with contextlib.suppress(BadInput):
        _read_everything(bytes(whole[:cut]))


@given(st.binary(max_size=300))
def test_random_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(BadInput):
        parse_object(data)
    with pytest.raises(BadInput):
        Btf(data)


@given(st.binary(max_size=200))
def test_a_probe_record_of_any_length_is_read_or_refused(data: bytes) -> None:
    try:
        hit = parse_hit(data)
    except PrismError:
        return
    assert len(data) >= 56 + 16 * len(hit.runs)


def test_type_sizes_follow_typedefs_arrays_and_stop_in_circles() -> None:
    strings = b"\0x\0"
    types = b"".join((
        struct.pack("<IIII", 1, btf.INT << 24, 4, 32),
        struct.pack("<III", 1, btf.TYPEDEF << 24, 1),
        struct.pack("<IIIIII", 0, btf.ARRAY << 24, 0, 2, 1, 7),
        struct.pack("<III", 1, btf.TYPEDEF << 24, 4),
    ))  # fmt: skip
    blob = (
        struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(types), len(types), len(strings)) + types + strings
    )
    parsed = Btf(blob)
    assert parsed.size_of(3) == 28
    with pytest.raises(BadInput):
        parsed.size_of(4)
