"""Whether a replica should get more work, for a load balancer: with hysteresis, over HTTP on loopback."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from latencyprism.errors import PrismError

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


class Endpoint:
    """``GET /ready`` and ``/metrics`` on 127.0.0.1, answered by a thread of its own from what ``told`` gives:
    (ready, a dict for the body, text of metrics)."""

    def __init__(self, port: int, told: Callable[[], tuple[bool, dict[str, Any], str]]) -> None:
        try:
            self._server = _Server(("127.0.0.1", port), _Handler)
        except OSError as error:
            what = f"cannot listen on 127.0.0.1:{port}"
            raise PrismError(what, error.strerror or str(error), "give another port") from None
        self._server.told = told
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.2,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(2)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    told: Callable[[], tuple[bool, dict[str, Any], str]]


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = 5.0
    server_version, sys_version = "latencyprism", ""

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

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
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: standard error belongs to the watch."""
