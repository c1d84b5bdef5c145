"""Request: one request to an engine, from its arrival to its end, in the column names used everywhere.

Times are CLOCK_MONOTONIC nanoseconds, durations nanoseconds. A value that was not observed is None: the
start of a request that was there before the probe, the first token of one that was ended before it had any.
"""

from __future__ import annotations

from typing import NamedTuple

FINISH_REASONS = ("stop", "length", "abort", "error", "repetition")
ROUTES = (
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/inference/v1/generate",
    "/v1/audio/transcriptions", "/v1/audio/translations",
)  # fmt: skip
"""Routes that are told apart."""


class Request(NamedTuple):
    """``request`` is a keyed hash of the engine's own id, new for every watch; the id never leaves the
    engine. ``client_request``: the same of the id its client knows it by, where the engine keeps one."""

    engine: str
    replica: int
    request: int
    arrival_ns: int | None
    queue_ns: int | None = None
    """From arrival to the start of the step that first carried it."""
    prefill_ns: int | None = None
    """From there to the end of the step that made its first token."""
    ttft_ns: int | None = None
    """From arrival until the first token was handed to its stream (without a probe in the API process: to
    the end of its step)."""
    tpot_ns: int | None = None
    """Mean time per output token after the first."""
    e2e_ns: int | None = None
    """From arrival until the last token was handed to its stream."""
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None
    max_itl_ns: int | None = None
    """Largest interval between ends of steps that gave it tokens, one after the other."""
    finish_reason: str | None = None
    first_step: int | None = None
    """Number of the step that first carried it."""
    first_token_step: int | None = None
    last_step: int | None = None
    token_steps: int | None = None
    """How many steps gave it tokens."""
    slowest_step: int | None = None
    """The step at the end of ``max_itl_ns``."""
    preempted: int | None = None
    client_request: int | None = None
    route: str | None = None
    """One of ``ROUTES``: the API that it came by, where the engine's id for it says so."""


REQUEST_COLUMNS: tuple[str, ...] = Request._fields
