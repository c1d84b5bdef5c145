"""What a watch takes for usual, so that it need not be woken for it."""

from __future__ import annotations

from typing import NamedTuple

from latencyprism.records.step import Step


class Usual(NamedTuple):
    """A step is long above ``base_ns`` plus so much for each decode and each prefill token, or where it began
    ``gap_ns`` or more after the step before."""

    base_ns: int
    decode_ns: int
    prefill_ns: int
    gap_ns: int
    bare_ns: int
    """What few steps without prefill last, with the time before them since the step before."""
    typical_1024: int = 1024
    """How long a typical step is, in 1024ths of what is long."""
    between_ns: int = 0
    """From one step to the next, typically."""

    def long(self, step: Step) -> bool:
        decode, prefill = step.decode_tokens, step.prefill_tokens
        if (decode is None and self.decode_ns) or (prefill is None and self.prefill_ns):
            return True
        return (
            step.end_ns - step.start_ns > self.limit_ns(decode, prefill) or (step.gap_ns or 0) > self.gap_ns
        )

    def limit_ns(self, decode_tokens: int | None, prefill_tokens: int | None) -> int:
        """From which duration on a step with so many is long."""
        return self.base_ns + self.decode_ns * (decode_tokens or 0) + self.prefill_ns * (prefill_tokens or 0)
