"""What an action of the guard did: the same figures from before it and from while it holds."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from latencyprism.records import Step

MEMORY_STEPS, MEMORY_REQUESTS = 400, 200


@dataclass
class Tally:
    """The last steps and ended requests of one state of an action."""

    _steps: deque[tuple[float, float | None, float | None, int]] = field(
        default_factory=lambda: deque(maxlen=MEMORY_STEPS)
    )
    """(ms, observed/expected, share of it in the run queue, prompt tokens beside decodes or 0)"""
    _requests: deque[bool] = field(default_factory=lambda: deque(maxlen=MEMORY_REQUESTS))

    def step(self, step: Step, expected_ms: float | None) -> None:
        """``expected_ms``: what its work should have taken; None: not known."""
        if step.duration_ns <= 0:
            return
        ratio = step.duration_ms / expected_ms if expected_ms is not None and expected_ms > 0 else None
        queued = None if step.runqueue_ns is None else min(step.runqueue_ns / step.duration_ns, 1.0)
        beside = (step.prefill_tokens or 0) if step.decode_tokens else 0
        self._steps.append((step.duration_ms, ratio if ratio and isfinite(ratio) else None, queued, beside))

    @property
    def seen(self) -> bool:
        return bool(self._steps)

    def request(self, violated: bool) -> None:
        self._requests.append(violated)

    def values(self) -> dict[str, Any]:
        """``mixed_step_ms`` and ``prompt_tokens_per_s``: of steps that carry prompts beside decodes;
        ``slowdown``: mean of observed/expected; ``runqueue_share``: of step time; ``violating``: share of
        ``requests``. None where none was seen."""
        mixed = [(ms, tokens) for ms, _, _, tokens in self._steps if tokens]
        total_ms = sum(ms for ms, _ in mixed)
        ratios = [ratio for _, ratio, _, _ in self._steps if ratio is not None]
        queued = [share for _, _, share, _ in self._steps if share is not None]
        return {
            "steps": len(self._steps),
            "mixed_step_ms": round(total_ms / len(mixed), 2) if mixed else None,
            "prompt_tokens_per_s": round(1e3 * sum(t for _, t in mixed) / total_ms) if mixed else None,
            "slowdown": _mean(ratios),
            "runqueue_share": _mean(queued),
            "requests": len(self._requests),
            "violating": _mean([float(violated) for violated in self._requests]),
        }


@dataclass
class Effect:
    """Of one action. ``begin`` when it is taken, ``end`` when it is taken back; what comes in belongs to the
    state that holds."""

    before: Tally = field(default_factory=Tally)
    after: Tally = field(default_factory=Tally)
    on: bool = False

    @property
    def now(self) -> Tally:
        return self.after if self.on else self.before

    def begin(self) -> None:
        self.on = True

    def end(self) -> None:
        self.on = False

    def values(self) -> dict[str, Any]:
        return {"before": self.before.values(), "after": self.after.values()}


def _mean(values: list[float]) -> float | None:
    return round(sum(values) / len(values), 4) if values else None
