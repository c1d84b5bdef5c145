"""Clocks that run too fast or too slow, change their rate, and are set; and a network between two of them.

The true time exists only here: ns from 0. What the code under test sees are readings of the clocks.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from itertools import pairwise

from latencyprism.timeline.clock_bounds import Limits

HALF_DRIFT = 250e-6
"""Of each clock: two of them drift apart by no more than twice as much."""
HALF_WANDER = 0.45e-15
LIMITS = Limits(drift_ppm=600.0, wander_ppm_per_s=1.0)
PIECE_NS = 1_000_000_000


@dataclass
class SimulatedClock:
    """Reads ``base + the integral of its rate``: the rate moves in straight pieces of a second each, within
    ``HALF_DRIFT`` and ``HALF_WANDER``. ``sets``: (true time, by how much it was set then)."""

    base: int
    rates: list[float]
    sets: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._gained = [0.0]
        for first, second in pairwise(self.rates):
            self._gained.append(self._gained[-1] + PIECE_NS * (first + second) / 2)

    @classmethod
    def drawn(cls, dice: random.Random, seconds: float) -> SimulatedClock:
        """Any such clock, for a stretch of true time."""
        rate = dice.uniform(-HALF_DRIFT, HALF_DRIFT)
        rates = [rate]
        for _ in range(math.ceil(seconds) + 2):
            moved = rate + dice.uniform(-1, 1) * HALF_WANDER * PIECE_NS
            rate = min(max(moved, -HALF_DRIFT), HALF_DRIFT)
            rates.append(rate)
        return cls(dice.choice((0, 10**9, 5 * 10**15, 1_790_000_000 * 10**9)) + dice.randrange(10**12), rates)

    def read(self, true_ns: int) -> int:
        piece, into = divmod(true_ns, PIECE_NS)
        first, second = self.rates[piece], self.rates[piece + 1]
        gained = self._gained[piece] + into * first + (second - first) * into * into / PIECE_NS / 2
        return self.base + true_ns + math.floor(gained) + sum(by for at, by in self.sets if at <= true_ns)


@dataclass(frozen=True)
class Path:
    """One direction of a network. Delays are ``least_ns`` plus a heavy-tailed wait, and now and then a burst
    of congestion on top."""

    least_ns: float
    wait_ns: float
    burst: float

    @classmethod
    def drawn(cls, dice: random.Random) -> Path:
        return cls(10 ** dice.uniform(4.0, 6.3), 10 ** dice.uniform(3.5, 6.0), dice.choice((0.0, 0.05, 0.3)))

    def delay(self, dice: random.Random) -> int:
        wait = self.wait_ns * (dice.paretovariate(1.5) - 1 if dice.random() < 0.5 else dice.expovariate(1))
        burst = 10 ** dice.uniform(6, 7.7) if dice.random() < self.burst else 0.0
        return int(self.least_ns + min(wait, 1e9) + burst)
