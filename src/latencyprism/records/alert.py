"""Alert: one anomaly, said once; the JSON form is a contract with outsiders."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

KINDS = ("shift", "stall", "slo", "silence", "straggler")
LEVELS = ("evidence", "page")


@dataclass(slots=True)
class Alert:
    """``observed_ms``, ``expected_ms``: duration of the step and what its workload should have taken;
    ``excess`` is observed/expected - 1; ``time`` is RFC 3339 UTC; ``delay_ms`` runs from the end of the
    step to the emission of the alert."""

    id: str
    kind: str
    level: str
    engine: str
    replica: int
    rank: int
    step: int
    onset_step: int
    time: str
    observed_ms: float
    expected_ms: float
    excess: float
    delay_ms: float | None = None
    where: str | None = None
    """The process or phase that holds the excess, as far as the step record tells at once."""
    terms: dict[str, float] | None = None
    """The expectation in its parts, ms each."""
    text: str | None = None
    """The work of the step, its expectation with the reasons, and what it took, in a sentence."""
    detectable: dict[str, float] | None = None
    """By level, the smallest slow-down (share) of 50 steps that is told at the stream's present noise."""
    machine: dict[str, float | None] | None = None
    """What the machine itself made of it, where that is worth telling: ``steal_share`` of the CPU time wanted
    since the onset that the hypervisor gave to others, ``frequency_ratio`` of the CPU clock to what it was,
    ``explains``: at most this share of the excess."""
    capture: str | None = None
    verdict: dict[str, Any] | None = None

    def to_json(self) -> str:
        return json.dumps({"event": "alert", **asdict(self)}, allow_nan=False)
