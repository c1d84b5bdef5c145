"""A confusion matrix as a picture: rows are what was injected, columns what was named."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

_CELL, _LEFT, _TOP, _GAP = 30, 190, 190, 14


def svg(confusion: Mapping[str, Mapping[str, int]], title: str) -> str:
    """The picture as SVG text, readable on light and dark ground."""
    rows = list(confusion)
    named = {name for row in confusion.values() for name in row}
    columns = [*rows, *sorted(named - set(rows))]
    width, height = _LEFT + _CELL * len(columns) + _GAP, _TOP + _CELL * len(rows) + _GAP
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="sans-serif" font-size="12" role="img">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="8" y="20" font-size="13" fill="#222">{escape(title)}</text>',
        f'<text x="8" y="{_TOP - 8}" fill="#666">rows: injected, columns: named</text>',
    ]
    for place, name in enumerate(columns):
        x = _LEFT + _CELL * place + _CELL * 0.6
        out.append(
            f'<text transform="translate({x:.0f},{_TOP - 6}) rotate(-60)" fill="#222">{escape(name)}</text>'
        )
    for line, truth in enumerate(rows):
        y = _TOP + _CELL * line
        total = sum(confusion[truth].values())
        out.append(
            f'<text x="{_LEFT - 8}" y="{y + 19}" text-anchor="end" fill="#222">'
            f"{escape(truth)} ({total})</text>"
        )
        for place, name in enumerate(columns):
            out.append(_cell(confusion[truth].get(name, 0), total, name == truth, _LEFT + _CELL * place, y))
    return "\n".join([*out, "</svg>", ""])


def _cell(count: int, total: int, right: bool, x: int, y: int) -> str:
    share = count / total if total else 0.0
    colour = "30,120,80" if right else "190,60,40"
    fill = f"rgba({colour},{share:.2f})" if count else "none"
    box = f'<rect x="{x}" y="{y}" width="{_CELL}" height="{_CELL}" fill="{fill}" stroke="#ddd"/>'
    if not count:
        return box
    ink = "#fff" if share > 0.6 else "#222"
    return f'{box}<text x="{x + _CELL / 2}" y="{y + 19}" text-anchor="middle" fill="{ink}">{count}</text>'
