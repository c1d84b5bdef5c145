"""Which build of PyTorch a process has loaded, and where in it the operator probe's functions and fields are.

Nothing is armed in a build that is not known: a library is recognised by its build id and by its code.
"""

from __future__ import annotations

import functools
import os
import platform
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from latencyprism.attach.elf import Elf
from latencyprism.attach.maps import Mapping, open_mapped, read_maps
from latencyprism.attach.memory import read_memory
from latencyprism.errors import BadInput, TargetRefused
from latencyprism.tomlfile import parse_toml

LIBRARY = "libtorch_cpu.so"


@dataclass(frozen=True, slots=True)
class Build:
    """One recognised library in one process: addresses there, and where the fields are."""

    version: str
    add: int
    remove: int
    function_offset: int
    kind_offset: int
    scopes: tuple[int, ...]


@functools.cache
def known_builds() -> dict[str, Any]:
    """The tables of ``operators.toml``."""
    text = files("latencyprism.agent").joinpath("operators.toml").read_text(encoding="utf-8")
    return parse_toml(text, "operators.toml")


def recognise(pid: int) -> Build:
    """The build of PyTorch in a process. TargetRefused with the reason where its operators cannot be
    observed. Takes some 0.1 s the first time."""
    failed = f"operators of process {pid} cannot be observed"
    if platform.machine() != "x86_64":
        raise TargetRefused(failed, "the probe is made for x86-64")
    mapping = next((m for m in read_maps(pid) if m.offset == 0 and m.path.endswith("/" + LIBRARY)), None)
    if mapping is None:
        raise TargetRefused(failed, f"it has no {LIBRARY} loaded")
    try:
        build_id, values = _symbols_of(pid, mapping)
    except BadInput as error:
        raise TargetRefused(failed, error.why or error.what) from None
    entry = next((b for b in known_builds()["builds"] if b["build_id"] == build_id), None)
    if entry is None:
        raise TargetRefused(failed, f"its build of PyTorch is not known ({build_id or 'no build id'})")
    names = known_builds()["symbols"]
    if any(name not in values for name in names.values()):
        raise TargetRefused(failed, "its build of PyTorch lacks the functions for it")
    at = {short: mapping.start + values[name] for short, name in names.items()}
    expected = bytes.fromhex(entry["name_code"])
    if read_memory(pid, at["name"], len(expected)) != expected:
        raise TargetRefused(failed, "its code is not that of the build it says it is")
    return Build(
        entry["versions"][0], at["add"], at["remove"],
        entry["function_offset"], entry["kind_offset"], tuple(entry["scopes"]),
    )  # fmt: skip


def _symbols_of(pid: int, mapping: Mapping) -> tuple[str, dict[str, int]]:
    """(build id in hex, value of each symbol that is wanted and there)."""
    descriptor = open_mapped(pid, mapping)
    try:
        seen = os.fstat(descriptor)
        key = (seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns)
        if key not in _FOUND:
            with Elf(descriptor) as elf:
                place = elf.section(".note.gnu.build-id")
                offset = elf.file_offset(place[0]) if place else None
                note = elf.read(offset, place[1]) if place and offset is not None and place[1] < 256 else b""
                found = elf.lookup(known_builds()["symbols"].values())
            _FOUND[key] = note[16:].hex(), {name: symbol.value for name, symbol in found.items()}
        return _FOUND[key]
    finally:
        os.close(descriptor)


_FOUND: dict[tuple[int, ...], tuple[str, dict[str, int]]] = {}
