"""Request: one request to an engine, from its arrival to its end, in the column names used everywhere.

Times are CLOCK_MONOTONIC nanoseconds, durations nanoseconds. A value that was not observed is None: the
start of a request that was there before the probe, the first token of one that was ended before it had any.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from latencyprism.records.step import NULL

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
PLACES = {"finish_reason": FINISH_REASONS, "route": ROUTES}
"""Columns that are packed as a place in these words."""


def place_of(words: Sequence[str], word: object) -> int:
    """NULL: it is none of them."""
    return words.index(str(word)) if word in words else NULL


def word_at(words: Sequence[str], place: int | None) -> str | None:
    """The inverse; None for a place that is none."""
    return words[place] if place is not None and 0 <= place < len(words) else None


def row_to_request(row: Sequence[Any]) -> Request:
    """A request as packed everywhere: the engine's name in bytes, else integers, NULL where not observed.
    A word that is not known is None."""
    told: dict[str, Any] = {
        name: None if value == NULL else value for name, value in zip(REQUEST_COLUMNS, row)
    }
    told["engine"] = row[0].rstrip(b"\0").decode("ascii", "replace")
    for name, words in PLACES.items():
        told[name] = word_at(words, told[name])
    return Request(**told)
