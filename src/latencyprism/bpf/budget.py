"""What probes may cost: the running estimate, and which of them to give up when it is too much.

Expected cost = rate x price. Prices are those measured on this machine at the start (``prices``).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from latencyprism.bpf.below import GROUPS, BelowProbe
from latencyprism.bpf.calls import CallProbe
from latencyprism.bpf.prices import Prices

ALWAYS_SHARE, DEEP_SHARE = 0.002, 0.05
"""Of the CPUs that pay."""
PATIENCE = 3
"""Looks in a row above the limit before anything is given up: a burst is no rate."""
LEAST_LOOK_NS = 100_000_000
_RARE = 4
_GROUPS_OF = {
    "scheduler": ("scheduler",),
    "interrupts": ("interrupts",),
    "rare": tuple(name for name, group in GROUPS.items() if group.hit == _RARE),
    "syscalls": ("syscalls",),
}
"""What is counted together is given up together."""


@dataclass
class Budget:
    """``limit``: share of ``cores`` CPUs that all probes together may take. ``share``: the estimate of the
    last look, None before the second; ``shares``: the same by name."""

    limit: float
    cores: float = 1.0
    share: float | None = None
    shares: dict[str, float] = field(default_factory=dict)
    given_up: dict[str, float] = field(default_factory=dict)
    """{name: its share when it was given up}"""
    _before: tuple[int, dict[str, float]] | None = None
    _over: int = 0

    def look(self, now_ns: int, spent_ns: Mapping[str, float]) -> list[str]:
        """``spent_ns``: by name, hits so far x price. Returns what to detach, the dearest first; it is then
        counted as given up. Looks closer together than 0.1 s are left out."""
        if self._before is None:
            self._before = (now_ns, dict(spent_ns))
            return []
        since_ns, before = self._before
        if now_ns - since_ns < LEAST_LOOK_NS:
            return []
        wall_ns = (now_ns - since_ns) * self.cores
        self._before = (now_ns, dict(spent_ns))
        self.shares = {name: (ns - before.get(name, 0.0)) / wall_ns for name, ns in spent_ns.items()}
        self.share = sum(self.shares.values())
        self._over = self._over + 1 if self.share > self.limit else 0
        return self._choose() if self._over >= PATIENCE else []

    def _choose(self) -> list[str]:
        assert self.share is not None
        left, chosen = self.share, []
        for name, share in sorted(self.shares.items(), key=lambda item: -item[1]):
            if left <= self.limit or share <= 0:
                break
            chosen.append(name)
            self.given_up[name] = share
            left -= share
        self._over = 0
        return chosen


class BelowBudget:
    """Keeps a ``BelowProbe`` within its budget, group by group: share of all CPUs of this machine, because
    tracepoints cost wherever they are hit."""

    def __init__(self, probe: BelowProbe, prices: Mapping[str, float], limit: float = ALWAYS_SHARE) -> None:
        self.budget = Budget(limit, float(os.cpu_count() or 1))
        self._probe, self._prices = probe, prices

    def look(self, now_ns: int) -> list[str]:
        """Groups that were detached now; call about once a second."""
        gone = []
        for chosen in self.budget.look(now_ns, self._spent()):
            share = 100 * self.budget.given_up[chosen]
            for name in (name for name in _GROUPS_OF[chosen] if name in self._probe.attached):
                self._probe.detach(name)
                self._probe.missing.append(f"{name}: took {share:.2f} % of the CPUs, more than its budget")
                gone.append(name)
        return gone

    def take_back(self) -> list[str]:
        """Attach again what was given up: times change. Returns what is attached now."""
        names = [name for chosen in self.budget.given_up for name in _GROUPS_OF[chosen]]
        self.budget.given_up.clear()
        back = [name for name in names if name in self._probe.groups and self._probe.attach(name)]
        told = tuple(f"{name}: took" for name in back)
        self._probe.missing[:] = [text for text in self._probe.missing if not text.startswith(told)]
        return back

    def _spent(self) -> dict[str, float]:
        """ns by group. The rare tracepoints are counted together: they are a group of their own."""
        hits = self._probe.hits()
        spent = {name: count * self._prices.get(name, 0.0) for name, count in hits.items()}
        return {
            "scheduler": spent.get("switch", 0.0) + spent.get("mine", 0.0) + spent.get("waking", 0.0),
            "interrupts": spent.get("interrupt", 0.0),
            "rare": spent.get("rare", 0.0),
            "syscalls": spent.get("syscall", 0.0),
        }


class CallBudget:
    """Keeps a ``CallProbe`` within its budget, function by function: share of one CPU, because one thread of
    the target may make all the calls."""

    def __init__(self, probe: CallProbe, prices: Prices, limit: float = DEEP_SHARE) -> None:
        self.budget = Budget(limit)
        self._probe, self._prices = probe, prices

    def price_ns(self, index: int) -> float:
        """What one call of a function costs."""
        function = self._probe.functions[index]
        return self._prices.of_call(self._probe.kinds.get(index, ""), function.returns)

    def look(self, now_ns: int) -> list[str]:
        """Symbols that were detached now; call about once a second."""
        totals = self._probe.totals()
        spent = {str(i): totals[i].calls * self.price_ns(i) for i in self._probe.attached}
        chosen = [int(index) for index in self.budget.look(now_ns, spent)]
        if chosen:
            self._probe.drop(chosen)
        return [self._probe.functions[index].symbol for index in chosen]
