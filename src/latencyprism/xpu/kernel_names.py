"""What a row of device activity is, by its name: a kernel, one of a collective operation, a copy, or neither.

The names are data, in ``kernel_names.toml``, with examples that are checked when it is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.resources import files
from typing import Any, NamedTuple

from latencyprism.errors import PrismError
from latencyprism.tomlfile import parse_toml

KERNEL, COPY, WAIT, RANGE = "kernel", "copy", "wait", "range"
OTHER = "other"
"""A collective operation of which the name does not say which."""


class Meaning(NamedTuple):
    """``kind``: kernel, copy, wait or range. ``collective``: which operation (``all_reduce``, …, ``other``) a
    kernel is part of, None: of none that is known. ``doubtful``: it is called like one that is not known."""

    kind: str
    collective: str | None = None
    doubtful: bool = False


@dataclass(frozen=True, slots=True)
class _Entry:
    pattern: re.Pattern[str]
    kind: str
    collective: str | None
    collectives: dict[str, str]

    def meaning(self, name: str) -> Meaning | None:
        found = self.pattern.search(name)
        if found is None:
            return None
        if self.kind != KERNEL or self.collective is not None:
            return Meaning(self.kind, self.collective)
        return Meaning(KERNEL, self.collectives.get(found[1], OTHER))


@dataclass(frozen=True, slots=True)
class _Names:
    looks_like: re.Pattern[str]
    entries: tuple[_Entry, ...]

    def meaning(self, name: str) -> Meaning:
        for entry in self.entries:
            found = entry.meaning(name)
            if found is not None:
                return found
        return Meaning(KERNEL, None, self.looks_like.search(name) is not None)


@lru_cache(maxsize=8192)
def meaning_of(name: str) -> Meaning:
    """Of a row on a device. A process has some hundreds of different names."""
    return _load().meaning(name)


@cache
def _load() -> _Names:
    return read_names(files("latencyprism.xpu").joinpath("kernel_names.toml").read_text(encoding="utf-8"))


def read_names(text: str) -> _Names:
    """The table in ``text``. PrismError where one of its own examples comes out otherwise than it says."""
    table = parse_toml(text, "the names of kernels")
    names = _Names(re.compile(table["looks_like"]), tuple(_entry(each) for each in table["name"]))
    wrong = _wrong(names, table["name"], table["plain"])
    if wrong:
        raise PrismError("the names of kernels are not what they say", "; ".join(wrong))
    return names


def _entry(each: dict[str, Any]) -> _Entry:
    return _Entry(
        re.compile(each["pattern"]), each.get("kind", KERNEL), each.get("collective"),
        dict(each.get("collectives", {})),
    )  # fmt: skip


def _wrong(names: _Names, entries: Sequence[dict[str, Any]], plain: Sequence[str]) -> list[str]:
    """What the examples show to be wrong, in words."""
    found = []
    for entry, each in zip(names.entries, entries):
        if not each["examples"]:
            found.append(f"{each['whose']} has no example")
        for name, expected in each["examples"]:
            own, told = entry.meaning(name), names.meaning(name)
            if own is None or own != told:
                found.append(f"{name!r} is not an example of {each['whose']}")
            elif (told.collective or told.kind) != expected:
                found.append(f"{name!r} is {told.collective or told.kind}, not {expected}")
    return found + [
        f"{name!r} is no plain kernel" for name in plain if names.meaning(name) != (KERNEL, None, False)
    ]
