"""Which cause fits the shifts best: Student-t likelihoods, the strength of the fault averaged out."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from math import lgamma, log, pi
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from latencyprism.diagnose.shifts import Shift, expected_move
from latencyprism.diagnose.signatures import Signature, Table

Array = npt.NDArray[np.float64]

_FREEDOM = 4.0
STRENGTHS = np.geomspace(0.02, 8.0, 28)
"""Slow-downs considered, in shares of a normal step, each as likely a priori (log-uniform)."""
_TOLERANCE = 0.35
"""A signature's shape is believed to this relative accuracy."""
_MAGNITUDES = np.array([0.15, 0.3, 0.6, 1.2, 2.4, 4.8])
_PARTS = (0.1, 0.25, 0.5, 1.0)
"""Of the slow-down, by which a signal that goes along with it may rise."""
_MULTIPLES = (1.0, 1.5, 2.5, 4.0)
"""Of the slow-down, by which a signal rises that is counted once for each CPU."""
TEMPER = 0.7
"""Signals are not independent; each counts for less than a whole observation."""

_PRIOR_NONE, _PRIOR_UNKNOWN, _PRIOR_CAUSES = 0.6, 0.04, 0.36
_PRIOR_PAIRS, _MOST_PAIRED = 0.5, 6
"""Of each two causes that are both visible, times their priors; at most so many are paired."""
_SPLITS = np.array([0.2, 0.35, 0.5, 0.65, 0.8])
_VISIBLE, _WITHOUT_KEY = 2.0, 0.05
"""A cause whose key signals did not move by so many sigma is held for so much less likely."""
_EXPLAINED, _COVERS, _JUMPED = 0.1, 0.5, 4.0
"""So much less likely is what rests on waiting or on nothing known, where an account of its own rose by at
least that part of the slow-down, or a count by so many sigma."""
_LATENCY = ("slow", "level", "stall", "arrival_lag", "delivery_lag")
_ACCOUNTS, _HARMLESS = frozenset({"throttled", "stopped", "gc", "steal"}), (0.02, 0.1)
_EVENTS = frozenset(
    {"write_calls", "major_faults", "allocation_stalls", "tcp_again", "preempted", "narrowed"}
)
"""What hardly changes unless something makes it."""
_WORK = frozenset({"work", "prefill_tokens", "cached_tokens", "preempted"})
"""What changes here changes what users wait for, though each step takes what its work explains."""
_FOLLOWING = frozenset(
    {"level", "stall", "cpu", "cpu_least", "idle", "offcpu", "slept", "frozen", "arrival_lag", "delivery_lag"}
)
"""They go along with a slow-down of any cause: who waits for the slow one sleeps or spins longer."""
_LAGS = frozenset({"arrival_lag", "delivery_lag"})
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


def coupled(shift: Shift, table: Table, rises: Array) -> Array:
    """Moved as a rise by each of ``rises`` moves it; one value for each."""
    spec = table.signals[shift.signal]
    means = np.array([expected_move(spec, shift.normal, rise) for rise in rises.tolist()])
    exact = log_t(shift.moved, means, np.sqrt(shift.sigma**2 + (_TOLERANCE * means) ** 2))
    return _mixed(0.97, exact, np.broadcast_to(_anywhere(shift), exact.shape))


def along(shift: Shift, table: Table, strengths: Array) -> Array:
    """Stayed, or rose by a part of the slow-down."""
    parts = [coupled(shift, table, part * strengths) for part in _PARTS]
    rose = np.asarray(np.logaddexp.reduce(parts, axis=0) - log(len(_PARTS)))
    return _mixed(0.45, _stays(shift, 0.2), rose)


def _over(shift: Shift, table: Table, strengths: Array) -> Array:
    """Rose by the slow-down, or by several times it."""
    each = [coupled(shift, table, times * strengths) for times in _MULTIPLES]
    return np.asarray(np.logaddexp.reduce(each, axis=0) - log(len(each)))


def moved_so(
    shift: Shift, table: Table, move: float | str | None, drift: float, strengths: Array = STRENGTHS
) -> Array:
    """Log likelihood of a shift under what a signature says of its signal; one value for each strength, or
    one for all."""
    if move is None:
        return _stays(shift, drift)
    if move == "free":
        return _mixed(0.5, log_t(shift.moved, 0.0, shift.sigma), _anywhere(shift))
    if move == "with":
        return along(shift, table, strengths)
    if move == "over":
        return _over(shift, table, strengths)
    if isinstance(move, str):
        return _directed(shift, 1.0 if move == "up" else -1.0)
    return coupled(shift, table, move * strengths)


def drift_of(signal: str) -> float:
    """Chance that a signal moved for a reason of its own. Where a cause does not lengthen steps beyond their
    work, a lengthened step speaks against it."""
    if signal in _LATENCY:
        return 0.01
    return 0.02 if signal in _ACCOUNTS else 0.05 if signal in _EVENTS else 0.1


def move_of(signature: Signature, signal: str) -> float | str | None:
    """What a cause does to a signal; requests wait for the step that is under way, whatever makes it long."""
    move = signature.signals.get(signal)
    return "with" if move is None and signal in _LAGS and "slow" in signature.signals else move


def weights(shifts: Mapping[str, Shift], table: Table) -> dict[str, float]:
    """How much each signal counts. Those that tell the same time by other means count as one together:
    a thread that sleeps is seen by the sampler, by spans and by steps, and is no less asleep for that."""
    told: dict[str, int] = {}
    for name in shifts:
        same = table.signals[name].same
        if same is not None:
            told[same] = told.get(same, 0) + 1
    return {name: TEMPER / told.get(table.signals[name].same or "", 1) for name in shifts}


def _cause(signature: Signature, shifts: Mapping[str, Shift], table: Table) -> float:
    total = np.zeros(len(STRENGTHS))
    weight = weights(shifts, table)
    for name, shift in shifts.items():
        one = moved_so(shift, table, move_of(signature, name), drift_of(name))
        if name in signature.key and signature.seen < 1:
            one = _mixed(signature.seen, one, _stays(shift, 0.01))
        total = total + weight[name] * one
    return float(np.logaddexp.reduce(total) - log(len(STRENGTHS)))


def _none(shifts: Mapping[str, Shift], table: Table) -> float:
    """Steps take what their work explains; whatever else drifts does not matter, but for time that a step
    cannot lose without becoming longer."""
    total = 0.0
    weight = weights(shifts, table)
    for name, shift in shifts.items():
        drift, reach = (0.3, 1.0)
        if name in _LATENCY:
            drift = 0.002
        elif name in _ACCOUNTS:
            drift, reach = _HARMLESS
        elif name in _WORK:
            drift = 0.1
        total += weight[name] * float(_stays(shift, drift, reach))
    return total


def _unknown(shifts: Mapping[str, Shift], table: Table) -> float:
    """Steps take longer, and each other signal may have moved on its own; what a known cause alone moves
    seldom does."""
    total = np.zeros(len(STRENGTHS))
    weight = weights(shifts, table)
    for name, shift in shifts.items():
        move: float | str | None = 1.0 if name == "slow" else "with" if name in _FOLLOWING else None
        drift = drift_of(name) if name in _ACCOUNTS | _EVENTS else 0.15
        total = total + weight[name] * moved_so(shift, table, move, drift)
    return float(np.logaddexp.reduce(total) - log(len(STRENGTHS)))


def considered(table: Table, shifts: Mapping[str, Shift]) -> list[Signature]:
    """The causes that could show in what was observed."""
    return [signature for signature in table.causes.values() if any(key in shifts for key in signature.key)]


def key_moved(signature: Signature, shifts: Mapping[str, Shift]) -> bool:
    """Whether any signal that sets the cause apart visibly moved the way it should."""
    for name in signature.key:
        sign = -1.0 if signature.signals.get(name) == "down" else 1.0
        if name in shifts and sign * shifts[name].z > _VISIBLE:
            return True
    return False


def covers(table: Table, shifts: Mapping[str, Shift], name: str) -> bool:
    """Whether a signal moved so much that it accounts for the slow-down: as time; a count by far."""
    if name not in shifts or shifts[name].z < _JUMPED:
        return False
    slow = shifts["slow"].now - shifts["slow"].normal
    return table.signals[name].kind != "time" or shifts[name].now - shifts[name].normal >= _COVERS * slow


def _known_account(table: Table, shifts: Mapping[str, Shift]) -> bool:
    """Whether an account that only known causes move covers the slow-down."""
    keys = {key for s in table.causes.values() if "slow" in s.signals for key in s.key}
    return any(covers(table, shifts, name) for name in keys & (_ACCOUNTS | _EVENTS))


class Chances(NamedTuple):
    """``causes``: cause -> probability, ``none`` and ``unknown`` among them; sums to 1. What belongs to two
    causes at once is divided between them. ``together``: the likeliest two at once and their probability."""

    causes: dict[str, float]
    together: tuple[str, ...]
    together_probability: float


def judged(table: Table, shifts: Mapping[str, Shift]) -> Chances:
    """Where no latency signal was observed, ``none`` cannot be told and everything rests on ``unknown``."""
    used = {name: shift for name, shift in shifts.items() if name not in _LOCATION_ONLY}
    if "slow" not in used:
        return Chances({"unknown": 1.0}, (), 0.0)
    weight = sum(signature.prior for signature in table.causes.values())
    scores: dict[tuple[str, ...], float] = {
        ("none",): log(_PRIOR_NONE) + _none(used, table),
        ("unknown",): log(_PRIOR_UNKNOWN) + _unknown(used, table),
    }
    if _known_account(table, used):
        scores["unknown",] += log(_EXPLAINED)
    visible = []
    for signature in considered(table, used):
        prior = _PRIOR_CAUSES * signature.prior / weight
        if key_moved(signature, used):
            visible.append(signature)
        elif signature.seen == 1:
            prior *= _WITHOUT_KEY
        if any(covers(table, used, name) for name in signature.yields_to):
            prior *= _EXPLAINED
        scores[signature.cause,] = log(prior) + _cause(signature, used, table)
    visible.sort(key=lambda signature: (-scores[signature.cause,], signature.cause))
    for first, second in combinations(visible[:_MOST_PAIRED], 2):
        prior = _PRIOR_PAIRS * first.prior * second.prior / weight**2
        pair = (first.cause, second.cause)
        scores[pair] = log(prior) + both(first, second, used, table)
    return _shared(scores)


def _shared(scores: Mapping[tuple[str, ...], float]) -> Chances:
    largest = max(scores.values())
    raw = {causes: float(np.exp(score - largest)) for causes, score in scores.items()}
    total = sum(raw.values())
    found: dict[str, float] = {}
    for causes, value in raw.items():
        for cause in causes:
            found[cause] = found.get(cause, 0.0) + value / total / len(causes)
    pairs = [causes for causes in raw if len(causes) == 2]
    best = max(pairs, key=lambda causes: raw[causes], default=())
    return Chances(found, best, raw[best] / total if best else 0.0)


def both(first: Signature, second: Signature, shifts: Mapping[str, Shift], table: Table) -> float:
    """Log likelihood of two causes at once, each with a part of the slow-down; strength and part averaged
    out."""
    parts, strengths = (grid.ravel() for grid in np.meshgrid(_SPLITS, STRENGTHS))
    total = np.zeros(len(strengths))
    weight = weights(shifts, table)
    for name, shift in shifts.items():
        moves = (move_of(first, name), move_of(second, name))
        numbers = [move if isinstance(move, (int, float)) else 0.0 for move in moves]
        if "free" in moves:
            one = moved_so(shift, table, "free", 0.0)
        elif any(numbers):
            rises = strengths * (numbers[0] * parts + numbers[1] * (1 - parts))
            one = coupled(shift, table, rises)
            if "with" in moves:  # the other's part may show here, too
                one = _mixed(0.5, one, coupled(shift, table, strengths))
        else:
            named = [move for move in moves if move is not None]
            directed = ["up" if move == "over" else move for move in named if move in ("up", "down", "over")]
            move = (directed or named or [None])[0]
            one = moved_so(shift, table, move, drift_of(name), strengths)
        total = total + weight[name] * one
    return float(np.logaddexp.reduce(total) - log(len(total)))


def probabilities(table: Table, shifts: Mapping[str, Shift]) -> dict[str, float]:
    """``judged(...).causes``."""
    return judged(table, shifts).causes
