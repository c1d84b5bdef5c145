"""Evidence in words: the signals that truly moved, with what they normally are and what they are now."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import sqrt

from latencyprism.diagnose.shifts import Shift
from latencyprism.diagnose.signatures import SignalSpec, Table
from latencyprism.records import Evidence

_FALSE_DISCOVERY = 0.05
_LEAST_MOVED = 0.02
_MOST_LINES = 8


def t4_two_sided_p(z: float) -> float:
    """Two-sided p-value of Student's t with 4 degrees of freedom (closed form)."""
    x = z * z / (z * z + 4)
    inside = sqrt(x) * (1 + (1 - x) / 2)  # 2 F(|z|) - 1 for four degrees of freedom
    return max(0.0, 1.0 - inside)


def survivors(p_values: Mapping[str, float]) -> list[str]:
    """The names that pass Benjamini-Hochberg at 5 % false discoveries, the clearest first."""
    ordered = sorted((p, name) for name, p in p_values.items())
    passed = 0
    for rank, (p, _) in enumerate(ordered, 1):
        if p <= _FALSE_DISCOVERY * rank / len(ordered):
            passed = rank
    return [name for _, name in ordered[:passed]]


def moved(shifts: Mapping[str, Shift]) -> list[Shift]:
    """The shifts that pass Benjamini-Hochberg and are large enough to matter, the clearest first."""
    kept = [shifts[name] for name in survivors({n: t4_two_sided_p(s.z) for n, s in shifts.items()})]
    return [shift for shift in kept if abs(shift.moved) > _LEAST_MOVED]


def lines(table: Table, cause: str, shifts: Mapping[str, Shift], step_ms: float | None) -> list[Evidence]:
    """What speaks for ``cause`` first, then what else moved. ``step_ms``: what a step normally takes."""
    signature = table.causes.get(cause)
    own = dict(signature.signals) if signature is not None else {}
    rank = {name: number for number, name in enumerate(_ordered(own, signature.key if signature else ()))}
    found = sorted(moved(shifts), key=lambda s: rank.get(s.signal, len(rank)))
    return [_line(table.signals[s.signal], s, step_ms) for s in found[:_MOST_LINES]]


def _ordered(own: Mapping[str, float | str], key: Iterable[str]) -> list[str]:
    named = [name for name, move in own.items() if move != "free"]
    return [*key, *(name for name in named if name not in key)]


def _line(spec: SignalSpec, shift: Shift, step_ms: float | None) -> Evidence:
    normal, now = _spoken(spec, shift.normal, step_ms), _spoken(spec, shift.now, step_ms)
    where = shift.where or "the engine"
    if spec.kind == "time" and step_ms is not None and spec.name not in _SHARES:
        values = (shift.normal * step_ms, shift.now * step_ms)
    else:
        values = (shift.normal, shift.now)
    text = spec.text.format(normal=normal, now=now, where=where)
    return Evidence(spec.name, round(values[0], 4), round(values[1], 4), text)


_SHARES = frozenset({"work", "elsewhere", "psi_io", "psi_memory"})


def _spoken(spec: SignalSpec, value: float, step_ms: float | None) -> str:
    if spec.name == "narrowed":
        return f"{1 / max(value, 1e-9):.3g}"
    if spec.kind == "ratio":
        return f"{value / 1e6:.2f} GHz"
    if spec.kind not in ("time", "share"):
        return f"{value:.3g}"
    if spec.kind == "share" or spec.name in _SHARES or step_ms is None:
        return f"{100 * value:.0f} %"
    return f"{value * step_ms:.2f} ms"
