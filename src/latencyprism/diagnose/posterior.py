"""Which cause fits the shifts best: Student-t likelihoods, the strength of the fault averaged out."""

from __future__ import annotations

from collections.abc import Mapping
from math import lgamma, log, pi

import numpy as np
import numpy.typing as npt

from latencyprism.diagnose.shifts import Shift, expected_move
from latencyprism.diagnose.signatures import Signature, Table

Array = npt.NDArray[np.float64]

_FREEDOM = 4.0
_STRENGTHS = np.geomspace(0.02, 8.0, 28)
"""Slow-downs considered, in shares of a normal step, each as likely a priori (log-uniform)."""
_TOLERANCE = 0.35
"""A signature's shape is believed to this relative accuracy."""
_MAGNITUDES = np.array([0.15, 0.3, 0.6, 1.2, 2.4, 4.8])
_TEMPER = 0.7
"""Signals are not independent; each counts for less than a whole observation."""

_PRIOR_NONE, _PRIOR_UNKNOWN, _PRIOR_CAUSES = 0.6, 0.08, 0.32
_VISIBLE, _WITHOUT_KEY = 2.0, 0.05
"""A cause whose key signals did not move by so many sigma is held for so much less likely."""
_LATENCY = ("slow", "level", "stall")
_ACCOUNTS, _HARMLESS = frozenset({"throttled", "stopped", "gc", "steal"}), (0.02, 0.1)
_FOLLOWING = frozenset({"level", "stall", "cpu", "cpu_least", "idle", "offcpu", "frozen"})
"""They go along with a slow-down of any cause: who waits for the slow one sleeps or spins longer."""
_LOCATION_ONLY = frozenset({"schedule", "execute", "sample", "update", "gap"})


def log_t(x: float, mean: Array | float, scale: Array | float) -> Array:
    """Log density of Student's t with ``_FREEDOM`` degrees, shifted and scaled."""
    constant = lgamma((_FREEDOM + 1) / 2) - lgamma(_FREEDOM / 2) - 0.5 * log(_FREEDOM * pi)
    standard = (x - np.asarray(mean, dtype=float)) / scale
    return np.asarray(constant - np.log(scale) - (_FREEDOM + 1) / 2 * np.log1p(standard**2 / _FREEDOM))


def _mixed(weight: float, first: Array, second: Array) -> Array:
    """log(weight * exp(first) + (1 - weight) * exp(second))."""
    return np.asarray(np.logaddexp(log(weight) + first, log(1 - weight) + second))


def _anywhere(shift: Shift, reach: float = 1.0) -> Array:
    return log_t(shift.moved, 0.0, np.sqrt(shift.sigma**2 + reach**2))


def _stays(shift: Shift, drift: float, reach: float = 1.0) -> Array:
    """Unmoved, but for a chance ``drift`` that something unrelated moved it, by about ``reach``."""
    return _mixed(1 - drift, log_t(shift.moved, 0.0, shift.sigma), _anywhere(shift, reach))


def _directed(shift: Shift, sign: float) -> Array:
    """Moved in one direction by an unknown amount."""
    # At least what stands out of the noise: a signal that did not visibly move must not count as moved.
    means = sign * np.maximum(_MAGNITUDES, 2.5 * shift.sigma)
    each = log_t(shift.moved, means, np.sqrt(shift.sigma**2 + (_TOLERANCE * means) ** 2))
    return np.asarray(np.logaddexp.reduce(each) - log(len(means)))


def _coupled(shift: Shift, table: Table, coupling: float) -> Array:
    """Moved by ``coupling`` times the slow-down; one value per strength."""
    spec = table.signals[shift.signal]
    means = np.array([expected_move(spec, shift.normal, coupling * s) for s in _STRENGTHS])
    exact = log_t(shift.moved, means, np.sqrt(shift.sigma**2 + (_TOLERANCE * means) ** 2))
    return _mixed(0.97, exact, np.broadcast_to(_anywhere(shift), exact.shape))


def _move(shift: Shift, table: Table, move: float | str | None, drift: float) -> Array:
    if move is None:
        return _stays(shift, drift)
    if move == "free":
        return _mixed(0.5, log_t(shift.moved, 0.0, shift.sigma), _anywhere(shift))
    if move == "with":
        return _mixed(0.45, _stays(shift, 0.2), _coupled(shift, table, 1.0))
    if isinstance(move, str):
        return _directed(shift, 1.0 if move == "up" else -1.0)
    return _coupled(shift, table, move)


def _cause(signature: Signature, shifts: Mapping[str, Shift], table: Table) -> float:
    total = np.zeros(len(_STRENGTHS))
    for name, shift in shifts.items():
        # Where a cause does not lengthen steps beyond their work, a lengthened step speaks against it.
        drift = 0.01 if name in _LATENCY else 0.02 if name in _ACCOUNTS else 0.1
        one = _move(shift, table, signature.signals.get(name), drift)
        if name in signature.key and signature.seen < 1:
            one = _mixed(signature.seen, one, _stays(shift, 0.01))
        total = total + _TEMPER * one
    return float(np.logaddexp.reduce(total) - log(len(_STRENGTHS)))


def _none(shifts: Mapping[str, Shift]) -> float:
    """Steps take what their work explains; whatever else drifts does not matter, but for time that a step
    cannot lose without becoming longer."""
    total = 0.0
    for name, shift in shifts.items():
        drift, reach = (0.002, 1.0) if name in _LATENCY else _HARMLESS if name in _ACCOUNTS else (0.3, 1.0)
        total += _TEMPER * float(_stays(shift, drift, reach))
    return total


def _unknown(shifts: Mapping[str, Shift], table: Table) -> float:
    """Steps take longer, and each other signal may have moved on its own."""
    total = np.zeros(len(_STRENGTHS))
    for name, shift in shifts.items():
        move: float | str | None = 1.0 if name == "slow" else "with" if name in _FOLLOWING else None
        total = total + _TEMPER * _move(shift, table, move, 0.15)
    return float(np.logaddexp.reduce(total) - log(len(_STRENGTHS)))


def considered(table: Table, shifts: Mapping[str, Shift]) -> list[Signature]:
    """The causes that could show in what was observed."""
    return [signature for signature in table.causes.values() if any(key in shifts for key in signature.key)]


def _key_moved(signature: Signature, shifts: Mapping[str, Shift]) -> bool:
    """Whether any signal that sets the cause apart visibly moved the way it should."""
    for name in signature.key:
        sign = -1.0 if signature.signals.get(name) == "down" else 1.0
        if name in shifts and sign * shifts[name].z > _VISIBLE:
            return True
    return False


def probabilities(table: Table, shifts: Mapping[str, Shift]) -> dict[str, float]:
    """Cause -> probability, with ``none`` and ``unknown``; sums to 1. Where no latency signal was
    observed, ``none`` cannot be told and everything rests on ``unknown``."""
    used = {name: shift for name, shift in shifts.items() if name not in _LOCATION_ONLY}
    if "slow" not in used:
        return {"unknown": 1.0}
    weight = sum(signature.prior for signature in table.causes.values())
    scores = {
        "none": log(_PRIOR_NONE) + _none(used),
        "unknown": log(_PRIOR_UNKNOWN) + _unknown(used, table),
    }
    for signature in considered(table, used):
        prior = _PRIOR_CAUSES * signature.prior / weight
        if signature.seen == 1 and not _key_moved(signature, used):
            prior *= _WITHOUT_KEY
        scores[signature.cause] = log(prior) + _cause(signature, used, table)
    largest = max(scores.values())
    raw = {cause: float(np.exp(score - largest)) for cause, score in scores.items()}
    total = sum(raw.values())
    return {cause: value / total for cause, value in raw.items()}
