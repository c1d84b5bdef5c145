"""What the detector says about one step."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Firing:
    """A test fired at ``step``. ``level`` evidence or page; ``kind`` shift (lasting) or stall (lone);
    ``excess`` is observed/expected - 1; ``opened``: first firing of its incident; ``escalated``: first page
    of its incident; ``terms``: the expectation in its parts, ms."""

    step: int
    level: str
    kind: str
    onset_step: int
    observed_ms: float
    expected_ms: float
    excess: float
    incident: int
    opened: bool
    escalated: bool
    terms: dict[str, float]
