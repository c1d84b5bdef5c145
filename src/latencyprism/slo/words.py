"""Objectives and budgets in words."""

from __future__ import annotations

from latencyprism.records.objective import Objective
from latencyprism.slo.budget import Account, Burn


def span_words(seconds: float) -> str:
    """``5 min``, ``6 h``, ``2.5 s``."""
    for unit, name in ((86400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s")):
        if seconds >= unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds * 1e3:.3g} ms"


def objective_words(objective: Objective) -> str:
    """``ttft_p99 < 2 s``."""
    return f"{objective.label} < {span_words(objective.limit_ns / 1e9)}"


def burn_words(account: Account, burn: Burn, now_ns: int) -> str:
    left = account.left(now_ns)
    period = span_words(account.objective.period_s)
    rest = "" if left is None else f", {max(left, 0.0):.0%} of its budget of {period} left"
    broken = f"{burn.violations} of {burn.requests} requests violate it in {span_words(burn.window.long_s)}"
    rate = f"burn rate {burn.long_rate or 0:.1f} (limit {burn.window.burn:g})"
    return f"{objective_words(account.objective)}: {broken}, {rate}{rest}"
