"""Whether a replica should get more work, for a load balancer: with hysteresis, over HTTP on loopback."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from latencyprism.slo.loopback import Listening, LoopbackHandler, LoopbackServer

HOLD_NS, CALM_NS = 10_000_000_000, 5_000_000_000


class Readiness:
    """Not ready from the moment a budget burns; ready again when it was calm for ``CALM_NS`` and not before
    ``HOLD_NS`` after."""

    def __init__(self) -> None:
        self.ready = True
        self.changes = 0
        self._since_ns = 0
        self._calm_ns: int | None = None

    def update(self, now_ns: int, burning: bool, calm: bool) -> bool:
        """True if it changed."""
        if self.ready:
            if not burning:
                return False
            self.ready, self._since_ns, self._calm_ns = False, now_ns, None
        else:
            if burning or not calm:
                self._calm_ns = None
                return False
            self._calm_ns = now_ns if self._calm_ns is None else min(self._calm_ns, now_ns)
            if now_ns - self._calm_ns < CALM_NS or now_ns - self._since_ns < HOLD_NS:
                return False
            self.ready = True
        self.changes += 1
        return True


class _Server(LoopbackServer):
    told: Callable[[], tuple[bool, dict[str, Any], str]]


class Endpoint(Listening[_Server]):
    """``GET /ready`` and ``/metrics`` on 127.0.0.1, answered by a thread of its own from what ``told`` gives:
    (ready, a dict for the body, text of metrics)."""

    def __init__(self, port: int, told: Callable[[], tuple[bool, dict[str, Any], str]]) -> None:
        def make(address: tuple[str, int]) -> _Server:
            server = _Server(address, _Handler)
            server.told = told
            return server

        super().__init__(port, make, "give another port")


class _Handler(LoopbackHandler):
    server: _Server

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        ready, values, metrics = self.server.told()
        if path == "/ready":
            body, kind = json.dumps({"ready": ready, **values}).encode() + b"\n", "application/json"
            self._answer(200 if ready else 503, kind, body)
        elif path == "/metrics":
            self._answer(200, "text/plain; version=0.0.4", metrics.encode())
        else:
            self._answer(404, "text/plain", b"/ready and /metrics are here\n")

    def _answer(self, status: int, kind: str, body: bytes) -> None:
        self.send(status, kind, body, ("Cache-Control", "no-store"))
