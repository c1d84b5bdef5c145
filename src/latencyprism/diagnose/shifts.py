"""How far each signal moved between reference and suspect window, against the reference's own spread."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from latencyprism.diagnose.accounts import busy_threads
from latencyprism.diagnose.signals import Values, WindowReader
from latencyprism.diagnose.signatures import SignalSpec, Table

_MOST_BLOCKS = 16
_LEAST_BLOCK_NS = 1_000_000_000
_STEPS_A_BLOCK = 6
_MOST_SHARE = 0.98
_OF_BUSY, _MATTERS = ("idle", "voluntary", "involuntary", "frozen", "runqueue", "narrowed"), 0.2
"""Signals that count of threads which use at least this share of a normal step on a CPU, where there are
such: who sleeps nearly all the time sleeps longer in a longer step, whatever lengthens it."""
_COUNT_SPREAD = 0.25
"""Smallest run-to-run spread believed of a count or a mean, as log ratio."""


class Shift(NamedTuple):
    """``normal``, ``now``: the signal's values (see ``signals``); ``moved``: the change on the signal's log
    scale; ``sigma``: its uncertainty: the reference's spread from block to block, and the floor. ``spread``:
    standard deviation of the signal's values over the blocks; NaN for too few of them."""

    signal: str
    where: str
    normal: float
    now: float
    moved: float
    sigma: float
    spread: float = math.nan

    @property
    def z(self) -> float:
        return self.moved / self.sigma


def on_log_scale(spec: SignalSpec, value: float) -> float:
    if spec.kind == "time":
        return math.log1p(max(value, -0.95))
    if spec.kind == "share":
        return -math.log1p(-min(max(value, 0.0), _MOST_SHARE))
    if spec.kind == "ratio":
        return math.log(max(value, 1e-12))
    return math.log(max(value, 0.0) + spec.floor)


def expected_move(spec: SignalSpec, normal: float, rise: float) -> float:
    """The move of a *time* signal that grows by ``rise`` (in shares of a normal step); of a *share* that
    leaves so much less that what is left has to be used for ``1 + rise`` times as long."""
    if spec.kind == "share":
        return math.log1p(rise)
    return on_log_scale(spec, max(normal, -0.9) + rise) - on_log_scale(spec, max(normal, -0.9))


def blocks(reader: WindowReader, extent: tuple[int, int], suspect_ns: int) -> list[Values]:
    """The reference measured in stretches about as long as the suspect window, so that what a stretch of that
    length does by itself is known."""
    whole_ns = extent[1] - extent[0]
    typical_ns = reader.expected.step.typical if reader.expected else 0.0
    length_ns = max(_LEAST_BLOCK_NS, min(suspect_ns, whole_ns // 4), int(_STEPS_A_BLOCK * typical_ns))
    count = min(_MOST_BLOCKS, whole_ns // length_ns)
    if count < 1:
        return []
    edges = np.linspace(extent[0], extent[1], count + 1).astype(np.int64).tolist()
    return [reader.measure(low, high) for low, high in pairwise(edges)]


def compare(
    table: Table, reference: Values, parts: Sequence[Values], suspect: Values, unfamiliar: float
) -> dict[str, Shift]:
    """One shift per signal, of the place that its ``pick`` chooses. ``unfamiliar``: how far the suspect's
    work lies outside of what the reference can predict; it loosens what depends on that prediction."""
    by_signal: dict[str, list[Shift]] = {}
    # A reference window in which nobody was stopped has no span that says so.
    reference = {**{key: 0.0 for key in suspect if key[0] == "stopped"}, **reference}
    for key in sorted(reference.keys() & suspect.keys()):  # sums must come out the same again
        spec = table.signals.get(key[0])
        if spec is not None:
            history = [part[key] for part in parts if key in part]
            shift = _shift(spec, key[1], reference[key], history, suspect[key], unfamiliar)
            by_signal.setdefault(key[0], []).append(shift)
    matter = {where for (name, where), value in reference.items() if name == "cpu" and value > _MATTERS}
    for name in _OF_BUSY:
        found = [shift for shift in by_signal.get(name, []) if shift.where in matter]
        if found:
            by_signal[name] = found
    picked = {name: max(found, key=lambda s: (s.z, s.where)) for name, found in by_signal.items()}
    busy = set(busy_threads(reference))
    least = [s for s in by_signal.get("cpu", []) if s.where in busy]
    if least and "cpu_least" in table.signals:
        picked["cpu_least"] = min(least, key=lambda s: (s.z, s.where))._replace(signal="cpu_least")
    return dict(sorted(picked.items()))


_PREDICTED = frozenset({"slow", "level", "stall"})


def _shift(
    spec: SignalSpec, where: str, whole: float, history: Sequence[float], now: float, unfamiliar: float
) -> Shift:
    enough = len(history) >= 3
    normal = float(np.median(history)) if enough else whole
    scaled = np.array([on_log_scale(spec, value) for value in history])
    floor = _COUNT_SPREAD if spec.kind in ("count", "level") else spec.floor
    if enough:
        deviation = 1.4826 * float(np.median(np.abs(scaled - np.median(scaled))))
        # The median deviation overlooks what happens in few blocks; the standard deviation does not.
        spread = max(deviation, 0.8 * float(scaled.std())) * (1 + 2 / len(history))
    else:
        spread = 3 * floor
    doubt = 0.5 * unfamiliar if spec.name in _PREDICTED else 0.0
    moved = on_log_scale(spec, now) - on_log_scale(spec, normal)
    raw = float(np.std(history)) if enough else math.nan
    return Shift(spec.name, where, normal, now, moved, math.sqrt(spread**2 + floor**2 + doubt**2), raw)
