"""The pack: which functions of llama.cpp to probe, and how a micro-batch lies in memory."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from latencyprism.errors import BadInput

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

OFFSETS = (
    "tokens",
    "sequence_tokens",
    "sequences",
    "positions",
    "sequence_ids",
    "outputs",
    "ids_per_sequence",
    "returns_object",
)


@dataclass(frozen=True)
class Layout:
    """``decode`` and ``ubatch`` are symbols; ``offsets`` bytes in ``llama_ubatch`` by name (see OFFSETS);
    ``builds`` in words, and which of them were ``verified`` by running them."""

    name: str
    decode: str
    ubatch: str
    offsets: dict[str, int]
    builds: str
    verified: tuple[str, ...]


@dataclass(frozen=True)
class Pack:
    """``points``: role (iteration, task, launch, sample, synchronize) to symbols, best first."""

    points: dict[str, tuple[str, ...]]
    layouts: tuple[Layout, ...]

    def symbols(self) -> set[str]:
        """Every symbol that any variant would want."""
        names = {name for group in self.points.values() for name in group}
        return names | {symbol for layout in self.layouts for symbol in (layout.decode, layout.ubatch)}

    def choose(self, has: Callable[[str], bool]) -> tuple[Layout | None, dict[str, str]]:
        """The layout the target fits (None: unknown build) and role to symbol for the points it has."""
        layout = next((one for one in self.layouts if has(one.decode) and has(one.ubatch)), None)
        roles = {role: found for role, names in self.points.items() if (found := first(names, has))}
        return layout, roles


def first(names: Iterable[str], has: Callable[[str], bool]) -> str | None:
    """The first of ``names`` that is there."""
    return next((name for name in names if has(name)), None)


def parse_pack(text: str) -> Pack:
    """A pack from TOML; BadInput when something is missing or of the wrong type."""
    try:
        raw: dict[str, Any] = tomllib.loads(text)
        points = {str(role): tuple(map(str, names)) for role, names in raw["points"].items()}
        layouts = tuple(
            Layout(
                str(entry["name"]), str(entry["decode"]), str(entry["ubatch"]),
                {name: int(entry["offsets"].get(name, 0)) for name in OFFSETS},
                str(entry.get("builds", "")), tuple(map(str, entry.get("verified", ()))),
            )
            for entry in raw["layout"]
        )  # fmt: skip
    except (tomllib.TOMLDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadInput("not a usable llama.cpp pack", str(error)) from None
    return Pack(points, layouts)


@cache
def load_pack() -> Pack:
    """The pack that comes with the package."""
    return parse_pack(resources.files(__package__).joinpath("pack.toml").read_text(encoding="utf-8"))
