"""Which fault fits the moves of the features: Student-t likelihoods, the strength averaged out."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from latencyprism.diagnose.artefact.features import COUNTERS
from latencyprism.diagnose.posterior import log_t

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Array = npt.NDArray[np.float64]

STRENGTHS = np.geomspace(0.03, 1.3, 24)
"""Of the signature's full strength, each as likely a priori (log-uniform)."""
_TOLERANCE = 0.25
_REACH = 1.0
_DRIFT, _SPIKE, _UNCAUSED = 0.03, 0.15, 0.004
"""Chance that a feature moves for a reason of its own: under a cause or a counter under ``none``; under
``unknown``; a cost under ``none``."""
_TEMPER = 0.8
"""Features are not independent; each counts for less than a whole observation."""
_PRIOR_NONE, _PRIOR_UNKNOWN = 0.5, 0.1


@dataclass(frozen=True, slots=True)
class Signature:
    """``tolerance``: relative accuracy to which its shape is believed."""

    moves: dict[str, float]
    maybe: frozenset[str]
    tolerance: float


@dataclass(frozen=True, slots=True)
class Catalogue:
    floor: dict[str, float]
    causes: dict[str, Signature]


@cache
def catalogue() -> Catalogue:
    """The table that comes with the package."""
    text = resources.files(__package__).joinpath("signatures.toml").read_text(encoding="utf-8")
    raw = tomllib.loads(text)
    causes = {}
    for name, fields in raw["causes"].items():
        maybe, tolerance = frozenset(fields.pop("maybe", ())), float(fields.pop("tolerance", _TOLERANCE))
        causes[name] = Signature({feature: float(move) for feature, move in fields.items()}, maybe, tolerance)
    return Catalogue({name: float(value) for name, value in raw["floor"].items()}, causes)


class Move(NamedTuple):
    """``moved``: change of the log value; ``sigma``: its uncertainty."""

    moved: float
    sigma: float

    @property
    def z(self) -> float:
        return self.moved / self.sigma


def moves(
    reference: Mapping[str, Array], suspect: Mapping[str, Array], floor: Mapping[str, float]
) -> dict[str, Move]:
    """Of features on their log scale, one value a cycle or second; those on one side only are absent."""
    found = {}
    for name in sorted(reference.keys() & suspect.keys() & floor.keys()):
        before, now = reference[name], suspect[name]
        if not len(before) or not len(now):
            continue
        usual = _spread(before)
        # A few suspect cycles do not tell their own spread.
        present = max(_spread(now), usual) if len(now) >= 4 else max(usual, floor[name])
        variance = usual**2 / len(before) + present**2 / len(now) + floor[name] ** 2
        found[name] = Move(float(np.median(now) - np.median(before)), math.sqrt(variance))
    return found


def _spread(values: Array) -> float:
    """Median deviation; unlike the standard deviation it does not mind a first cycle of another kind."""
    return 1.4826 * 1.25 * float(np.median(np.abs(values - np.median(values))))


def _mixed(weight: float, first: Array, second: Array) -> Array:
    return np.asarray(np.logaddexp(math.log(weight) + first, math.log(1 - weight) + second))


def _anywhere(move: Move) -> Array:
    return log_t(move.moved, 0.0, math.hypot(move.sigma, _REACH))


def _stays(move: Move, drift: float) -> Array:
    return _mixed(1 - drift, log_t(move.moved, 0.0, move.sigma), _anywhere(move))


def _follows(move: Move, full: float, tolerance: float) -> Array:
    """One value for each strength."""
    # A fall ends well above zero, however strong the fault.
    means = np.log1p(np.maximum(STRENGTHS * (math.exp(full) - 1), min(0.0, math.exp(full) / 1.5 - 1)))
    scales = np.sqrt(move.sigma**2 + (tolerance * means) ** 2)
    exact = log_t(move.moved, means, scales)
    return _mixed(1 - _DRIFT, exact, np.broadcast_to(_anywhere(move), exact.shape))


def _fits(signature: Signature, found: Mapping[str, Move]) -> float:
    total = np.zeros(len(STRENGTHS))
    for name, move in found.items():
        if name not in signature.moves:
            one = _stays(move, _DRIFT)
        else:
            one = _follows(move, signature.moves[name], signature.tolerance)
        if name in signature.maybe:
            one = _mixed(0.5, one, _stays(move, _DRIFT))
        total = total + _TEMPER * one
    return float(np.logaddexp.reduce(total) - math.log(len(STRENGTHS)))


def probabilities(found: Mapping[str, Move], table: Catalogue) -> dict[str, float]:
    """Cause -> probability, ``none`` and ``unknown`` among them; sums to 1. A cause of which nothing could
    have been seen is not considered."""
    seen = {name: one for name, one in table.causes.items() if any(f in found for f in one.moves)}
    if not seen:
        return {"unknown": 1.0}
    prior = (1 - _PRIOR_NONE - _PRIOR_UNKNOWN) / len(seen)
    scores = {
        "none": math.log(_PRIOR_NONE)
        + sum(_TEMPER * float(_stays(m, _DRIFT if n in COUNTERS else _UNCAUSED)) for n, m in found.items()),
        "unknown": math.log(_PRIOR_UNKNOWN) + sum(_TEMPER * float(_stays(m, _SPIKE)) for m in found.values()),
    }
    for name, signature in seen.items():
        scores[name] = math.log(prior) + _fits(signature, found)
    largest = max(scores.values())
    raw = {name: math.exp(score - largest) for name, score in scores.items()}
    total = sum(raw.values())
    return {name: value / total for name, value in raw.items()}
