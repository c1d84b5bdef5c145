"""The bytes between the load generator and an OpenAI-style completions server.

What a stream says is not looked at but for three things: that an event with a token came, the usage
figures, and the end mark.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

# What an event with a token contains, and what the last event does. llama.cpp and Transformers send one
# more event without a token to say why they finished, and Transformers no end mark but its usage.
_MARKS = {
    "vllm": (b'"text":', b"data: [DONE]"),
    "transformers": (b'[{"index":0,"text":', b'"completion_tokens":'),
    "llama.cpp": (b'"finish_reason":null', b"data: [DONE]"),
}
_TAIL_BYTES = 4096
_FIGURES = {
    "completion_tokens": re.compile(rb'"completion_tokens":\s*(\d+)'),
    "prompt_tokens": re.compile(rb'"prompt_tokens":\s*(\d+)'),
    "cached_tokens": re.compile(rb'"cached_tokens":\s*(\d+)'),
}


def completion_body(
    engine: str, model: str, prompt: Sequence[int], max_tokens: int, *, stream: bool
) -> bytes:
    """A /v1/completions request for exactly ``max_tokens`` tokens after ``prompt`` (token ids).

    Transformers takes text alone: there each token is written as a word that the tiny model's vocabulary
    has one token for, and the model has no end token. The others are told to ignore the end token.
    """
    body: dict[str, Any] = {"model": model, "max_tokens": max_tokens, "stream": stream, "temperature": 0}
    if engine == "transformers":
        body["prompt"] = words(prompt)
    else:
        body["prompt"] = list(prompt)
        body["ignore_eos"] = True
    if stream:
        body["stream_options"] = {"include_usage": True}
    return json.dumps(body).encode()


def words(tokens: Sequence[int]) -> str:
    """Text with one token for each id, for a vocabulary where " a" to " z" are tokens: " c x a ..."."""
    return "".join(" " + chr(ord("a") + token % 26) for token in tokens)


def request_bytes(host: str, body: bytes, name: str = "") -> bytes:
    """One POST of ``body`` to /v1/completions, on a connection of its own; ``name``: the id to know it by."""
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    if name:
        head += f"X-Request-Id: {name}\r\n"
    return f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body


class EventStream:
    """Reads one streamed answer as it comes; any bytes are accepted, none are kept but the last few thousand.

    ``status``: HTTP status, None until the head is complete, 0 where it is not HTTP; ``done``: the end mark
    came.
    """

    def __init__(self, engine: str) -> None:
        self.status: int | None = None
        self.done = False
        self._mark, self._last = _MARKS[engine]
        self._tail = b""

    def feed(self, data: bytes) -> int:
        """Take what was received; returns how many events with a token it completed."""
        if self.status is None:
            data = self._head(data)
            if self.status is None:
                return 0
        keep = self._tail[-(len(self._mark) - 1) :]
        events = (keep + data).count(self._mark)
        self._tail = (self._tail + data)[-_TAIL_BYTES:]
        if not self.done and self._last in self._tail:
            self.done = True
        return events

    def _head(self, data: bytes) -> bytes:
        """Body bytes after the head; sets ``status`` once the head is complete."""
        head, end, body = (self._tail + data).partition(b"\r\n\r\n")
        if not end:
            self._tail = head[-_TAIL_BYTES:]
            return b""
        self._tail = b""
        line = head.split(b"\r\n", 1)[0].split(b" ")
        well_formed = (
            len(line) >= 2 and line[0].startswith(b"HTTP/1.") and line[1].isdigit() and len(line[1]) == 3
        )
        self.status = int(line[1]) if well_formed else 0
        return body

    def usage(self, name: str) -> int | None:
        """A figure of the server's usage report (``completion_tokens``..), None where it gave none."""
        if self.status != 200:
            return None
        found = _FIGURES[name].findall(self._tail)
        return int(found[-1]) if found and len(found[-1]) < 10 else None
