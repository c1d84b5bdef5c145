"""An alert in a sentence: the work of the step, what it should have taken and why, what it took."""

from __future__ import annotations

from latencyprism.baseline import decode_width
from latencyprism.detect.firing import Firing
from latencyprism.records.step import Step

SMALLEST_MS = 0.05
"""Terms below this, or a hundredth of the expectation, are not told."""


def sentence(step: Step, firing: Firing) -> str:
    """As "18 decode + 1 chunk of 512 tokens, 41k context: expected 24.1 ms (base 9.0, decode 6.2, context
    4.4, prefill 4.5), took 39.0 ms"."""
    parts = ", ".join(f"{name} {value:.1f}" for name, value in plain_terms(firing.terms).items())
    inside = f" ({parts})" if parts else ""
    late = f", {firing.late_ms:.1f} ms late" if firing.late_ms > firing.observed_ms else ""
    return (
        f"{work_in_words(step)}: expected {firing.expected_ms:.1f} ms{inside}, "
        f"took {firing.observed_ms:.1f} ms{late}"
    )


def work_in_words(step: Step) -> str:
    """The work of a step, as far as its record tells."""
    parts = []
    width = decode_width(step)
    drafts = step.draft_tokens or 0
    if width:
        requests = step.decode_requests or width
        decode = f"{requests} decode"
        if width > requests:
            decode += f" of {width} tokens" + (f" ({drafts} drafted)" if drafts else "")
        parts.append(decode)
    if step.prefill_tokens:
        chunks = step.prefill_requests or 1
        each = "s" if chunks > 1 else ""
        parts.append(f"{chunks} chunk{each} of {step.prefill_tokens} tokens")
    told = " + ".join(parts) or "a step"
    if step.context_tokens:
        told += f", {_short(step.context_tokens)} context"
    if step.preempted:
        told += f", {step.preempted} preempted"
    return told


def plain_terms(terms: dict[str, float]) -> dict[str, float]:
    """The terms that a person reads, ms, with the same sum: what cells correct belongs to the base, attention
    to prefill; a term below zero (a line seen from afar) is taken off the largest."""
    found = {
        "base": terms.get("base", 0.0) + terms.get("cells", 0.0),
        "decode": terms.get("batch", 0.0),
        "context": terms.get("context", 0.0),
        "prefill": terms.get("prefill", 0.0) + terms.get("attention", 0.0),
    }
    below = [name for name, value in found.items() if value < 0.0]
    for name in below:
        largest = max(found, key=lambda other: found[other])
        found[largest] += found[name]
        found[name] = 0.0
    found["machine"] = terms.get("machine", 0.0)
    least = max(SMALLEST_MS, 0.01 * sum(found.values()))
    return {name: value for name, value in found.items() if abs(value) >= least}


def _short(count: int) -> str:
    return (
        f"{count / 1000:.0f}k" if count >= 10_000 else f"{count / 1000:.1f}k" if count >= 1000 else str(count)
    )
