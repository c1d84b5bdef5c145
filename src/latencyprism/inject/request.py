"""What was asked for, checked for what all causes have in common."""

from __future__ import annotations

import time
from dataclasses import dataclass

from latencyprism.errors import BadInput
from latencyprism.inject.target import Target


@dataclass(frozen=True, slots=True)
class Request:
    target: Target
    strength: float
    strength_given: bool
    duration_s: float
    stop_ms: float | None = None
    every_s: float = 2.0
    directory: str = "."
    at: str | None = None
    url: str | None = None
    reference_ms: float = 100.0
    model: str | None = None
    prompt_tokens: int = 1024
    lead_s: float = 0.0
    device: int = 0
    allow_device_settings: bool = False

    def until_ns(self) -> int:
        """CLOCK_MONOTONIC moment at which everything must have ended."""
        return time.monotonic_ns() + int(self.duration_s * 1e9)

    def strength_up_to(self, most: float) -> float:
        if self.strength > most:
            raise BadInput("--strength is out of range", f"{self.strength}", f"at most {most} for this cause")
        return self.strength


def share_of(slow_down: float) -> float:
    """The share of its time that something must lose to take ``1 + slow_down`` times as long."""
    return slow_down / (1 + slow_down)
