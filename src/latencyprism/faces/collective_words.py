"""Collectives of a capture in words: what an operation costs by itself, and who waited for whom."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from latencyprism.faces.wording import clean, ms, number, quantity
from latencyprism.recorder import Capture


def tell(capture: Capture) -> Iterator[str]:
    """Line by line; none where no collectives were seen. What is no summary of ours is passed over."""
    told = capture.meta.get("collectives")
    for group in told if isinstance(told, list) else ():
        if isinstance(group, dict):
            yield from _group(group)


def _group(group: dict[str, Any]) -> Iterator[str]:
    size, joined, steps = (_count(group, name) for name in ("size", "joined", "steps"))
    kinds = group.get("kinds")
    counts = ", ".join(
        f"{number(_number(count))} {clean(kind, 40)}"
        for kind, count in (kinds.items() if isinstance(kinds, dict) else ())
    )
    within = f" in {steps:,} steps" if steps else ""
    yield f"COLLECTIVES of {size} ranks ({clean(group.get('communicator'), 40)}): {counts}{within}"
    missing = _rows(group, "missing")
    if missing:
        yield "  nothing was seen of rank " + ", ".join(clean(rank, 10) for rank in missing)
    if not joined:
        yield "  none could be joined across the ranks: who waited for whom is not known"
        return
    link, spread = (_number(group.get(name)) for name in ("link_us", "spread_us"))
    yield (
        f"  an operation takes {_us(link)} once all ranks are there, the last comes {_us(spread)} "
        f"after the first (medians of {joined:,})"
    )
    ranks = [rank for rank in _rows(group, "ranks") if isinstance(rank, dict)]
    for rank in ranks:
        yield f"  {_rank(group, rank, max(size - 1, 1), steps, joined)}"
    culprit = group.get("waited_for")
    if culprit is not None:
        shares = [_number(rank.get("caused_share")) for rank in ranks if rank.get("rank") == culprit]
        share = "most" if not shares or shares[0] is None else f"{shares[0]:.0%}"
        yield f"  So {share} of all waiting was for {_named(group, culprit)}."


def _rank(group: dict[str, Any], told: dict[str, Any], others: int, steps: int, joined: int) -> str:
    """``caused_ms`` is of all others together; what is said is of one of them."""
    caused_ms, share = _number(told.get("caused_ms")), _number(told.get("last_share"))
    each = None if caused_ms is None else caused_ms / others
    waited = f"{ms(each / steps)} a step" if each is not None and steps else ms(each)
    came = "?" if share is None else f"{share:.0%}"
    return (
        f"{_named(group, told.get('rank'))} came last in {came} of {joined:,}; "
        f"{'the other' if others == 1 else 'each other'} waited {waited} for it"
    )


def _named(group: dict[str, Any], rank: object) -> str:
    processes = group.get("processes")
    name = processes.get(str(rank)) if isinstance(processes, dict) else None
    return f"rank {clean(rank, 10)}" + (f" ({clean(name, 60)})" if name else "")


def _us(us: float | None) -> str:
    return "?" if us is None else quantity(us * 1e3, "ns")


def _rows(group: dict[str, Any], name: str) -> list[Any]:
    rows = group.get(name)
    return rows if isinstance(rows, list) else []


def _count(group: dict[str, Any], name: str) -> int:
    value = group.get(name)
    return value if isinstance(value, int) and 0 <= value < 1 << 62 else 0


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and abs(value) < 1e18 else None
