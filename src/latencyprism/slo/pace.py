"""What an engine gets done: tokens of prefill a second beside its decodes, time per token, slots, lengths of
answers. Learned from its steps and its ended requests; step times come from the baseline."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from math import exp, log

from latencyprism.baseline import StepTime, work_of
from latencyprism.records.request import Request
from latencyprism.records.step import Step
from latencyprism.slo.prefill_cost import PrefillCost

MEMORY_S = 5.0
SPEED_STEPS = 30.0
FAR = 0.7
"""A step counts for the machine's present speed with at most this log-ratio."""
LENGTHS = 400
STEPS_KEPT = 4096
BREAK_S = 0.25
FIRST_LENGTH = 64
FIRST_ROOM = 256
SPREAD = 8


class Pace:
    """Times in seconds. Feed it every step in order, and the requests that ended."""

    def __init__(self, model: StepTime) -> None:
        self.model = model
        self.last: Step | None = None
        self.room = 0
        """Most tokens that one step has carried while prompts waited: the chunk budget as far as seen."""
        self.slots: int | None = None
        """Most requests at once, once requests have waited though the chunk budget was not used up."""
        self.interval_s = 0.0
        """Mean time from step to step, lately."""
        self.gap_s = 0.0
        self.decodes = 0.0
        """Mean number of decodes a step, lately."""
        self.cached = 0.0
        """Share of prompts that was found in the prefix cache, lately."""
        self._speed = 0.0
        self._prompts = PrefillCost()
        self._reach = 0.0
        self._done: deque[tuple[int, int]] = deque(maxlen=STEPS_KEPT)
        self._total = 0
        self._lengths: deque[int] = deque(maxlen=LENGTHS)
        self._ranked: list[int] = []

    def take(self, step: Step) -> None:
        before, self.last = self.last, step
        prefill, decode = step.prefill_tokens or 0, step.decode_tokens or 0
        self._total += prefill
        self._done.append((step.step, self._total))
        if before is not None:
            interval = (step.end_ns - before.end_ns) / 1e9
            if 0 < interval < BREAK_S + step.duration_ns / 1e9:
                share = min(1.0, interval / MEMORY_S) if self.interval_s else 1.0
                self.interval_s += (interval - self.interval_s) * share
                self.decodes += (decode - self.decodes) * share
                gap = max(0.0, (step.start_ns - before.end_ns) / 1e9)
                self.gap_s += (min(gap, 0.02) - self.gap_s) * 0.02
        self.room = max(self.room, prefill + decode) if prefill else self.room
        if prefill:
            reach = (step.attention_work or 0) / prefill
            self._reach += (reach - self._reach) * 0.1
        spare = prefill + decode < 0.9 * self.room
        if before is not None and spare and step.requests:
            # Running and waiting are those after a step: of what waited then, was any left behind now?
            admitted = step.requests - (before.running or 0)
            if (before.waiting or 0) > max(admitted, 0):
                self.slots = step.requests
        self._learn_speed(step)

    def _learn_speed(self, step: Step) -> None:
        """How fast the machine is now, from steps without prompts; what prompts cost, at its usual speed."""
        prefill, decode = step.prefill_tokens or 0, step.decode_tokens or 0
        base = self._decode_ms(step, decode)
        if base is None or step.duration_ns <= 0:
            return
        if prefill:
            usual_ms = step.duration_ms / exp(self._speed)
            self._prompts.take(prefill, step.attention_work or 0, usual_ms, base)
        elif decode:
            off = log(step.duration_ms / base)
            self._speed += (max(-FAR, min(FAR, off)) - self._speed) / SPEED_STEPS

    def _decode_ms(self, like: Step, decode: int) -> float | None:
        """Of a step without prompts at the machine's usual speed."""
        decode = max(decode, 1)
        work = work_of(
            like._replace(
                prefill_tokens=0, decode_tokens=decode, decode_requests=decode, prefill_requests=0,
                requests=decode, attention_work=0,
            )
        )  # fmt: skip
        found = self.model.expect_work(work) if work is not None else None
        return found.ms if found is not None and found.ms > 0 else None

    def _work_ms(self, like: Step, decode: int, prefill: int, attention: float) -> float | None:
        base = self._decode_ms(like, decode)
        extra = self._prompts.ms(prefill, attention)
        return None if base is None or extra is None else base + extra

    def ended(self, request: Request) -> None:
        outputs = request.output_tokens
        if outputs is not None and outputs > 0 and request.finish_reason != "abort":
            self._lengths.append(outputs)
            self._ranked = []
        if request.prompt_tokens and request.cached_tokens is not None:
            share = min(1.0, request.cached_tokens / request.prompt_tokens)
            self.cached += (share - self.cached) * 0.05

    def left_tokens(self, had: int) -> float:
        """Median of the tokens still to come for one that has had so many."""
        if not self._ranked:
            self._ranked = sorted(self._lengths)
        ranked = self._ranked
        if len(ranked) < 5:
            return float(max(1, FIRST_LENGTH - had))
        place = bisect_right(ranked, had)
        if place >= len(ranked) - 2:
            # Longer than nearly all that were seen: what is left grows with what it had.
            return max(1.0, 0.3 * had)
        return float(max(1, ranked[(place + len(ranked)) // 2] - had))

    def left_spread(self, had: int) -> list[float]:
        """``SPREAD`` equally probable values of the tokens still to come for one that has had so many."""
        if not self._ranked:
            self._ranked = sorted(self._lengths)
        ranked = self._ranked
        parts = [(n + 0.5) / SPREAD for n in range(SPREAD)]
        place = bisect_right(ranked, had)
        known = len(ranked) - place
        if len(ranked) < 5 or known < 3:
            middle = self.left_tokens(had)
            return [max(1.0, -middle * log(1.0 - part) / log(2.0)) for part in parts]
        return [float(max(1, ranked[place + int(part * known)] - had)) for part in parts]

    def prefilled_since(self, step: int) -> int:
        """Prompt tokens computed in the steps from this one on, as far back as they are kept."""
        for number, total in reversed(self._done):
            if number < step:
                return self._total - total
        return self._total - (self._done[0][1] if len(self._done) == STEPS_KEPT else 0)

    def step_s(self, decode: int, prefill: int, reach: float | None = None) -> float | None:
        """What a step with so much work should take now, with the gap before it; None: nothing is known.
        ``reach``: mean context that a token of the prompts attends to (default: as of late)."""
        like = self.last
        if like is None:
            return None
        attention = prefill * (self._reach if reach is None else reach)
        found = self._work_ms(like, decode, prefill, attention)
        if found is None:
            return self.interval_s or None
        return found * exp(self._speed) / 1e3 + self.gap_s
