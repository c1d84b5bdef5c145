"""Verdict: a named cause with evidence, or ``none``, or ``unknown``."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

CAUSES: tuple[str, ...] = (
    "cpu.neighbour", "cpu.steal", "cpu.quota", "cpu.frequency", "cpu.oversubscription",
    "python.gil", "python.gc", "python.lock",
    "memory.reclaim", "memory.bandwidth", "disk.stall", "log.flood", "net.delay", "peer.stalled",
    "engine.tokenizer", "engine.event_loop",
    "workload.long_prompt", "workload.preemption", "workload.prefix_cache_lost",
    "xpu.clock", "xpu.power", "xpu.contention", "xpu.memory_bandwidth", "xpu.link", "xpu.pcie",
    "xpu.straggler", "xpu.error", "xpu.allocator",
    "none", "unknown",
)  # fmt: skip


@dataclass(slots=True)
class Evidence:
    """One signal: its value in the reference window, its value now, and a sentence for a person."""

    signal: str
    normal: float | None
    now: float | None
    text: str


@dataclass(slots=True)
class Ranked:
    cause: str
    probability: float


@dataclass(slots=True)
class Verdict:
    """``ranking`` sums to 1 and begins with ``cause``; ``cycles``, ``seconds``: how much was looked at."""

    cause: str
    probability: float
    ranking: list[Ranked]
    evidence: list[Evidence] = field(default_factory=list)
    cycles: int = 0
    seconds: float = 0.0
    not_looked_at: list[str] = field(default_factory=list)
    """Sources that were not available, in words."""
    together: list[str] = field(default_factory=list)
    """Two causes at work at once, where that is likelier than any alone; ``cause`` is one of them."""
    together_probability: float | None = None
    remedy: str | None = None
    """What to do about it."""
    settle: list[str] = field(default_factory=list)
    """Where the verdict is not sure: what would show which it is."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
