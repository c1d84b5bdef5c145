"""Two one-sided CUSUMs for one alert level: a fast one for clear shifts, a slow one for mild and creeping
ones."""

from __future__ import annotations

from latencyprism.detect.settings import Level

RECENT = 0.2
OVER = 0.8
"""A sum still above its limit while the last few steps average less than this share of the slack tells of
a shift that is over: the sum is dropped."""


RAGGED_RATE, RAGGED_MOST, GAUSS = 0.1, 1.5, 1.128
RAREST = 18.0
"""ln of the mean number of quiet steps between false alarms that is asked for at most."""


class ShiftTest:
    """Sums of excess over slack. ``onset`` is the step at which the sum that fired left zero, ``since`` the
    stream time then."""

    __slots__ = ("before", "fast", "fast_onset", "fast_since", "level", "onset", "ragged", "recent", "since",
                 "slow", "slow_onset", "slow_since")  # fmt: skip

    def __init__(self, level: Level) -> None:
        self.level = level
        self.fast = self.slow = self.recent = self.ragged = self.before = 0.0
        self.fast_onset = self.slow_onset = self.onset = 0
        self.fast_since = self.slow_since = self.since = 0.0

    def feed(
        self, fast: float, slow: float, clip: float, wander: float, variance: float, cap: float, step: int,
        clock: float,
    ) -> bool:  # fmt: skip
        """``fast``, ``slow``: residual less allowance, ``slow`` clipped; ``clip``: most that one step adds to
        the fast sum, unless a third of its limit is more; ``wander``, ``variance``: the stream's drift and
        long-run variance; ``clock``: stream time (ms) at the beginning of the step. True if a sum is above
        its limit.

        Limits follow Siegmund's Brownian approximation of the CUSUM's run length,
        ARL ~ exp(2 x slack x limit / variance), solved for the limit.
        """
        level = self.level
        by_drift = level.slack_drift * wander
        if level.slack_ragged:
            by_drift = self._for_raggedness(fast, clip, by_drift)
        recent = self.recent = self.recent + RECENT * ((fast if fast < clip else clip) - self.recent)
        slack, rarity = level.fast_slack, level.rarity
        if by_drift > slack:
            # The drift of a restless machine is no Brownian motion: its bursts pass limits made for one far
            # more often than the formula says. So rarer is asked for as drift comes to rule the slack.
            asked = rarity * by_drift / slack
            rarity = max(rarity, asked if asked < RAREST else RAREST)
            slack = by_drift
        need = rarity * variance / (2.0 * slack)
        limit = level.fast_limit if level.fast_limit > need else need
        if self.fast <= 0.0:
            self.fast_onset, self.fast_since = step, clock
        # No less than three steps may fire the fast sum, however slow they are.
        most = limit / 3.0 + slack
        if most < clip:
            most = clip
        total = self.fast + (fast if fast < most else most) - slack
        top = cap * limit
        self.fast = 0.0 if total < 0.0 else top if total > top else total
        fired = self.fast > limit
        if fired and recent < OVER * slack:
            self.fast, fired = 0.0, False
        if fired:
            self.onset, self.since = self.fast_onset, self.fast_since
        slack = level.slow_slack if level.slow_slack > by_drift else by_drift
        need = rarity * variance / (2.0 * slack)
        limit = level.slow_limit if level.slow_limit > need else need
        if self.slow <= 0.0:
            self.slow_onset, self.slow_since = step, clock
        total = self.slow + slow - slack
        top = cap * limit
        self.slow = 0.0 if total < 0.0 else top if total > top else total
        if self.slow > limit:
            if recent < OVER * slack:
                self.slow = 0.0
            elif not fired:
                self.onset, self.since = self.slow_onset, self.slow_since
                return True
        return fired

    def detectable(self, wander: float, variance: float, steps: int) -> float:
        """The smallest log-ratio at which a shift of so many steps brings one of the sums to its limit."""
        level = self.level
        by_drift = level.slack_drift * wander
        if level.slack_ragged:
            ragged = level.slack_ragged * self.ragged
            by_drift = max(by_drift, min(ragged, RAGGED_MOST * level.fast_slack))
        found = []
        for slack, limit in ((level.fast_slack, level.fast_limit), (level.slow_slack, level.slow_limit)):
            asked = level.rarity
            if by_drift > slack:
                asked = max(asked, min(asked * by_drift / slack, RAREST))
                slack = by_drift
            found.append(slack + max(limit, asked * variance / (2.0 * slack)) / steps)
        return min(found)

    def _for_raggedness(self, fast: float, clip: float, by_drift: float) -> float:
        value = fast if fast < clip else clip
        gap = value - self.before
        self.before = value
        self.ragged += RAGGED_RATE * ((gap if gap >= 0.0 else -gap) / GAUSS - self.ragged)
        slack = self.level.slack_ragged * self.ragged
        most = RAGGED_MOST * self.level.fast_slack
        slack = slack if slack < most else most
        return by_drift if by_drift > slack else slack

    def reset(self) -> None:
        self.fast = self.slow = self.recent = 0.0
