"""A run of ``bench guard`` as a drawing: TPOT of each answer over time, the limit, what the guard allowed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

WIDTH, LEFT, RIGHT = 960, 64, 16
TOP, HIGH, BELOW, LOW = 34, 300, 26, 90
FINE, MISSED, ALLOWED, SHADE = "#2b6cb0", "#c53030", "#2f855a", "#e6f4ea"
FACE = 'font-family="sans-serif" font-size="12"'


class Block(NamedTuple):
    """``points``: (end of an answer ns, TPOT ms); ``limits``: (when ns, tokens a step, None: all)."""

    guarded: bool
    points: Sequence[tuple[int, float]]
    limits: Sequence[tuple[int, int | None]]


def svg(blocks: Sequence[Block], limit_ms: float) -> str:
    """Blocks follow each other in time; those with the guard are shaded."""
    times = [at for block in blocks for at, _ in (*block.points, *block.limits)]
    begin, end = min(times, default=0), max(times, default=1)
    span = max(end - begin, 1)
    values = sorted(ms for block in blocks for _, ms in block.points)
    most_ms = max(1.2 * limit_ms, 1.05 * values[-1] if values else 0.0)

    def x(at: int) -> float:
        return LEFT + (at - begin) / span * (WIDTH - LEFT - RIGHT)

    def y(ms: float) -> float:
        return TOP + HIGH * (1.0 - min(ms, most_ms) / most_ms)

    parts = []
    for block in blocks:
        own = [at for at, _ in (*block.points, *block.limits)]
        if own and block.guarded:
            wide = x(max(own)) - x(min(own))
            high = HIGH + BELOW + LOW
            parts.append(
                f'<rect x="{x(min(own)):.1f}" y="{TOP}" width="{wide:.1f}" height="{high}" fill="{SHADE}"/>'
            )
    for ms in _marks(most_ms):
        parts.append(_line(LEFT, y(ms), WIDTH - RIGHT, y(ms), "#ddd"))
        parts.append(f'<text x="{LEFT - 6}" y="{y(ms) + 4:.1f}" text-anchor="end">{ms:g}</text>')
    parts.append(_line(LEFT, y(limit_ms), WIDTH - RIGHT, y(limit_ms), MISSED))
    for block in blocks:
        for at, ms in block.points:
            colour = MISSED if ms > limit_ms else FINE
            parts.append(
                f'<circle cx="{x(at):.1f}" cy="{y(ms):.1f}" r="2.5" fill="{colour}" fill-opacity=".7"/>'
            )
        parts += _allowed(block, x, end)
    seconds = span / 1e9
    foot = TOP + HIGH + BELOW + LOW + 18
    for second in _marks(seconds):
        place = LEFT + second / seconds * (WIDTH - LEFT - RIGHT)
        parts.append(f'<text x="{place:.1f}" y="{foot}" text-anchor="middle">{second:g} s</text>')
    said = f"TPOT of each answer, ms (red: above the limit of {limit_ms:.1f} ms); shaded: with the guard"
    parts.append(f'<text x="{LEFT}" y="20">{said}</text>')
    parts.append(f'<text x="{LEFT}" y="{TOP + HIGH + BELOW - 6}">tokens a step that the guard allows</text>')
    body = "\n".join(parts)
    size = f'width="{WIDTH}" height="{foot + 10}" viewBox="0 0 {WIDTH} {foot + 10}"'
    ground = '<rect width="100%" height="100%" fill="white"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {FACE}>\n{ground}\n{body}\n</svg>\n'


def _allowed(block: Block, x: Callable[[int], float], end: int) -> list[str]:
    """Steps of the limit; nothing where all tokens are allowed."""
    most = max((tokens or 0 for _, tokens in block.limits), default=0)
    last = max([at for at, _ in block.points] or [end])
    parts = []
    for (at, tokens), (until, _) in zip(block.limits, [*block.limits[1:], (last, None)]):
        if tokens is None or until <= at:
            continue
        level = TOP + HIGH + BELOW + LOW * (1.0 - tokens / most)
        parts.append(_line(x(at), level, x(until), level, ALLOWED, 2))
        parts.append(f'<text x="{x(at):.1f}" y="{level - 3:.1f}" font-size="9">{tokens}</text>')
    return parts


def _marks(most: float) -> list[float]:
    """Round values from 0 to ``most``, four to ten of them."""
    power = 10.0 ** math.floor(math.log10(most / 2))
    step = next(power * part for part in (0.5, 1.0, 2.0, 5.0) if most / (power * part) <= 10)
    return [n * step for n in range(int(most / step) + 1)]


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, width: int = 1) -> str:
    where = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {where} stroke="{colour}" stroke-width="{width}"/>'
