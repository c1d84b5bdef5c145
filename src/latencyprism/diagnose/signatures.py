"""The table of causes, read from ``signatures.toml``."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from latencyprism.errors import BadInput
from latencyprism.records import CAUSES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

KINDS = ("time", "share", "count", "level", "ratio")
DIRECTIONS = ("up", "down", "free", "with", "over")
LATENCY_SIGNALS = frozenset({"slow", "level", "stall", "schedule", "execute", "sample", "update", "gap"})
"""Those that say that steps took longer; ``none`` means that these did not move."""


@dataclass(frozen=True, slots=True)
class SignalSpec:
    """How a signal is compared and said; see the head of ``signatures.toml``."""

    name: str
    kind: str
    floor: float
    text: str
    pick: str | None = None
    same: str | None = None


@dataclass(frozen=True, slots=True)
class Signature:
    """``signals``: what moves, by how much; ``key``: what must have been observable."""

    cause: str
    prior: float
    key: tuple[str, ...]
    signals: dict[str, float | str]
    seen: float = 1.0
    yields_to: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Table:
    signals: dict[str, SignalSpec]
    causes: dict[str, Signature]


def parse_table(text: str) -> Table:
    """Raises BadInput for a table that is not TOML, or names unknown causes, signals, kinds or directions."""
    try:
        raw: dict[str, Any] = tomllib.loads(text)
        signals = {name: SignalSpec(name=name, **fields) for name, fields in raw["signals"].items()}
        causes = {
            name: Signature(
                name,
                float(f["prior"]),
                tuple(f["key"]),
                dict(f["signals"]),
                float(f.get("seen", 1)),
                tuple(f.get("yields_to", ())),
            )
            for name, f in raw["causes"].items()
        }
    except (tomllib.TOMLDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadInput("signature table cannot be used", f"{type(error).__name__}: {error}") from error
    for spec in signals.values():
        if spec.kind not in KINDS or not spec.floor > 0 or spec.pick not in (None, "rise", "least"):
            raise BadInput("signature table cannot be used", f"signal {spec.name}: bad kind, floor or pick")
    for signature in causes.values():
        _check(signature, signals)
    return Table(signals, causes)


def _check(signature: Signature, signals: dict[str, SignalSpec]) -> None:
    where = f"cause {signature.cause}"
    if signature.cause not in CAUSES or not signature.prior > 0 or not 0 < signature.seen <= 1:
        raise BadInput("signature table cannot be used", f"{where}: unknown name, prior or seen out of range")
    for name in (*signature.signals, *signature.key, *signature.yields_to):
        if name not in signals:
            raise BadInput("signature table cannot be used", f"{where}: no signal is called {name}")
    for name, value in signature.signals.items():
        if isinstance(value, str) and value not in DIRECTIONS:
            raise BadInput("signature table cannot be used", f"{where}: {name} = {value!r} is no direction")


@cache
def builtin_table() -> Table:
    """The table that comes with the package."""
    source = resources.files("latencyprism.diagnose").joinpath("signatures.toml")
    return parse_table(source.read_text(encoding="utf-8"))
