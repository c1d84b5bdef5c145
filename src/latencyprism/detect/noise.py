"""The stream's own restlessness, measured on its residuals while it runs.

``near``, ``mid``, ``far`` are robust standard deviations from mean absolute differences at lags 1, 16 and
64 (a variogram: sd = E|r(t) - r(t-lag)| / 1.128 for Gaussian residuals). A lasting fault shifts both ends
of a difference alike, so it hardly moves them; a restless machine does.
"""

from __future__ import annotations

from math import sqrt

from latencyprism.detect.tail import Tail

LAG = 64
MID = 16
GAUSS = 1.128
MEMORY = 0.002
"""Weight of the newest difference: about 500 steps."""
FIRST = 0.02
FIRST_WEIGHT = 30.0
YOUNG, YOUNG_DRIFT = 500.0, 3.0
"""Steps until half of the drift is measured rather than presumed; its presumed square, in those of
``near``."""
WILD = 4.0
"""A difference counts for at most this multiple of the present mean difference."""
FOLLOW = 0.3
REACH = 2.0
OWN = 0.7


class Noise:
    """Scales, tail and present drift of one stream. Plain numbers and one ring of ``LAG`` residuals."""

    __slots__ = ("count", "d_far", "d_mid", "d_near", "drift", "error_bare", "error_drift", "far_tail",
                 "place", "prefill", "prompt_bare", "prompt_drift", "prompt_error", "ring",
                 "tail")  # fmt: skip

    def __init__(self) -> None:
        self.ring: list[float | None] = [None] * LAG
        self.place = 0
        self.count = 0
        self.d_near = self.d_mid = self.d_far = FIRST * GAUSS
        self.drift = 0.0
        self.error_bare = self.error_drift = FIRST
        self.tail = Tail(0.02, 2.0 * FIRST, FIRST)
        self.far_tail = Tail(0.002, 3.0 * FIRST, 0.25)
        self.prefill = 0.0
        self.prompt_drift = 0.0
        self.prompt_error = self.prompt_bare = FIRST

    @property
    def near(self) -> float:
        """Step-to-step sd (log)."""
        return self.d_near / GAUSS

    @property
    def far(self) -> float:
        """Sd at a lag of 64 steps: noise and drift together; never below the step-to-step sd."""
        return (self.d_far if self.d_far > self.d_near else self.d_near) / GAUSS

    @property
    def wander(self) -> float:
        """The part of ``far`` that averaging does not remove: drift of the machine's speed. A young stream
        has not shown its drift yet; until then it is taken to be in proportion to the step-to-step noise."""
        near = self.d_near * self.d_near
        rest = self.d_far * self.d_far - 0.9 * near
        floor = 0.06 * near
        young = YOUNG / (YOUNG + self.count)
        return sqrt((rest if rest > floor else floor) * (1.0 - young) + young * near * YOUNG_DRIFT) / GAUSS

    def long_run_variance(self) -> float:
        """Variance x (1 + rho) / (1 - rho) with rho = 1 - (near/mid)^2: that of sums of an AR(1)."""
        mid = self.d_mid if self.d_mid > self.d_near else self.d_near
        part = self.d_near / mid
        rest = part * part if part > 0.3 else 0.09
        return (mid / GAUSS) ** 2 * (2.0 - rest) / rest

    def offset(self) -> float:
        """Present speed of the machine as a log offset, 0 where following it does not pay."""
        return self.drift if self.error_drift < 0.9 * self.error_bare else 0.0

    def prompt_offset(self) -> float:
        """The same for steps with prefill. Prefill leans on other parts of the machine than decode, so that
        their drift is mostly their own."""
        decode = self.offset()
        if self.prompt_error >= self.prompt_bare:
            return decode
        return OWN * self.prompt_drift + (1.0 - OWN) * decode

    def follow_prompt(self, residual: float) -> None:
        """Move the drift of steps with prefill towards the residual of one."""
        drift = self.prompt_drift
        ahead = residual - drift
        size = ahead if ahead >= 0.0 else -ahead
        bare = residual - self.offset()
        bare = bare if bare >= 0.0 else -bare
        wide = self.prefill if self.prefill > self.d_near else self.d_near
        top = WILD * wide
        self.prompt_error += ((size if size < top else top) - self.prompt_error) * 0.05
        self.prompt_bare += ((bare if bare < top else top) - self.prompt_bare) * 0.05
        if size > top:
            ahead = top if ahead > 0.0 else -top
        drift += FOLLOW * ahead
        bound = REACH * wide
        self.prompt_drift = bound if drift > bound else -bound if drift < -bound else drift

    def take_prompt(self, residual: float, calm: bool) -> None:
        """One residual of a step with prefill."""
        size = residual if residual >= 0.0 else -residual
        top = 4.0 * self.prefill + 0.02
        self.prefill += ((size if size < top else top) - self.prefill) * 0.05
        if calm:
            self.follow_prompt(residual)

    def take(self, residual: float, stretch: float, calm: bool, most: float, far_most: float) -> None:
        """One residual of a step without. ``calm`` False while an incident is paged: nothing is learned from
        it then but the tails, of ``stretch``, with ``most`` and ``far_most`` as in ``Tail.take``."""
        ring, place = self.ring, self.place
        count = self.count = self.count + 1
        if calm:
            near = self.d_near
            rate = MEMORY if count > 470 else 1.0 / (count + FIRST_WEIGHT)
            old = ring[place - 1]
            if old is not None:
                gap = residual - old if residual > old else old - residual
                top = WILD * near
                near = self.d_near = near + ((gap if gap < top else top) - near) * rate
            old = ring[place - MID]
            if old is not None:
                mid = self.d_mid
                gap = residual - old if residual > old else old - residual
                top = WILD * mid
                self.d_mid = mid + ((gap if gap < top else top) - mid) * rate
            far = self.d_far
            old = ring[place]
            if old is not None:
                gap = residual - old if residual > old else old - residual
                top = WILD * far
                far = self.d_far = far + ((gap if gap < top else top) - far) * rate
            self._follow(residual, near, far if far > near else near)
        ring[place] = residual
        self.place = place + 1 if place + 1 < LAG else 0
        near = self.d_near
        tail, far_tail = self.tail, self.far_tail
        if stretch > tail.threshold:
            tail.take(stretch, near, most)
            far_tail.take(stretch, near, far_most)
        else:
            # Nearly every step, so as ``Tail.take`` would, without the calls.
            tail.threshold -= 0.5 * near * tail.share
            if stretch > far_tail.threshold:
                far_tail.take(stretch, near, far_most)
            else:
                far_tail.threshold -= 0.5 * near * far_tail.share

    def _follow(self, residual: float, near: float, far: float) -> None:
        """Move the drift towards a residual; its reach is bounded by the drift the stream has shown."""
        drift = self.drift
        ahead = residual - drift
        size = ahead if ahead >= 0.0 else -ahead
        bare = residual if residual >= 0.0 else -residual
        top = WILD * near
        error = self.error_drift
        self.error_drift = error + ((size if size < top else top) - error) * 0.01
        error = self.error_bare
        self.error_bare = error + ((bare if bare < top else top) - error) * 0.01
        if size > top:
            ahead = top if ahead > 0.0 else -top
        drift += FOLLOW * ahead
        bound = REACH * (far / GAUSS)
        self.drift = bound if drift > bound else -bound if drift < -bound else drift

    def clear_ring(self) -> None:
        """Forget the last residuals, as after a rebase."""
        self.ring = [None] * LAG
        self.drift = self.prompt_drift = 0.0
