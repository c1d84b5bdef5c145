"""Where a slow-down really began, looked for backwards from where the detector says.

The detector must not tell of a shift too early, so the sum that fires may have left zero long after the fault
began: each calm stretch in between sends it back there. Steps that the fault had slowed until then would pass
for normal ones, and nothing that it did would differ from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log

from latencyprism.records import Step

MOST = log(4.0)
"""What a single step may count for."""
LEAST = 0.02
"""Log-ratio of a slow-down below which its beginning cannot be told from drift."""
KEPT = 100
"""Steps that are left before it."""


def begun_ns(steps: Sequence[Step], expected_ms: Sequence[float | None], onset_ns: int, until_ns: int) -> int:
    """The moment (CLOCK_MONOTONIC) from which on steps were late, ``onset_ns`` or earlier.

    ``expected_ms`` is aligned with ``steps``; ``until_ns``: when the alert was raised. The most likely
    beginning of a shift of known size s in noise is where the sum of (residual - s / 2), taken backwards, is
    largest (Page, Biometrika 41, 1954); s is the mean of the residuals from the onset to the alert.
    """
    late = [
        (step.start_ns, min(log((step.end_ns - step.start_ns) / 1e6 / ms), MOST))
        for step, ms in zip(steps, expected_ms, strict=True)
        if ms is not None and ms > 0.0 and step.end_ns > step.start_ns
    ]
    late.sort()
    within = [value for start_ns, value in late if onset_ns <= start_ns <= until_ns]
    size = sum(within) / len(within) if within else 0.0
    if size < LEAST:
        return onset_ns
    earlier = [item for item in late if item[0] < onset_ns]
    found, total, best = onset_ns, 0.0, 0.0
    for start_ns, value in reversed(earlier[KEPT:]):
        total += value - size / 2.0
        if total > best:
            found, best = start_ns, total
    return found
