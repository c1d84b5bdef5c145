"""One timeline for several clocks, each placed on it with a bound on the error.

Whatever ties two clocks together comes down to two kinds of fact: *when ours showed T, the other showed R at
most*, or *at least*. A reading of the other clock between two of ours gives one of each. So do the two
directions of an exchange over a network, however long and however unequal their ways were: what was received
was sent before. So does any pair of events of which one cannot come before the other. The offset between the
clocks is what all facts allow together with limits on how fast it drifts, and how fast that rate itself may
change; the bound is the width of what they allow, not a guess from the spread of readings.

The limits are assumptions and belong to the answer. A clock that breaks them (the wall clock when it is set)
contradicts its earlier facts: then a new epoch begins, and between the two nothing closer is known than that
either may hold.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable
from enum import Enum
from typing import NamedTuple

from latencyprism.errors import BadInput
from latencyprism.timeline.clock_bounds import (
    FAR_NS,
    NETWORK,
    RESOLUTION_NS,
    SET_ONLY,
    SLACK_NS,
    STEERED,
    Epoch,
    Fact,
    Limits,
)

KEPT_EPOCHS = 64
SLOW_FACTOR = 8.0
"""An exchange that takes so much longer than the quickest of the last ones says too little to be worth it."""


class Order(Enum):
    """Of two events: is the first known to be before the other, after it, or neither?"""

    BEFORE = "before"
    AFTER = "after"
    UNKNOWN = "unknown"


class Moment(NamedTuple):
    """Between these two times of the timeline's clock, both included."""

    earliest_ns: int
    latest_ns: int

    @property
    def ns(self) -> int:
        return (self.earliest_ns + self.latest_ns) // 2

    @property
    def error_ns(self) -> int:
        """At most so far from ``ns``."""
        return (self.latest_ns - self.earliest_ns + 1) // 2

    def order(self, other: Moment) -> Order:
        """What can be proved, and no more."""
        if self.latest_ns < other.earliest_ns:
            return Order.BEFORE
        return Order.AFTER if self.earliest_ns > other.latest_ns else Order.UNKNOWN


class ClockTrack:
    """One other clock, tied to ours by facts as they come in. All times in ns.

    ``paired`` and ``exchange`` bound the offset from both sides and carry the track on; one that took
    far longer than others did of late is left out. ``at_most``, ``at_least`` and ``collective`` tighten what
    lies between exchanges. An exchange that contradicts those before begins a new epoch; anything else that
    does is not taken (``refused``).
    """

    def __init__(self, limits: Limits = NETWORK) -> None:
        self.limits = limits
        self.refused = 0
        self.slow = 0
        """Exchanges that were left out."""
        self._origin: tuple[int, int] | None = None
        self._epochs: list[Epoch] = [Epoch()]
        self._widths: deque[int] = deque(maxlen=16)
        self._ahead: deque[Fact] = deque(maxlen=256)

    @property
    def epochs(self) -> int:
        """One more than the times that the clock was set, as far as its facts show."""
        return len(self._epochs)

    # -- facts -----------------------------------------------------------------------------------

    def at_most(self, ours_ns: int, other_ns: int) -> None:
        """When ours showed ``ours_ns`` the other had not gone beyond ``other_ns``."""
        self._tighten(self._fact(ours_ns, other_ns, most=True))

    def at_least(self, ours_ns: int, other_ns: int) -> None:
        """When ours showed ``ours_ns`` the other had reached ``other_ns``."""
        self._tighten(self._fact(ours_ns, other_ns, most=False))

    def collective(self, began_ns: int, ended_ns: int, other_began_ns: int, other_ended_ns: int) -> None:
        """A collective ends on no rank before it has begun on the last."""
        self.at_most(began_ns, other_ended_ns)
        self.at_least(ended_ns, other_began_ns)

    def paired(self, before_ns: int, other_ns: int, after_ns: int) -> None:
        """The other clock was read between two readings of ours."""
        self.exchange(before_ns, other_ns, other_ns, after_ns)

    def exchange(self, sent_ns: int, arrived_ns: int, answered_ns: int, received_ns: int) -> None:
        """Four time stamps: sent and received by ours, arrived and answered by the other."""
        width = (received_ns - sent_ns) - (answered_ns - arrived_ns)
        if received_ns < sent_ns or answered_ns < arrived_ns:
            raise BadInput("an exchange of time stamps ends before it begins")
        least = min(self._widths, default=width)
        self._widths.append(width)
        if width > SLOW_FACTOR * max(least, RESOLUTION_NS):
            self.slow += 1
            return
        facts = (self._fact(sent_ns, arrived_ns, most=True), self._fact(received_ns, answered_ns, most=False))
        epoch = self._epochs[-1]
        if any(epoch.contradicts(fact, self.limits) for fact in facts):
            if facts[0].at < epoch.last:
                self.refused += 1
                return
            epoch = Epoch()
            self._epochs.append(epoch)
            del self._epochs[:-KEPT_EPOCHS]
        for fact in facts:
            epoch.add(fact, self.limits)
        # The clock may have been set on the way: the epoch is known to hold before and from after it.
        epoch.first, epoch.last = min(epoch.first, facts[1].at), max(epoch.last, facts[0].at)
        waiting = list(self._ahead)
        self._ahead.clear()
        for fact in waiting:
            self._tighten(fact)

    def _fact(self, ours_ns: int, other_ns: int, most: bool) -> Fact:
        if self._origin is None:
            self._origin = (ours_ns, other_ns)
        ours, other = ours_ns - self._origin[0], other_ns - self._origin[1]
        return Fact(float(ours), float(other - ours), most)

    def _tighten(self, fact: Fact) -> None:
        """One that is ahead of the exchanges waits for the next: the clock may have been set before it."""
        if fact.at > self._epochs[-1].last:
            self._ahead.append(fact)
            return
        epoch = next((one for one in self._epochs if one.first <= fact.at <= one.last), None)
        if epoch is None or epoch.contradicts(fact, self.limits):
            self.refused += 1
        elif epoch.tightens(fact, self.limits):
            epoch.add(fact, self.limits)

    # -- answers ---------------------------------------------------------------------------------

    def offset(self, ours_ns: int) -> tuple[int, int] | None:
        """(least, most) the other clock was ahead of ours at ``ours_ns``; None before there are facts on both
        sides."""
        if self._origin is None:
            return None
        found = self._offset(float(ours_ns - self._origin[0]))
        if found is None:
            return None
        base = self._origin[1] - self._origin[0]
        return base + math.floor(found[0] - SLACK_NS), base + math.ceil(found[1] + SLACK_NS)

    def _offset(self, at: float) -> tuple[float, float] | None:
        found = [
            bounds
            for epoch in self._epochs_at(at)
            if max(map(abs, bounds := epoch.offset(at, self.limits))) < FAR_NS
        ]
        if not found:
            return None
        lower, upper = min(one[0] for one in found), max(one[1] for one in found)
        return (lower, upper) if lower <= upper else (upper, lower)

    def _epochs_at(self, at: float) -> list[Epoch]:
        """The epoch of a time, or the two that it lies between."""
        within = [epoch for epoch in self._epochs if epoch.first <= at <= epoch.last]
        if within:
            return within
        before = [epoch for epoch in self._epochs if epoch.last < at]
        after = [epoch for epoch in self._epochs if epoch.first > at]
        return [*before[-1:], *after[:1]]

    def place(self, other_ns: int) -> Moment | None:
        """When, by our clock, the other showed ``other_ns``; None before there are facts on both sides."""
        if self._origin is None:
            return None
        shown = float(other_ns - self._origin[1])
        places = [place for epoch in self._epochs if (place := self._place(shown, epoch)) is not None]
        if len(self._epochs) > 1:
            places = self._likely(places)
        if not places:
            return None
        ours = self._origin[0]
        earliest, latest = min(one[0] for one in places), max(one[1] for one in places)
        return Moment(ours + math.floor(earliest - SLACK_NS), ours + math.ceil(latest + SLACK_NS))

    def _place(self, shown: float, epoch: Epoch) -> tuple[float, float, Epoch] | None:
        at = shown
        for _ in range(2):
            lower, upper = epoch.offset(at, self.limits)
            if max(abs(lower), abs(upper)) >= FAR_NS:
                return None
            at = shown - (lower + upper) / 2
        lower, upper = epoch.offset(at, self.limits)
        # The bounds hold at ``at``; at the true time, so far from it at most, they are as much wider as the
        # clock may have drifted between.
        off = abs(shown - (lower + upper) / 2 - at)
        reach = (abs(upper - lower) / 2 + off) / (1.0 - self.limits.drift_ppm * 1e-6)
        return at - reach, at + reach, epoch

    def _likely(self, places: list[tuple[float, float, Epoch]]) -> list[tuple[float, float, Epoch]]:
        """Of several epochs those whose own stretch, up to its neighbours', can hold the time."""
        held = []
        for earliest, latest, epoch in places:
            at = self._epochs.index(epoch)
            begins = self._epochs[at - 1].last if at else -math.inf
            ends = self._epochs[at + 1].first if at + 1 < len(self._epochs) else math.inf
            if latest >= begins and earliest <= ends:
                held.append((max(earliest, begins), min(latest, ends), epoch))
        return held or places

    @property
    def drift_ppm(self) -> float | None:
        """How fast the other clock gains on ours, of late."""
        slope = self._epochs[-1].slope(self.limits)
        return None if slope is None else slope * 1e6


class Timeline:
    """Events of several sources on the time of one. ``own``: the source whose clock is the timeline's."""

    def __init__(self, own: str) -> None:
        self.own = own
        self.tracks: dict[str, ClockTrack] = {}

    def track(self, source: str, limits: Limits = NETWORK) -> ClockTrack:
        """The track of a source, made where there is none."""
        if source == self.own:
            raise BadInput(f"{source} is the timeline's own clock")
        return self.tracks.setdefault(source, ClockTrack(limits))

    def place(self, source: str, time_ns: int) -> Moment | None:
        """None where nothing ties the source to the timeline."""
        if source == self.own:
            return Moment(time_ns, time_ns)
        track = self.tracks.get(source)
        return track.place(time_ns) if track is not None else None

    def order(self, first: tuple[str, int], second: tuple[str, int]) -> Order:
        """Of two events, each a source and a time by its clock."""
        if first[0] == second[0]:
            own = Moment(first[1], first[1]).order(Moment(second[1], second[1]))
            track = self.tracks.get(first[0])
            return own if track is None or track.epochs == 1 else Order.UNKNOWN
        places = [self.place(*event) for event in (first, second)]
        if places[0] is None or places[1] is None:
            return Order.UNKNOWN
        return places[0].order(places[1])


MACHINE_CLOCKS = {
    "realtime": (time.CLOCK_REALTIME, SET_ONLY),
    "boottime": (time.CLOCK_BOOTTIME, SET_ONLY),
    "monotonic_raw": (time.CLOCK_MONOTONIC_RAW, STEERED),
}
"""Clocks of this machine beside CLOCK_MONOTONIC."""


def read_machine_clocks(timeline: Timeline, tries: int = 5) -> None:
    """Paired readings of every clock of this machine, the closest of ``tries``; some microseconds each."""
    for name, (number, limits) in MACHINE_CLOCKS.items():
        timeline.track(name, limits).paired(*closest(number, tries))


def wall_clock(timeline: Timeline, now_ns: int) -> dict[str, int]:
    """``monotonic_ns`` and the ``realtime_ns`` that goes with it to within ``error_ns``; ``times_set``: how
    often the wall clock was set since the readings began. Empty without readings."""
    track = timeline.tracks.get("realtime")
    ahead = track.offset(now_ns) if track is not None else None
    if track is None or ahead is None:
        return {}
    return {
        "monotonic_ns": now_ns,
        "realtime_ns": now_ns + (ahead[0] + ahead[1]) // 2,
        "error_ns": (ahead[1] - ahead[0] + 1) // 2,
        "times_set": track.epochs - 1,
    }


def closest(number: int, tries: int = 5) -> tuple[int, int, int]:
    """(CLOCK_MONOTONIC before, clock ``number``, CLOCK_MONOTONIC after), of ``tries`` the narrowest."""
    readings: Iterable[tuple[int, int, int]] = (
        (time.monotonic_ns(), time.clock_gettime_ns(number), time.monotonic_ns()) for _ in range(tries)
    )
    return min(readings, key=lambda reading: reading[2] - reading[0])
