"""Where CPython keeps its threads, frames and code objects: data, one entry for each minor version.

Later interpreters tell some of it themselves, in a table at the start of ``_PyRuntime``; what they tell wins.
Whoever reads with a layout has to prove it on the live process first: see ``stacks.StackReader``.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from ..tomlfile import parse_toml

COOKIE = b"xdebugpy"
TOLD_BYTES = 512
_LARGEST_OFFSET = 1 << 20


@dataclass(frozen=True, slots=True)
class Layout:
    """Byte offsets within the structures of one minor version of CPython on 64-bit machines.

    ``fields`` by dotted name (``thread.next``); ``told`` the positions (in 8-byte words) of those that the
    interpreter tells itself; ``origin`` says in words where they come from.
    """

    version: tuple[int, int]
    fields: dict[str, int]
    told: dict[str, int]
    origin: str

    def __getitem__(self, name: str) -> int:
        return self.fields[name]

    def get(self, name: str) -> int | None:
        return self.fields.get(name)

    def corrected(self, runtime: bytes) -> Layout:
        """This layout with what the interpreter tells at the start of its ``_PyRuntime`` (``TOLD_BYTES`` of
        it) put in; itself when it tells nothing, or tells of another version or of nonsense."""
        if not self.told or runtime[: len(COOKIE)] != COOKIE:
            return self
        words = struct.unpack_from(f"<{len(runtime) // 8}Q", runtime)
        if (words[1] >> 24, words[1] >> 16 & 255) != self.version:
            return self
        told = {name: words[at] for name, at in self.told.items()}
        if any(value > _LARGEST_OFFSET for value in told.values()):
            return self
        return Layout(self.version, {**self.fields, **told}, {}, "told by the interpreter")


@cache
def layouts() -> dict[tuple[int, int], Layout]:
    """All known layouts by (major, minor)."""
    text = files("latencyprism.attach").joinpath("layouts.toml").read_text(encoding="utf-8")
    found = {}
    for entry in parse_toml(text, "the layouts of CPython")["cpython"]:
        major, minor = (int(part) for part in entry["version"].split("."))
        fields = {
            f"{group}.{name}": int(value)
            for group, table in entry.items()
            if isinstance(table, dict) and group != "told"
            for name, value in table.items()
        }
        told = {
            f"{group}.{name}": int(value)
            for group, table in entry.get("told", {}).items()
            for name, value in table.items()
        }
        found[major, minor] = Layout((major, minor), fields, told, entry["origin"])
    return found
