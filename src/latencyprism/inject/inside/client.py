"""Requests that change what an engine has to do: ``python -E -s -S client.py SPEC`` with SPEC a JSON object.

``host``, ``port``, ``model`` (None: not named, so the one that the server has); ``prompt_tokens`` (about;
words of one letter), ``max_tokens``; ``at_once``: senders; ``share``: part of its time in which each
waits for an answer, the rest it sleeps; ``until_ns`` (CLOCK_MONOTONIC). Every prompt is of this program's
own making and begins like no other. It ends then, when standard input closes, or when its parent is gone;
what is under way is cut off with it. One JSON line at the start, one at the end, with what the server's
own counters say.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import sys
import threading
import time
from typing import Any

from bounds import Bounds, say

Spec = dict[str, Any]
PATIENCE_S = 120.0
COUNTERS = {
    "preemptions": ("vllm:num_preemptions_total", "sglang:num_retracted_reqs_total"),
    "cache_queries": ("vllm:prefix_cache_queries_total",),
    "cache_hits": ("vllm:prefix_cache_hits_total",),
}


class Sender:
    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.begun_ns = time.monotonic_ns()
        self.lock = threading.Lock()
        self.sent = self.answered = self.refused = self.tokens = self.service_ns = 0
        self.why = ""

    def get(self, path: str) -> str:
        """ "" where there is no such page."""
        connection = http.client.HTTPConnection(self.spec["host"], self.spec["port"], timeout=5)
        with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
            connection.request("GET", path)
            answer = connection.getresponse()
            text = answer.read(1 << 22).decode("utf-8", "replace")
            return text if answer.status == 200 else ""
        return ""

    def counters(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for line in self.get("/metrics").splitlines():
            name = line.partition("{")[0].partition(" ")[0]
            for key, names in COUNTERS.items():
                if name in names:
                    with contextlib.suppress(ValueError, IndexError):
                        found[key] = found.get(key, 0.0) + float(line.rsplit(None, 1)[1])
        return found

    def prompt(self, maker: random.Random) -> str:
        return "".join(" " + chr(ord("a") + maker.randrange(26)) for _ in range(self.spec["prompt_tokens"]))

    def one(self, maker: random.Random) -> None:
        body = {"prompt": self.prompt(maker), "max_tokens": self.spec["max_tokens"]}
        if self.spec["model"] is not None:
            body["model"] = self.spec["model"]
        if self.spec["max_tokens"] > 1:
            body["ignore_eos"] = True
        connection = http.client.HTTPConnection(self.spec["host"], self.spec["port"], timeout=PATIENCE_S)
        with contextlib.closing(connection):
            head = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/completions", json.dumps(body).encode(), head)
            with self.lock:
                self.sent += 1
            answer = connection.getresponse()
            said = answer.read(1 << 22)
        with self.lock:
            if answer.status != 200:
                self.refused += 1
                self.why = f"status {answer.status}"
                return
            self.answered += 1
            with contextlib.suppress(ValueError, LookupError, TypeError):
                self.tokens += int(json.loads(said)["usage"]["prompt_tokens"])

    def run(self, number: int) -> None:
        maker = random.Random(time.monotonic_ns() + number)
        share = self.spec["share"]
        while True:
            began_ns = time.monotonic_ns()
            try:
                self.one(maker)
            except (OSError, http.client.HTTPException) as error:
                with self.lock:
                    self.refused += 1
                    self.why = type(error).__name__
                time.sleep(0.2)
            took_ns = time.monotonic_ns() - began_ns
            with self.lock:
                self.service_ns += took_ns
            time.sleep(took_ns / 1e9 * (1 / share - 1))


def main() -> None:
    spec = json.loads(sys.argv[1])
    bounds = Bounds(spec["until_ns"])
    sender = Sender(spec)
    before = sender.counters()
    say(pid=os.getpid())
    for number in range(spec["at_once"]):
        threading.Thread(target=sender.run, args=(number,), daemon=True).start()
    while not bounds.over(0.02):
        pass
    ended_ns, after = time.monotonic_ns(), sender.counters()
    with sender.lock:
        say(
            begun_ns=sender.begun_ns,
            ended_ns=ended_ns,
            sent=sender.sent,
            answered=sender.answered,
            refused=sender.refused,
            tokens=sender.tokens,
            service_ns=sender.service_ns,
            why=sender.why,
            before=before,
            after=after,
        )
        os._exit(0)


if __name__ == "__main__":
    main()
