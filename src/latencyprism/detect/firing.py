"""What the detector says about one step."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Firing:
    """A test fired at ``step``. ``level`` evidence or page; ``kind`` shift (lasting) or stall (lone);
    ``excess`` is observed/expected - 1; ``opened``: first firing of its incident; ``escalated``: first page
    of its incident; ``terms``: the expectation in its parts, ms; ``late_ms``: by how much the step was late,
    with the idle time before it; ``detectable``: slow-down (share) of 50 steps that each level would tell at
    the stream's present noise."""

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
    late_ms: float = 0.0
    detectable: dict[str, float] = field(default_factory=dict)
