"""Request records against the load client's own clock: first token, whole time, token counts, completeness.

Client, API process and engine loop are on one machine and read one clock, so a difference is the time that
lies between them: sockets, HTTP, text, and waiting for a processor. How long these take is measured at the
same time, by requests to the same server that its engine does not see.
"""

from __future__ import annotations

import os
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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
ROUND_TRIP_EVERY_S = 0.05
WITHIN_MS = 2.0
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
            idle_ms = _idle_round_trip_ms(server)
            trips = _RoundTrips(server)
            with Load(server, mixed.but(requests=requests, seed=seed + 1)) as load:
                on_time = _on_time(load.pid)
                load.wait()
                sent = load.result().requests
            trips.end()
            watch.end()
            return {
                **compare(engine, sent, watch.requests, source.hashed, trips.seen),
                "clients": clients,
                "client_on_time": on_time,
                "from": source.requests_from,
                "output_tokens_in_steps": source.totals.output_tokens,
                "http_round_trip_ms": idle_ms,
                "http_round_trip_loaded_ms": _quantiles([trip.ms for trip in trips.seen]),
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


class RoundTrip(NamedTuple):
    """A request that the engine does not see: when it was sent (ns, CLOCK_MONOTONIC), and what it took."""

    sent_ns: int
    ms: float


class _RoundTrips:
    """Measures them in a thread, some a second, until ``end``."""

    def __init__(self, server: serve.Server) -> None:
        self.seen: list[RoundTrip] = []
        self._server = server
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self._thread.start()

    def _ask(self) -> None:
        _on_time(threading.get_native_id())
        while not self._stop.wait(ROUND_TRIP_EVERY_S):
            try:
                self.seen.append(_round_trip(self._server))
            except OSError:
                continue  # not answered in time: none is known for this moment

    def end(self) -> None:
        self._stop.set()
        self._thread.join()


def _on_time(thread: int) -> bool:
    """Have a client run as soon as it can: on a machine of its own it would not wait for the engine's cores.
    False: not permitted."""
    try:
        os.sched_setscheduler(thread, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(1))
    except OSError:
        return False
    return True


def compare(
    engine: str,
    sent: Sequence[Sent],
    records: Sequence[Request],
    hashed: Callable[[str], int],
    trips: Sequence[RoundTrip] = (),
) -> dict[str, Any]:
    """``requests_true``/``requests_seen`` (records of requests that the client sent), ``unknown`` records;
    ``ttft_difference_ms`` and ``e2e_difference_ms``: client's figure less the record's; ``tokens_differ``.
    ``trips``: in order of time; of each request, half of the one at its sending and half of the one at the
    token are what the way took."""
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
        (((s.first_ns - s.sent_ns) - r.ttft_ns) / 1e6, _way_ms(trips, s.sent_ns, s.first_ns))
        for s, r in pairs
        if s.first_ns is not None and r.ttft_ns is not None
    ]
    wholes = [
        (((s.end_ns - s.sent_ns) - r.e2e_ns) / 1e6, _way_ms(trips, s.sent_ns, s.end_ns))
        for s, r in pairs
        if s.end_ns is not None and r.e2e_ns is not None
    ]
    arrivals = [((r.arrival_ns - s.sent_ns) / 1e6, None) for s, r in pairs if r.arrival_ns is not None]
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


def _way_ms(trips: Sequence[RoundTrip], sent_ns: int, token_ns: int) -> float | None:
    """What the way there and back took at these times, by the round trips under way or next."""
    if not trips:
        return None
    return (_nearest(trips, sent_ns).ms + _nearest(trips, token_ns).ms) / 2


def _nearest(trips: Sequence[RoundTrip], at_ns: int) -> RoundTrip:
    place = bisect_left(trips, at_ns, key=lambda trip: trip.sent_ns)
    before, after = trips[max(place - 1, 0)], trips[min(place, len(trips) - 1)]
    if before.sent_ns + before.ms * 1e6 >= at_ns or at_ns - before.sent_ns < after.sent_ns - at_ns:
        return before
    return after


def _spread(values: Sequence[tuple[float, float | None]]) -> dict[str, float] | None:
    """Of (ms, what the way took or None): median, 99th percentile, largest (of magnitudes), the share within
    2 ms, and where the way was measured the share within 2 ms and the way."""
    if not values:
        return None
    values_ms = [value for value, _ in values]
    size = np.abs(np.asarray(values_ms))
    spread = {
        "p50": round(float(np.median(values_ms)), 3),
        "p99": round(float(np.quantile(size, 0.99)), 3),
        "max": round(float(size.max()), 3),
        "within_2_ms": round(float(np.mean(size <= WITHIN_MS)), 4),
        "n": len(values_ms),
    }
    within = [abs(value) <= WITHIN_MS + way for value, way in values if way is not None]
    if within:
        spread["within_2_ms_and_way"] = round(float(np.mean(within)), 4)
    return spread


def _quantiles(values_ms: Sequence[float]) -> dict[str, float] | None:
    if not values_ms:
        return None
    p50, p90, p99 = (round(float(value), 3) for value in np.quantile(values_ms, [0.5, 0.9, 0.99]))
    return {"p50": p50, "p90": p90, "p99": p99, "n": len(values_ms)}


def _median(values_ns: Sequence[int | None]) -> float | None:
    known = [value for value in values_ns if value is not None]
    return round(float(np.median(known)) / 1e6, 3) if known else None


def _round_trip(server: serve.Server) -> RoundTrip:
    """A request to the same server that its engine does not see: what the wire and HTTP take."""
    begun = time.monotonic_ns()
    server.get("/health")
    return RoundTrip(begun, (time.monotonic_ns() - begun) / 1e6)


def _idle_round_trip_ms(server: serve.Server) -> float:
    return round(float(np.median([_round_trip(server).ms for _ in range(30)])), 3)
