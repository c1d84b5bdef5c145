"""How much of prompts waits, judged from steps alone: for engines whose requests are not followed."""

from __future__ import annotations

from latencyprism.records.step import Step

FULL = 0.9
"""A step that carried this part of what it may have left something of the prompts over."""
RATE = 0.1


class PromptsSeen:
    """``saw`` each step. ``tokens``: of prompts that wait or are under way, at least one whole step where the
    last was full; ``reach``: mean context that they attended to, lately."""

    def __init__(self) -> None:
        self.tokens = 0
        self.reach = 0.0
        self._each = 0.0

    def saw(self, step: Step, limit: int, whole: int) -> None:
        """``limit``: tokens that a step may have now; ``whole``: what the engine allows itself."""
        prefill, decode = step.prefill_tokens or 0, step.decode_tokens or 0
        if prefill:
            each = prefill / max(step.prefill_requests or 1, 1)
            self._each += (each - self._each) * (RATE if self._each else 1.0)
            reach = (step.attention_work or 0) / prefill
            self.reach += (reach - self.reach) * (RATE if self.reach else 1.0)
        waiting = int((step.waiting or 0) * self._each)
        full = prefill > 0 and prefill + decode >= FULL * limit
        self.tokens = max(waiting, whole) if full else waiting
