"""Every number of the detector, with its unit; one set for all streams.

All sums and limits are log-ratios observed/expected (0.10 is +10.5 %). Floors say what is worth telling
on the calmest stream; on a restless one the limits grow from the stream's own noise.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import log1p


@dataclass(frozen=True, slots=True)
class Level:
    """One alert level. ``*_drift``: multiples of the stream's drift (``Noise.wander``)."""

    fast_slack: float
    fast_limit: float
    slow_slack: float
    slow_limit: float
    slack_drift: float
    rarity: float
    """ln of the mean number of quiet steps between two false alarms that limits aim at."""
    stall_floor: float
    stall_rarity: float
    """ln of how much rarer than its tail's threshold (evidence 1 in 50, page 1 in 500) a lone slow step
    must be."""
    slack_ragged: float = 0.0
    """Multiple of the present step-to-step sd that the slack is at least, up to half as much again as itself:
    where slow and normal steps alternate, the level has not clearly moved."""


@dataclass(frozen=True, slots=True)
class Settings:
    """``Detector(settings=...)``."""

    evidence: Level = field(default_factory=lambda: Level(0.027, 0.12, 0.027, 0.25, 1.25, 4.5, 0.12, 7.6))
    page: Level = field(default_factory=lambda: Level(0.058, 0.24, 0.058, 0.50, 2.6, 18.0, 0.40, 7.6, 2.0))
    slow_clip: float = 0.08
    fast_clip: float = 0.15
    cap: float = 2.0
    """Sums stop at this multiple of their limit, so that an alarm ends soon after its cause."""
    quarantine: int = 100
    """Steps that an observation of a known kind waits before it is learned."""
    page_dwell_ms: float = 300.0
    """Stream time since its onset after which a shift may page: nobody is called for a wobble that is over
    before it could be looked at. Evidence tells of it at once."""
    page_dwell_most: float = 5.0
    """On a restless machine, whose own drift rules a page's slack, bursts of half a second are its normal
    run: the dwell grows with the drift, up to so many times."""
    page_hold_ms: float = 100.0
    """Stream time for which the page test must hold, so that a level just at the limit does not page."""
    stutter_ms: float = 40.0
    stutter_excess: float = 2.0
    """A step late by this much and by this multiple of its expectation is told as evidence however often that
    happens: whoever reads along sees it."""
    page_stall_ms: float = 25.0
    """A lone slow step pages only if it was late by this much."""
    warm_steps: int = 200
    """Steps before a page can be raised."""
    calm_steps: int = 20
    """Steps without a firing that end an incident."""
    rebase_steps: int = 200
    rebase_floor: float = 0.10
    """A stream that is this much faster than expected for so long has a new, lower baseline."""

    def stutter_limit(self, expected_ms: float) -> float:
        """How late (log) a step of that expectation may be before it is told however often that happens."""
        return log1p(max(self.stutter_excess, self.stutter_ms / expected_ms))
