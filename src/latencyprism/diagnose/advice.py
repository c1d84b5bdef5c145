"""What to do about a cause, and what would settle a doubt: read from ``remedies.toml``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

from latencyprism.records import Ranked
from latencyprism.tomlfile import parse_toml

_SURE, _RIVAL = 0.9, 0.1


@dataclass(frozen=True, slots=True)
class Advice:
    remedy: str | None
    look: str | None


@cache
def table() -> dict[str, Advice]:
    """Cause -> advice."""
    text = resources.files("latencyprism.diagnose").joinpath("remedies.toml").read_text(encoding="utf-8")
    causes = parse_toml(text, "remedies.toml")["causes"]
    return {name: Advice(each.get("remedy") or None, each.get("look")) for name, each in causes.items()}


def remedies(causes: Sequence[str]) -> str | None:
    """For the cause, or causes, that a verdict names."""
    known = [table()[cause].remedy for cause in causes if cause in table()]
    return " ".join(text for text in known if text) or None


def settle(ranking: Sequence[Ranked], together: Sequence[str] = ()) -> list[str]:
    """What would settle it, for each cause that could still be the one; nothing where the verdict is sure."""
    top = ranking[0]
    if top.probability > _SURE or together:
        return []
    rivals = [top, *(entry for entry in ranking[1:4] if entry.probability >= _RIVAL)]
    found = []
    for entry in rivals:
        known = table().get(entry.cause)
        if known is not None and known.look is not None:
            found.append(f"{entry.cause}: {known.look}")
    return found
