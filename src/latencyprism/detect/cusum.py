"""Two one-sided CUSUMs for one alert level: a fast one for clear shifts, a slow one for mild and creeping
ones."""

from __future__ import annotations

from latencyprism.detect.settings import Level

RECENT = 0.2
OVER = 0.8
"""A sum still above its limit while the last few steps average less than this share of the slack tells of
a shift that is over: the sum is dropped."""


RAREST = 18.0
"""ln of the mean number of quiet steps between false alarms that is asked for at most."""


class ShiftTest:
    """Sums of excess over slack. ``onset`` is the step at which the running sum left zero."""

    __slots__ = ("fast", "fast_onset", "level", "onset", "recent", "slow", "slow_onset")

    def __init__(self, level: Level) -> None:
        self.level = level
        self.fast = self.slow = self.recent = 0.0
        self.fast_onset = self.slow_onset = self.onset = 0

    def feed(
        self, fast: float, slow: float, clip: float, wander: float, variance: float, cap: float, step: int
    ) -> bool:
        """``fast``, ``slow``: residual less allowance, ``slow`` clipped; ``clip``: most that one step adds to
        the fast sum, unless a third of its limit is more; ``wander``, ``variance``: the
        stream's drift and long-run variance. True if a sum is above its limit.

        Limits follow Siegmund's Brownian approximation of the CUSUM's run length,
        ARL ~ exp(2 x slack x limit / variance), solved for the limit.
        """
        level = self.level
        by_drift = level.slack_drift * wander
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
            self.fast_onset = step
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
            self.onset = self.fast_onset
        slack = level.slow_slack if level.slow_slack > by_drift else by_drift
        need = rarity * variance / (2.0 * slack)
        limit = level.slow_limit if level.slow_limit > need else need
        if self.slow <= 0.0:
            self.slow_onset = step
        total = self.slow + slow - slack
        top = cap * limit
        self.slow = 0.0 if total < 0.0 else top if total > top else total
        if self.slow > limit:
            if recent < OVER * slack:
                self.slow = 0.0
            elif not fired:
                self.onset = self.slow_onset
                return True
        return fired

    def reset(self) -> None:
        self.fast = self.slow = self.recent = 0.0
