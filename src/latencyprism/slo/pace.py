"""What an engine gets done: tokens of prefill a second beside its decodes, time per token, slots, lengths of
answers. Learned from its steps and its ended requests; step times come from the baseline."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from math import exp, log

from latencyprism.baseline import StepTime, work_of
from latencyprism.records.request import Request
from latencyprism.records.step import Step

MEMORY_S = 5.0
SPEED_STEPS = 30.0
FAR = 0.7
"""A step counts for the machine's present speed with at most this log-ratio."""
LENGTHS = 400
STEPS_KEPT = 4096
BREAK_S = 0.25
FIRST_LENGTH = 64
FIRST_ROOM = 256


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
        self.cached = 0.0
        """Share of prompts that was found in the prefix cache, lately."""
        self._speed = 0.0
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
                gap = max(0.0, (step.start_ns - before.end_ns) / 1e9)
                self.gap_s += (min(gap, 0.02) - self.gap_s) * 0.02
        self.room = max(self.room, prefill + decode) if prefill else self.room
        if prefill:
            reach = (step.attention_work or 0) / prefill
            self._reach += (reach - self._reach) * 0.1
        spare = prefill + decode < 0.9 * self.room
        if step.waiting and step.running and (spare or step.running > (self.slots or step.running)):
            self.slots = step.running
        self._learn_speed(step)

    def _learn_speed(self, step: Step) -> None:
        work = work_of(step)
        found = self.model.expect_work(work) if work is not None else None
        if found is None or found.ms <= 0 or step.duration_ns <= 0:
            return
        off = log(step.duration_ms / found.ms)
        off = max(-FAR, min(FAR, off))
        self._speed += (off - self._speed) / SPEED_STEPS

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

    def prefilled_since(self, step: int) -> int:
        """Prompt tokens computed in the steps from this one on."""
        for number, total in self._done:
            if number >= step:
                before = total - self._prefill_at(number)
                return self._total - before
        return 0

    def _prefill_at(self, step: int) -> int:
        before = 0
        for number, total in self._done:
            if number == step:
                return total - before
            before = total
        return 0

    def step_s(self, decode: int, prefill: int) -> float | None:
        """What a step with so much work should take now, with the gap before it; None: nothing is known."""
        like = self.last
        if like is None:
            return None
        context = like.context_tokens
        work = work_of(
            like._replace(
                prefill_tokens=prefill, decode_tokens=decode, decode_requests=decode,
                prefill_requests=1 if prefill else 0, requests=decode + bool(prefill),
                context_tokens=context, attention_work=int(prefill * self._reach),
            )
        )  # fmt: skip
        found = self.model.expect_work(work) if work is not None else None
        if found is None or found.ms <= 0:
            return self.interval_s or None
        return found.ms * exp(self._speed) / 1e3 + self.gap_s
