"""Probe packs: what to hook in an engine and what is read of it, as data, with the versions each part holds
for.

A ``pack.toml`` has tables at its top (``hooks``, ``parameters``, ``fields``, ``deep``) that hold for every
range, and one ``[[range]]`` for each span of versions that differs. A range's own entry replaces the one of
the same name; an empty list takes it away.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from latencyprism.tomlfile import parse_toml

PYTHON_ENGINES = ("vllm", "sglang", "transformers", "tgi")

Hook = tuple[str, str, str]
"""(module, class or several joined by ``|``, method)."""

Fields = dict[str, tuple[str, ...]]
"""``module:Class`` (several classes joined by ``|``) to the attributes that the reader reads of its
objects."""


def version_key(text: str) -> tuple[int, ...]:
    """The numeric release part of a version (``0.32.0+cpu`` -> (0, 32, 0)); () if there is none."""
    match = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(int(part) for part in match.group().split(".")) if match else ()


@dataclass(frozen=True)
class PackRange:
    """What holds for versions ``since`` <= v < ``below``.

    ``verified`` were run against the real engine; of ``recorded`` the source was read and compared with this
    range. ``layout`` names how the reader must read (config["layout"] in the probe). ``parameters``: hook
    name to the first parameters (after self) that the reader takes from a call. ``fields``: by role (engine,
    worker, api), what is read of which class.
    """

    since: str
    below: str
    verified: tuple[str, ...]
    recorded: tuple[str, ...]
    layout: str
    hooks: dict[str, Hook]
    parameters: dict[str, tuple[str, ...]]
    fields: dict[str, Fields]
    deep: dict[str, tuple[Hook, ...]]

    def holds_for(self, version: str) -> bool:
        return version_key(self.since) <= version_key(version) < version_key(self.below)

    def fields_for(self, role: str) -> Fields:
        """What the reader reads in a process of this role; ``engine+worker`` is both."""
        found: Fields = {}
        for part in role.split("+"):
            for place, names in self.fields.get(part, {}).items():
                found[place] = (*found.get(place, ()), *(n for n in names if n not in found.get(place, ())))
        return found


@dataclass(frozen=True)
class Pack:
    """All ranges of one engine, oldest first. ``untold``: what no version of it tells, in words."""

    engine: str
    reader: str
    distributions: tuple[str, ...]
    ranges: tuple[PackRange, ...]
    untold: tuple[str, ...] = ()

    def covers(self, version: str | None) -> bool:
        """False for a version outside all ranges: what it needs is not known, only the generic way is
        left."""
        return version is None or any(entry.holds_for(version) for entry in self.ranges)

    def choose(self, version: str | None) -> tuple[PackRange, str | None]:
        """The range for a version, and a warning when it was not verified with it (None when it was).

        For a version outside all ranges (see ``covers``) it is the nearest one, which need not fit."""
        last = self.ranges[-1]
        if version is None:
            return (
                last,
                f"the version of {self.engine} could not be read; hooks of {last.since} and later are tried",
            )
        for entry in self.ranges:
            if entry.holds_for(version):
                return entry, self._caution(entry, version)
        older = version_key(version) < version_key(self.ranges[0].since)
        entry = self.ranges[0] if older else last
        return entry, (
            f"{self.engine} {version} is outside the pack's versions "
            f"({self.ranges[0].since} <= version < {last.below})"
        )

    def _caution(self, entry: PackRange, version: str) -> str | None:
        if any(version_key(v) == version_key(version) for v in entry.verified):
            return None
        if any(version_key(v) == version_key(version) for v in entry.recorded):
            return f"{self.engine} {version} was compared with this pack by its source, and not run"
        return f"{self.engine} {version} is in the range of this pack but was not verified with it"


def _hook(value: Any) -> Hook:
    module, owner, method = value
    return str(module), str(owner), str(method)


def _merged(common: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of ``common`` with those of ``own`` in their place; the empty ones are left out."""
    return {name: value for name, value in {**common, **own}.items() if value}


def _range(table: Mapping[str, Any], entry: Mapping[str, Any]) -> PackRange:
    def merged(name: str) -> dict[str, Any]:
        return _merged(table.get(name, {}), entry.get(name, {}))

    roles = {*table.get("fields", {}), *entry.get("fields", {})}
    fields = {
        role: _merged(table.get("fields", {}).get(role, {}), entry.get("fields", {}).get(role, {}))
        for role in sorted(roles)
    }
    return PackRange(
        since=entry["from"],
        below=entry["below"],
        verified=tuple(entry.get("verified", ())),
        recorded=tuple(entry.get("recorded", ())),
        layout=entry["layout"],
        hooks={name: _hook(hook) for name, hook in merged("hooks").items()},
        parameters={name: tuple(names) for name, names in merged("parameters").items()},
        fields={role: {place: tuple(n) for place, n in of.items()} for role, of in fields.items()},
        deep={role: tuple(map(_hook, functions)) for role, functions in merged("deep").items()},
    )


@cache
def load_pack(engine: str) -> Pack:
    """The pack of one of ``PYTHON_ENGINES``; KeyError for another name."""
    if engine not in PYTHON_ENGINES:
        raise KeyError(engine)
    resource = files("latencyprism.engines").joinpath(engine, "pack.toml")
    table = parse_toml(resource.read_text(encoding="utf-8"), f"the probe pack of {engine}")
    return Pack(
        table["engine"],
        table["reader"],
        tuple(table["distributions"]),
        tuple(_range(table, entry) for entry in table["range"]),
        tuple(map(str, table.get("untold", ()))),
    )
