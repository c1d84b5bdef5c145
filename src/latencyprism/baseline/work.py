"""What a step had to do, in the few numbers its time depends on."""

from __future__ import annotations

from math import log2

from latencyprism.baseline.cells import FINE
from latencyprism.records.step import Step

BATCH_UNIT, CONTEXT_UNIT = 64.0, 32768.0
PREFILL_UNIT, ATTENTION_UNIT = 256.0, 131072.0
"""Scales that bring the terms of the line to order one; nothing else depends on them."""


TERM_MAX = 1e5
"""No engine has such batches; a probe gone wrong may write one."""


class Work:
    """Terms and cell keys of one step. ``decode`` / ``prefill``: does the step have such a part. Slots, as
    each is read some thirty times a step."""

    __slots__ = ("attention", "attention_key", "batch", "batch_key", "context", "context_key", "decode",
                 "prefill", "tokens", "tokens_key")  # fmt: skip

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


def half_octave(amount: int) -> int:
    """Two buckets per doubling, 1 + floor(2 log2(amount)); 0 for nothing."""
    return (amount * amount).bit_length() if amount > 0 else 0


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
    width = step.decode_tokens
    if width is None:
        width = decode_width(step)
    if width is None:
        width = 0
        decode = tokens == 0
    else:
        decode = width > 0
    if not decode and tokens <= 0:
        return None
    work = _new(Work)
    context = step.context_tokens or 0
    bucket = width if width <= 8 else (width + 7) & ~7 if width <= 256 else batch_bucket(width)
    u, v = width / BATCH_UNIT, context / CONTEXT_UNIT if context > 0 else 0.0
    work.decode = decode
    work.batch, work.context = u if u < TERM_MAX else TERM_MAX, v if v < TERM_MAX else TERM_MAX
    work.batch_key = bucket
    work.context_key = bucket * FINE + ((context * context).bit_length() if context > 0 else 0)
    if tokens <= 0:
        work.prefill = False
        work.tokens = work.attention = 0.0
        work.tokens_key = work.attention_key = 0
        return work
    attention = step.attention_work or 0
    t, a = tokens / PREFILL_UNIT, attention / ATTENTION_UNIT if attention > 0 else 0.0
    work.prefill = True
    work.tokens, work.attention = t if t < TERM_MAX else TERM_MAX, a if a < TERM_MAX else TERM_MAX
    work.tokens_key = tokens_key = half_octave(tokens)
    work.attention_key = tokens_key * FINE + half_octave(attention)
    return work


_new = object.__new__
"""Cheaper than a constructor, which is a function in Python."""
