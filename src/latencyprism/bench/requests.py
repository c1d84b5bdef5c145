"""Request records against the load client's own clock: first token, whole time, token counts, completeness.

Client, API process and engine loop are on one machine and read one clock, so a difference is the time that
lies between them: sockets, HTTP, text.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from latencyprism.engines.discovery import discover
from latencyprism.errors import PrismError
from latencyprism.lab import serve
from latencyprism.lab.generate import Request as Sent
from latencyprism.lab.load import Load
from latencyprism.lab.profiles import profile
from latencyprism.records import Request
from latencyprism.sentinel.targets import attach
from latencyprism.timeline.python_source import PythonSource

# The id an engine knows a request by, where its client sent NAME as X-Request-Id.
IDS = {"vllm": "cmpl-{name}-0", "transformers": "{name}"}
SETTLE_S = 4.0
NO_BUDGET_PPM = 1_000_000
"""Steps of a tiny model are so short that following requests would be dropped from time to time."""


def run(engine: str, requests: int, clients: int, seed: int, say: Callable[[str], None]) -> dict[str, Any]:
    """One run of ``requests`` requests on a fresh server; see ``compare`` for what is in the result."""
    if engine not in IDS:
        return {
            "engine": engine,
            "requests_seen": None,
            "why": f"single requests of {engine} are not observed",
        }
    with serve.start(engine) as server:  # type: ignore[arg-type]
        say(f"{engine} serves, started in {server.start_s:.0f} s")
        mixed = profile("mixed").but(clients=clients)
        with Load(server, mixed.but(duration_s=3.0, seed=seed)) as warm:
            warm.wait()
        time.sleep(1.0)
        attachment = attach(discover(server.pid)[0])
        try:
            source = attachment.source
            if not isinstance(source, PythonSource):
                raise PrismError(f"{engine} is not watched by a probe inside it")
            source.allow(NO_BUDGET_PPM)
            watch = _Watch(source)
            with Load(server, mixed.but(requests=requests, seed=seed + 1)) as load:
                load.wait()
                sent = load.result().requests
            watch.end()
            return {
                **compare(engine, sent, watch.requests, source.hashed),
                "from": source.requests_from,
                "output_tokens_in_steps": source.totals.output_tokens,
                "http_round_trip_ms": _round_trip_ms(server),
                "lost": source.lost,
                "probes": source.health(),
            }
        finally:
            attachment.close()


class _Watch:
    """Reads a source in a thread until ``end``."""

    def __init__(self, source: PythonSource) -> None:
        self.requests: list[Request] = []
        self._source = source
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        while not self._stop.wait(0.01):
            self._source.renew()
            self.requests += self._source.poll().requests
        self.requests += self._source.poll().requests

    def end(self) -> None:
        time.sleep(SETTLE_S)
        self._stop.set()
        self._thread.join()


def compare(
    engine: str, sent: Sequence[Sent], records: Sequence[Request], hashed: Callable[[str], int]
) -> dict[str, Any]:
    """``requests_true``/``requests_seen`` (records of requests that the client sent), ``unknown`` records;
    ``ttft_difference_ms`` and ``e2e_difference_ms``: client's figure less the record's; ``tokens_differ``."""
    by_name = {record.client_request or record.request: record for record in records}
    ok = [request for request in sent if request.outcome == "ok"]
    pairs = []
    for request in ok:
        record = by_name.pop(hashed(IDS[engine].format(name=request.name)), None)
        if record is not None:
            pairs.append((request, record))
    outputs = [(s.output_tokens, r.output_tokens) for s, r in pairs]
    prompts = [(s.prompt_tokens, r.prompt_tokens) for s, r in pairs if s.prompt_tokens is not None]
    cached = [(s.cached_tokens, r.cached_tokens) for s, r in pairs if s.cached_tokens is not None]
    firsts = [
        ((s.first_ns - s.sent_ns) - r.ttft_ns) / 1e6
        for s, r in pairs
        if s.first_ns is not None and r.ttft_ns is not None
    ]
    wholes = [
        ((s.end_ns - s.sent_ns) - r.e2e_ns) / 1e6
        for s, r in pairs
        if s.end_ns is not None and r.e2e_ns is not None
    ]
    arrivals = [(r.arrival_ns - s.sent_ns) / 1e6 for s, r in pairs if r.arrival_ns is not None]
    return {
        "engine": engine,
        "requests_true": len(ok),
        "requests_seen": len(pairs),
        "unknown": len(by_name),
        "failed": len(sent) - len(ok),
        "ttft_difference_ms": _spread(firsts),
        "e2e_difference_ms": _spread(wholes),
        "arrival_after_send_ms": _spread(arrivals),
        "ttft_ms_p50": _median([r.ttft_ns for _, r in pairs]),
        "e2e_ms_p50": _median([r.e2e_ns for _, r in pairs]),
        "output_tokens_equal": sum(a == b for a, b in outputs),
        "output_tokens_differ": sum(a != b for a, b in outputs),
        "prompt_tokens_differ": sum(a != b for a, b in prompts),
        "cached_tokens_differ": sum(a != b for a, b in cached) if cached else None,
        "whole_stories": sum(r.token_steps is not None for _, r in pairs),
        "finish_reasons": sorted({r.finish_reason or "unknown" for _, r in pairs}),
    }


def _spread(values_ms: Sequence[float]) -> dict[str, float] | None:
    """Median, 99th percentile, largest (of magnitudes), and the number within 2 ms."""
    if not values_ms:
        return None
    size = np.abs(np.asarray(values_ms))
    return {
        "p50": round(float(np.median(values_ms)), 3),
        "p99": round(float(np.quantile(size, 0.99)), 3),
        "max": round(float(size.max()), 3),
        "within_2_ms": round(float(np.mean(size <= 2.0)), 4),
        "n": len(values_ms),
    }


def _median(values_ns: Sequence[int | None]) -> float | None:
    known = [value for value in values_ns if value is not None]
    return round(float(np.median(known)) / 1e6, 3) if known else None


def _round_trip_ms(server: serve.Server) -> float:
    """A request to the same server, idle, that its engine does not see: what the wire and HTTP take."""
    times = []
    for _ in range(30):
        begun = time.monotonic_ns()
        server.get("/health")
        times.append((time.monotonic_ns() - begun) / 1e6)
    return round(float(np.median(times)), 3)
