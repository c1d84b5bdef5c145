"""What facts about two clocks allow: the offset between them, and how wide it is open.

A fact says of one time of ours that the offset of the other clock is at most, or at least, so much. See
``timeline.clocks``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from latencyprism.errors import BadInput

Floats = npt.NDArray[np.float64]

KEPT_FACTS = 64
RESOLUTION_NS = 1.0
"""A clock that shows R has reached R and not yet R + 1."""
SLACK_NS = 4.0
"""For rounding, and for facts that touch."""
WORTH_KEEPING = 0.1
FAR_NS = 1e18
"""Further than any two clocks of ours lie apart: not known."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What is taken for granted of the other clock, relative to ours. ``drift_ppm``: it gains or loses no
    more than that. ``wander_ppm_per_s``: its rate changes by no more than that a second (inf: it may jump
    within ``drift_ppm``)."""

    drift_ppm: float = 600.0
    wander_ppm_per_s: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.drift_ppm < 100_000 or not self.wander_ppm_per_s >= 0:
            raise BadInput("a drift must be from 0 to 100000 ppm, a wander at least 0")


NETWORK = Limits()
"""Clocks of two nodes: crystals within 50 ppm, each steered by at most 500 ppm; a temperature moves a rate
slowly."""
STEERED = Limits(drift_ppm=600.0, wander_ppm_per_s=math.inf)
"""Clocks of one machine of which one is steered: its rate changes at once when the steering does."""
SET_ONLY = Limits(0.0, 0.0)
"""CLOCK_REALTIME and CLOCK_BOOTTIME against CLOCK_MONOTONIC: all are steered alike; the offset changes when
the clock is set, or the machine slept."""


class Fact(NamedTuple):
    at: float
    offset: float
    most: bool


class Facts(NamedTuple):
    """Of one kind: at our time ``at`` the offset is at most (or at least) ``bound``; both relative to an
    origin, because what is told of 1.8e18 ns must be right to one."""

    at: list[float]
    bound: list[float]


class Epoch:
    """A stretch in which no fact contradicts the others, from ``first`` to ``last``."""

    def __init__(self) -> None:
        self.most, self.least = Facts([], []), Facts([], [])
        self.first, self.last = math.inf, -math.inf

    def add(self, fact: Fact, limits: Limits) -> None:
        facts = self.most if fact.most else self.least
        facts.at.append(fact.at)
        facts.bound.append(fact.offset + (RESOLUTION_NS if fact.most else -RESOLUTION_NS))
        if len(facts.at) > KEPT_FACTS:
            self._thin(facts, fact.most, limits)

    def _thin(self, facts: Facts, most: bool, limits: Limits) -> None:
        """Of two close neighbours in the older half the one that says more stays: that of the lesser delay.
        The oldest stays, and so do those that stand apart."""
        order = sorted(range(len(facts.at)), key=facts.at.__getitem__)
        slope = self.slope(limits) or 0.0
        half = len(order) // 2 | 1
        pairs = list(zip(order[1:half:2], order[2:half:2]))
        close = 4 * median(facts.at[later] - facts.at[earlier] for earlier, later in pairs)
        kept = order[:1]
        for pair in pairs:
            tight = {place: facts.bound[place] - slope * facts.at[place] for place in pair}
            better = (min if most else max)(tight, key=tight.__getitem__)
            kept += [better] if facts.at[pair[1]] - facts.at[pair[0]] <= close else pair
        kept += order[half:]
        facts.at[:], facts.bound[:] = [facts.at[i] for i in kept], [facts.bound[i] for i in kept]

    def contradicts(self, fact: Fact, limits: Limits) -> bool:
        slack = SLACK_NS + RESOLUTION_NS
        if fact.most:
            return fact.offset < self._least(fact.at, limits) - slack
        return fact.offset > self._most(fact.at, limits) + slack

    def tightens(self, fact: Fact, limits: Limits) -> bool:
        """Does it say clearly more than the others already do? What does not would only crowd them out."""
        lower, upper = self.offset(fact.at, limits)
        gain = upper - fact.offset if fact.most else fact.offset - lower
        return gain > WORTH_KEEPING * (upper - lower)

    def slope(self, limits: Limits) -> float | None:
        """How fast the other clock gains on ours, by the middle of what is known at both ends."""
        if not self.last > self.first:
            return None
        ends = [self.offset(at, limits) for at in (self.first, self.last)]
        if max(abs(bound) for pair in ends for bound in pair) >= FAR_NS:
            return None
        return (sum(ends[1]) - sum(ends[0])) / 2 / (self.last - self.first)

    def offset(self, at: float, limits: Limits) -> tuple[float, float]:
        """(least, most) the offset can be at our time ``at``."""
        return self._least(at, limits), self._most(at, limits)

    def _most(self, at: float, limits: Limits) -> float:
        return _highest(at, self.most, self.least, limits)

    def _least(self, at: float, limits: Limits) -> float:
        return -_highest(at, _negated(self.least), _negated(self.most), limits)


def _negated(facts: Facts) -> Facts:
    """The same of the negated offset."""
    return Facts(facts.at, [-bound for bound in facts.bound])


def _highest(at: float, most: Facts, least: Facts, limits: Limits) -> float:
    """The highest offset at ``at`` that lies under every bound of ``most``, for an offset that moves as the
    limits allow.

    With a constant rate this is a linear program in two unknowns, offset and rate; the answer is the tightest
    of what any two facts, or a fact and the limit of the rate, say. A rate that changes loosens a fact by
    wander * distance**2 / 2.
    """
    if not most.at:
        return math.inf
    drift = limits.drift_ppm * 1e-6
    away = np.asarray(most.at) - at
    bound = np.asarray(most.bound)
    alone = float((bound + drift * np.abs(away)).min())
    if math.isinf(limits.wander_ppm_per_s):
        return alone
    wander = limits.wander_ppm_per_s * 1e-15  # of ns per ns**2
    upper = bound + wander * away**2 / 2
    best = min(alone, _between(away, upper))
    if least.at:
        other_away = np.asarray(least.at) - at
        other = np.asarray(least.bound) - wander * other_away**2 / 2
        best = min(best, _beyond(away, upper, other_away, other))
    return best


def _between(away: Floats, upper: Floats) -> float:
    """The line between a bound on one side and one on the other passes no lower than the offset."""
    left, right = away <= 0, away >= 0
    if not left.any() or not right.any():
        return math.inf
    a, b = away[left][:, None], away[right][None, :]
    span = b - a
    with np.errstate(divide="ignore", invalid="ignore"):
        value = (upper[left][:, None] * b - upper[right][None, :] * a) / span
    value = np.where(span > 0, value, np.inf)
    return float(value.min())


def _beyond(away: Floats, upper: Floats, other_away: Floats, other: Floats) -> float:
    """An offset that was at least so much further away and at most so much nearer by cannot have risen by
    more since."""
    near, far = away[:, None], other_away[None, :]
    same_side = (near * far > 0) & (np.abs(far) > np.abs(near))
    with np.errstate(divide="ignore", invalid="ignore"):
        value = (upper[:, None] * far - other[None, :] * near) / (far - near)
    value = np.where(same_side, value, np.inf)
    return float(value.min()) if value.size else math.inf
