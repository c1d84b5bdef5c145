"""What a step had to do, in the few numbers its time depends on."""

from __future__ import annotations

from math import log2
from typing import NamedTuple

from latencyprism.baseline.cells import FINE
from latencyprism.records.step import Step

BATCH_UNIT, CONTEXT_UNIT = 64.0, 32768.0
PREFILL_UNIT, ATTENTION_UNIT = 256.0, 131072.0
"""Scales that bring the terms of the line to order one; nothing else depends on them."""


TERM_MAX = 1e5
"""No engine has such batches; a probe gone wrong may write one."""


class Work(NamedTuple):
    """Terms and cell keys of one step. ``decode`` / ``prefill``: does the step have such a part."""

    decode: bool
    prefill: bool
    batch: float
    context: float
    tokens: float
    attention: float
    batch_key: int
    context_key: int
    tokens_key: int
    attention_key: int


def batch_bucket(batch: int) -> int:
    """Padded batch size: exact to 8, then by 8 to 256, then by an eighth of an octave, as engines that
    replay captured graphs pad it."""
    if batch <= 8:
        return batch
    if batch <= 256:
        return (batch + 7) & ~7
    return 256 + int(8.0 * log2(batch / 256.0)) + 1


def half_octave(amount: float) -> int:
    """Two buckets per doubling; 0 for nothing."""
    return int(2.0 * log2(amount)) + 1 if amount >= 1.0 else 0


def decode_width(step: Step) -> int | None:
    """Decode tokens of the step's forward pass; None if the step does not tell any batch size."""
    if step.decode_tokens is not None:
        return step.decode_tokens
    if step.decode_requests is not None:
        return step.decode_requests
    if step.requests is not None:
        return max(0, step.requests - (step.prefill_requests or 0))
    return step.running


def work_of(step: Step) -> Work | None:
    """The work of a step, None if it scheduled no token. Counts that were not observed drop out of the
    line: their term is constantly zero."""
    tokens = step.prefill_tokens or 0
    width = decode_width(step)
    if width is None:
        width = 0
        decode = tokens == 0
    else:
        decode = width > 0
    if not decode and tokens <= 0:
        return None
    context, attention = step.context_tokens or 0, step.attention_work or 0
    bucket = width if width <= 8 else batch_bucket(width)
    tokens_key = half_octave(tokens) if tokens > 0 else 0
    u, v = width / BATCH_UNIT, context / CONTEXT_UNIT if context > 0 else 0.0
    t, a = tokens / PREFILL_UNIT, attention / ATTENTION_UNIT if attention > 0 else 0.0
    return _new(
        Work,
        (
            decode,
            tokens > 0,
            u if u < TERM_MAX else TERM_MAX,
            v if v < TERM_MAX else TERM_MAX,
            t if t < TERM_MAX else TERM_MAX,
            a if a < TERM_MAX else TERM_MAX,
            bucket,
            bucket * FINE + half_octave(context),
            tokens_key,
            tokens_key * FINE + half_octave(attention) if tokens > 0 else 0,
        ),
    )


_new = tuple.__new__
"""Half the time of the class's own way, which is a function in Python."""
