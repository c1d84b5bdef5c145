"""One robust straight line in three terms, learned step by step.

Recursive least squares on *relative* errors: each row is divided by what the line expected, so that a
30 ms step and a 300 ms step weigh the same and a fault cannot buy weight by being slow. Errors beyond
``HUBER`` times the running scale are shortened (Huber's M-estimator in its recursive form).
"""

from __future__ import annotations

HUBER = 2.5
NEWS = 30.0
"""A row far from what was learned may be this much further off, per leverage."""
FORGET = 0.999
PRIOR_INTERCEPT, PRIOR_SLOPE = 10.0, 100.0
FIRST_SCALE = 1.0
"""Wide open at first: the first rows must be able to place the line anywhere."""
LIGHTEST, HEAVIEST, SURE = 1e-3, 1e3, 1e-9
SMALLEST = 1e-3
"""The line never answers less than this share of its first observation: a slope learned in one corner
must not carry an extrapolation below zero."""


class RobustLine:
    """``y = a + b*u + c*v``; ``u`` and ``v`` are scaled by the caller to be of order one.

    ``unit`` is the first observation: everything inside is kept relative to it, so the answers do not
    depend on the unit of time.
    """

    __slots__ = ("a", "b", "c", "p00", "p01", "p02", "p11", "p12", "p22", "rows", "scale", "unit")

    def __init__(self) -> None:
        self.unit = 0.0
        self.rows = 0
        self.scale = FIRST_SCALE
        self.a = self.b = self.c = 0.0
        self.p00, self.p11, self.p22 = PRIOR_INTERCEPT, PRIOR_SLOPE, PRIOR_SLOPE
        self.p01 = self.p02 = self.p12 = 0.0

    def at(self, u: float, v: float) -> float:
        """The line at (u, v), in the unit of ``y``; 0 before the first observation."""
        value = self.a + self.b * u + self.c * v
        return (value if value > SMALLEST else SMALLEST) * self.unit

    def leverage(self, u: float, v: float) -> float:
        """How far (u, v) lies from what was learned: variance of the line there in units of the noise
        variance (x'Px). Near 0 at home, of order 100 where nothing is known."""
        reach = (
            self.p00
            + u * (2.0 * self.p01 + u * self.p11)
            + v * (2.0 * self.p02 + v * self.p22 + 2.0 * u * self.p12)
        )
        return reach if reach > 0.0 else 0.0

    def learn(self, u: float, v: float, y: float, whole: float = 0.0) -> None:
        """One observation. ``whole``: what errors are relative to, where ``y`` is but a part of a step."""
        if self.rows == 0:
            self.unit, self.a = y, 1.0
            whole = whole or y
        self.rows += 1
        unit = self.unit
        value = self.a + self.b * u + self.c * v
        weight = unit / whole if whole > 0.0 else 1.0 / (value if value > SMALLEST else SMALLEST)
        weight = LIGHTEST if weight < LIGHTEST else HEAVIEST if weight > HEAVIEST else weight
        error = (y / unit - value) * weight
        x1, x2 = u * weight, v * weight
        p00, p01, p02 = self.p00, self.p01, self.p02
        p11, p12, p22 = self.p11, self.p12, self.p22
        g0 = p00 * weight + p01 * x1 + p02 * x2
        g1 = p01 * weight + p11 * x1 + p12 * x2
        g2 = p02 * weight + p12 * x1 + p22 * x2
        reach = weight * g0 + x1 * g1 + x2 * g2
        if reach < 0.0:
            reach = 0.0
        size = error if error >= 0.0 else -error
        limit = HUBER * self.scale * (1.0 + NEWS * reach)
        if size > limit:
            error = limit if error > 0.0 else -limit
            size = limit
        rows = self.rows
        self.scale += (1.25 * size - self.scale) * (0.01 if rows > 95 else 1.0 / (rows + 5))
        # Forgetting without news winds the covariance up; the prior is its ceiling.
        forget = FORGET if p11 + p22 < PRIOR_SLOPE and p00 < PRIOR_INTERCEPT else 1.0
        norm = 1.0 / (forget + reach)
        step = error * norm
        self.a += g0 * step
        b = self.b = self.b + g1 * step
        c = self.c = self.c + g2 * step
        grow = 1.0 / forget
        p00 = (p00 - g0 * g0 * norm) * grow
        self.p01 = (p01 - g0 * g1 * norm) * grow
        self.p02 = (p02 - g0 * g2 * norm) * grow
        p11 = (p11 - g1 * g1 * norm) * grow
        self.p12 = (p12 - g1 * g2 * norm) * grow
        p22 = (p22 - g2 * g2 * norm) * grow
        # Rounding must not eat a variance.
        self.p00 = p00 if p00 > SURE else SURE
        self.p11 = p11 if p11 > SURE else SURE
        self.p22 = p22 if p22 > SURE else SURE
        if b < 0.0 or c < 0.0:
            self._upright()

    def _upright(self) -> None:
        """More work never costs less: the least-squares line among those with slopes >= 0 (a move along
        the covariance, exact for one negative slope)."""
        if self.b < 0.0:
            move = self.b / self.p11
            self.a -= self.p01 * move
            self.c -= self.p12 * move
            self.b = 0.0
        if self.c < 0.0:
            move = self.c / self.p22
            self.a -= self.p02 * move
            self.b = max(0.0, self.b - self.p12 * move)
            self.c = 0.0

    def rescale(self, factor: float) -> None:
        """Multiply the whole line, as after a change of the machine's speed."""
        self.unit *= factor
