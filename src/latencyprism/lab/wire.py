"""The bytes between the load generator and an OpenAI-style completions server."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any


def completion_body(
    engine: str, model: str, prompt: Sequence[int], max_tokens: int, *, stream: bool, seed: int = 0
) -> bytes:
    """A /v1/completions request for exactly ``max_tokens`` tokens after ``prompt`` (token ids).

    Transformers takes text alone: there a token is written as the two letters that the tiny model's vocabulary has
    one token for, and its model has no end token. The others are told to ignore the end token.
    """
    body: dict[str, Any] = {"model": model, "max_tokens": max_tokens, "stream": stream, "temperature": 0}
    if engine == "transformers":
        body["prompt"] = words(prompt)
    else:
        body["prompt"] = list(prompt)
        body["ignore_eos"] = True
    if stream:
        body["stream_options"] = {"include_usage": True}
    if engine == "llama.cpp":
        # The server answers with whatever text it kept of a slot; prefixes are reused as in the other engines.
        body["cache_prompt"] = True
    return json.dumps(body).encode()


def words(tokens: Sequence[int]) -> str:
    """Text with one token for each id, for a vocabulary where " a".." z" are tokens: " c x a ..."."""
    return "".join(" " + chr(ord("a") + token % 26) for token in tokens)


def request_bytes(path: str, host: str, body: bytes) -> bytes:
    """One HTTP/1.1 POST on a connection of its own."""
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body
