"""Probe packs: what to hook in an engine, as data, with the versions each entry holds for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from latencyprism.tomlfile import parse_toml

PYTHON_ENGINES = ("vllm", "transformers")

Hook = tuple[str, str, str]


def version_key(text: str) -> tuple[int, ...]:
    """The numeric release part of a version (``0.32.0+cpu`` -> (0, 32, 0)); () if there is none."""
    match = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(int(part) for part in match.group().split(".")) if match else ()


@dataclass(frozen=True)
class PackRange:
    """Hooks for versions ``since`` <= v < ``below``; ``verified`` were run against the real engine."""

    since: str
    below: str
    verified: tuple[str, ...]
    hooks: dict[str, Hook]
    deep: dict[str, tuple[Hook, ...]]

    def holds_for(self, version: str) -> bool:
        return version_key(self.since) <= version_key(version) < version_key(self.below)


@dataclass(frozen=True)
class Pack:
    """All ranges of one engine, oldest first."""

    engine: str
    reader: str
    distributions: tuple[str, ...]
    ranges: tuple[PackRange, ...]

    def choose(self, version: str | None) -> tuple[PackRange, str | None]:
        """The range for a version, and a warning when it was not verified with it (None when it was)."""
        last = self.ranges[-1]
        if version is None:
            return (
                last,
                f"the version of {self.engine} could not be read; hooks of {last.since} and later are tried",
            )
        for entry in self.ranges:
            if entry.holds_for(version):
                exact = any(version_key(v) == version_key(version) for v in entry.verified)
                note = f"{self.engine} {version} is in the range of this pack but was not verified with it"
                return entry, None if exact else note
        older = version_key(version) < version_key(self.ranges[0].since)
        entry = self.ranges[0] if older else last
        return (
            entry,
            f"{self.engine} {version} is outside the pack's versions ({entry.since} to {entry.below})",
        )


def _hook(value: Any) -> Hook:
    module, owner, method = value
    return str(module), str(owner), str(method)


@cache
def load_pack(engine: str) -> Pack:
    """The pack of one of ``PYTHON_ENGINES``; KeyError for another name."""
    if engine not in PYTHON_ENGINES:
        raise KeyError(engine)
    resource = files("latencyprism.engines").joinpath(engine, "pack.toml")
    table = parse_toml(resource.read_text(encoding="utf-8"), f"the probe pack of {engine}")
    ranges = tuple(
        PackRange(
            since=entry["from"],
            below=entry["below"],
            verified=tuple(entry["verified"]),
            hooks={name: _hook(hook) for name, hook in entry["hooks"].items()},
            deep={group["role"]: tuple(map(_hook, group["functions"])) for group in entry.get("deep", ())},
        )
        for entry in table["range"]
    )
    return Pack(table["engine"], table["reader"], tuple(table["distributions"]), ranges)
