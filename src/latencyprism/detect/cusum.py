"""Two one-sided CUSUMs for one alert level: a fast one for clear shifts, a slow one for mild and creeping
ones."""

from __future__ import annotations

from math import inf

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
    stream time then. ``tune`` before the first ``feed``."""

    __slots__ = ("before", "by_drift", "cap", "clip", "fast", "fast_limit", "fast_most", "fast_onset",
                 "fast_since", "fast_slack", "level", "onset", "ragged", "recent", "set_for", "since", "slow",
                 "slow_clip", "slow_limit", "slow_onset", "slow_since", "slow_slack",
                 "variance")  # fmt: skip

    def __init__(self, level: Level) -> None:
        self.level = level
        self.fast = self.slow = self.recent = self.ragged = self.before = 0.0
        self.fast_onset = self.slow_onset = self.onset = 0
        self.fast_since = self.slow_since = self.since = 0.0
        self.fast_limit = self.slow_limit = inf

    def tune(self, wander: float, variance: float, clip: float, slow_clip: float, cap: float) -> None:
        """Slacks and limits for the stream's drift (``wander``) and long-run ``variance``. ``slow_clip``:
        most that one step adds to the slow sum; ``clip``: to the fast sum, unless a third of its limit is
        more; sums stop at ``cap`` times their limit."""
        self.by_drift = self.level.slack_drift * wander
        self.variance, self.clip, self.slow_clip, self.cap = variance, clip, slow_clip, cap
        self._set(self.by_drift)

    def _set(self, by_drift: float) -> None:
        """Limits follow Siegmund's Brownian approximation of the CUSUM's run length,
        ARL ~ exp(2 x slack x limit / variance), solved for the limit.
        """
        level, variance = self.level, self.variance
        self.set_for = by_drift
        slack, rarity = level.fast_slack, level.rarity
        if by_drift > slack:
            # The drift of a restless machine is no Brownian motion: its bursts pass limits made for one far
            # more often than the formula says. So rarer is asked for as drift comes to rule the slack.
            asked = rarity * by_drift / slack
            rarity = max(rarity, asked if asked < RAREST else RAREST)
            slack = by_drift
        need = rarity * variance / (2.0 * slack)
        limit = level.fast_limit if level.fast_limit > need else need
        self.fast_slack, self.fast_limit = slack, limit
        # No less than three steps may fire the fast sum, however slow they are.
        self.fast_most = max(limit / 3.0 + slack, self.clip)
        self.slow_slack = slack = level.slow_slack if level.slow_slack > by_drift else by_drift
        need = rarity * variance / (2.0 * slack)
        self.slow_limit = level.slow_limit if level.slow_limit > need else need

    def feed(self, residual: float, step: int, clock: float) -> bool:
        """``residual``: log, less allowance; ``clock``: stream time (ms) at the beginning of the step. True
        if a sum is above its limit."""
        value = residual if residual < self.clip else self.clip
        recent = self.recent = self.recent + RECENT * (value - self.recent)
        if self.level.slack_ragged:
            self._for_raggedness(value)
        fired = False
        total = self.fast + (residual if residual < self.fast_most else self.fast_most) - self.fast_slack
        if total <= 0.0:
            self.fast = 0.0
        else:
            if self.fast <= 0.0:
                self.fast_onset, self.fast_since = step, clock
            limit = self.fast_limit
            top = self.cap * limit
            self.fast = total if total < top else top
            if total > limit:
                if recent < OVER * self.fast_slack:
                    self.fast = 0.0
                else:
                    self.onset, self.since, fired = self.fast_onset, self.fast_since, True
        total = self.slow + (residual if residual < self.slow_clip else self.slow_clip) - self.slow_slack
        if total <= 0.0:
            self.slow = 0.0
            return fired
        if self.slow <= 0.0:
            self.slow_onset, self.slow_since = step, clock
        limit = self.slow_limit
        top = self.cap * limit
        self.slow = total if total < top else top
        if total > limit:
            if recent < OVER * self.slow_slack:
                self.slow = 0.0
            elif not fired:
                self.onset, self.since, fired = self.slow_onset, self.slow_since, True
        return fired

    @property
    def room(self) -> float:
        """What excess over the smaller slack may still come before a sum is above its limit; not above 0: one
        is."""
        return min(self.fast_limit - self.fast, self.slow_limit - self.slow)

    @property
    def slack(self) -> float:
        return min(self.fast_slack, self.slow_slack)

    @property
    def tension(self) -> float:
        """How far the sums have come on their way to their limits; 1: fired."""
        fast, slow = self.fast / self.fast_limit, self.slow / self.slow_limit
        return fast if fast > slow else slow

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

    def _for_raggedness(self, value: float) -> None:
        """Slack and limits for the present step-to-step sd, if that rules the slack."""
        gap = value - self.before
        self.before = value
        self.ragged += RAGGED_RATE * ((gap if gap >= 0.0 else -gap) / GAUSS - self.ragged)
        level = self.level
        slack = level.slack_ragged * self.ragged
        most = RAGGED_MOST * level.fast_slack
        if slack > most:
            slack = most
        if slack < self.by_drift or (slack <= level.fast_slack and slack <= level.slow_slack):
            slack = self.by_drift
        if slack != self.set_for:
            self._set(slack)

    def reset(self) -> None:
        self.fast = self.slow = self.recent = 0.0
