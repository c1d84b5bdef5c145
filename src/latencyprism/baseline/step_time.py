"""Expected step time, learned online: decode line + prefill line, each corrected by cells.

A step's time is ``decode(batch, context) + prefill(tokens, attention work)``. Decode-only steps teach the
first part, mixed steps the second on top of the first, and prefill-only steps have a line of their own
(there is no decode part to ride on). Times are ms; any unit would do.
"""

from __future__ import annotations

from math import exp, log, sqrt

from latencyprism.baseline.cells import CorrectedLine
from latencyprism.baseline.expectation import Expectation
from latencyprism.baseline.work import Work, work_of
from latencyprism.records.step import Step

COLD, COLD_STEPS = 0.30, 12.0
NEW_BATCH, NEW_CONTEXT, FAMILIAR = 0.05, 0.008, 8.0
NEW_PREFILL, PREFILL_FAMILIAR = 0.50, 4.0
UNKNOWN = 2.0
LEVERAGE = 0.04
"""Allowance per square root of leverage: twice the 2 % by which real step times bend away from a line."""
BATCH_AWAY, CONTEXT_AWAY, PREFILL_AWAY, ATTENTION_AWAY, FEW_STEPS = 0.5, 0.3, 0.6, 0.1, 4.0
"""Allowance per log-ratio of distance from what was learned, for a place without experience."""
SURE = 0.7
"""Sd of the price of context (in noise sd, per unit of context) at which half of its allowance is left: a
slope that was learned over many contexts may be trusted further out."""
MOST = 2.0
CLIP, CLIP_NEW = 0.10, 0.35
"""A step moves what is learned by at most this log-ratio."""


class StepTime:
    """The model of one replica. ``expect`` never changes it, ``learn`` does."""

    __slots__ = ("decode", "mixed", "prefill", "steps")

    def __init__(self) -> None:
        self.decode = CorrectedLine()
        self.mixed = CorrectedLine()
        self.prefill = CorrectedLine()
        self.steps = 0

    def expect(self, step: Step) -> Expectation | None:
        """Expectation for a step; None if it scheduled nothing or nothing at all is known yet."""
        work = work_of(step)
        return None if work is None else self.expect_work(work)

    def expect_work(self, work: Work) -> Expectation | None:
        if not self.steps:
            return None
        found = _new(Expectation)
        found.drift = found.prefill_ms = found.attention_ms = 0.0
        slack = COLD / (1.0 + self.steps / COLD_STEPS)
        total, known = 0.0, True
        if work.decode:
            part = self.decode
            u, v = work.batch, work.context
            total = part.at(u, v, work.batch_key, work.context_key)
            if total <= 0.0 and not work.prefill:
                return None
            line = part.line
            unit = line.unit
            base = found.base_ms = line.a * unit
            batch = found.batch_ms = line.b * u * unit
            context = found.context_ms = line.c * v * unit
            found.cells_ms = total - base - batch - context
            count, seen = part.coarse_count, part.fine_count
            slack += NEW_BATCH / (1.0 + count / FAMILIAR) + part.doubt
            slack += NEW_CONTEXT / (1.0 + seen / FAMILIAR)
            if seen < FAMILIAR:
                reach = line.leverage(u, v)
                weight = unit / total if total > 0.0 else 1.0
                slack += LEVERAGE * weight * sqrt(reach) * (1.0 - seen / FAMILIAR)
                away, deep = part.distance(u, v, work.batch_key)
                unsure = sqrt(line.p22)
                deep *= CONTEXT_AWAY * unsure / (unsure + SURE)
                away = BATCH_AWAY * away + deep * context / (total or 1.0)
                slack += away / (1.0 + seen / FEW_STEPS)
            known = count >= FAMILIAR
        else:
            found.base_ms = found.batch_ms = found.context_ms = found.cells_ms = 0.0
        if work.prefill:
            part = self.mixed if work.decode else self.prefill
            extra = part.at(work.tokens, work.attention, work.tokens_key, work.attention_key)
            if extra <= 0.0 and total <= 0.0:
                return None
            line = part.line
            unit = line.unit
            found.base_ms += line.a * unit
            found.prefill_ms = line.b * work.tokens * unit
            found.attention_ms = line.c * work.attention * unit
            found.cells_ms += extra - line.a * unit - found.prefill_ms - found.attention_ms
            total += extra
            share = extra / total if extra > 0.0 else 1.0
            slack += share * part.doubt + share * NEW_PREFILL / (1.0 + part.fine_count / PREFILL_FAMILIAR)
            slack += share * UNKNOWN / (1.0 + line.rows / PREFILL_FAMILIAR)
            if part.fine_count < FAMILIAR:
                reach = line.leverage(work.tokens, work.attention)
                slack += LEVERAGE * (unit or total) / total * sqrt(reach) * (1.0 - part.fine_count / FAMILIAR)
                away, deep = part.distance(work.tokens, work.attention, work.tokens_key)
                slack += (PREFILL_AWAY * away + ATTENTION_AWAY * deep) / (1.0 + part.fine_count / FEW_STEPS)
            known = known and part.coarse_count >= PREFILL_FAMILIAR and line.rows > FAMILIAR
        found.ms, found.allowance = total, slack if slack < MOST else MOST
        found.known = known
        return found

    def learn(self, work: Work, observed_ms: float, spread: float = 0.0) -> None:
        """One trusted observation > 0. ``spread``: sd of the stream's own log residuals; what lies beyond
        it is shortened before it is learned."""
        value = observed_ms
        if self.steps > 10:
            value = self._clipped(work, observed_ms, 3.0 * spread)
        self.steps += 1
        if not work.prefill:
            if not self.decode.line.rows:
                # Until now mixed steps had to carry the decode part as well.
                self.mixed = CorrectedLine()
            self.decode.learn(work.batch, work.context, work.batch_key, work.context_key, value)
        elif not work.decode:
            self.prefill.learn(work.tokens, work.attention, work.tokens_key, work.attention_key, value)
        else:
            base = self.decode.at(work.batch, work.context, work.batch_key, work.context_key)
            extra = max(value - base, 0.02 * value)
            self.mixed.learn(work.tokens, work.attention, work.tokens_key, work.attention_key, extra, value)

    def _clipped(self, work: Work, observed_ms: float, wide: float) -> float:
        expected, clip = 0.0, CLIP if wide < CLIP else wide
        if work.decode and not work.prefill:
            # Nearly every step: known work, of which no more than its time is asked.
            part = self.decode
            expected = part.at(work.batch, work.context, work.batch_key, work.context_key)
            if part.coarse_count < FAMILIAR:
                expected = 0.0
        if expected <= 0.0:
            known = self.expect_work(work)
            if known is None:
                return observed_ms
            expected = known.ms
            if not known.known:
                clip = max(CLIP_NEW, wide) + 2.0 * known.allowance
        if 0.91 * expected < observed_ms < 1.1 * expected:
            return observed_ms  # within e^±CLIP, by far the most
        ratio = log(observed_ms / expected)
        return (
            expected * exp(clip if ratio > clip else -clip) if ratio > clip or ratio < -clip else observed_ms
        )

    def rescale_batch(self, batch_key: int, factor: float) -> None:
        """Multiply the expectations of one batch size alone."""
        self.decode.rescale_cell(batch_key, factor)

    def rescale(self, factor: float) -> None:
        """Multiply every expectation, as after a change of version or hardware."""
        for part in (self.decode, self.mixed, self.prefill):
            part.rescale(factor)


_new = object.__new__
"""Cheaper than a constructor, which is a function in Python."""
