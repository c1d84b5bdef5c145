"""HTTP on loopback, on threads of its own: what the receiver of wishes and a replica's readiness share."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Generic, TypeVar

from latencyprism.errors import PrismError


class LoopbackServer(ThreadingHTTPServer):
    daemon_threads = True


_Server = TypeVar("_Server", bound=LoopbackServer)


class Listening(Generic[_Server]):
    """Listens on 127.0.0.1 from construction to ``close``. ``port`` 0: any free one; see ``port``.

    PrismError, with ``remedy``, where it cannot listen."""

    def __init__(self, port: int, make: Callable[[tuple[str, int]], _Server], remedy: str) -> None:
        try:
            self.server = make(("127.0.0.1", port))
        except OSError as error:
            what = f"cannot listen on 127.0.0.1:{port}"
            raise PrismError(what, error.strerror or str(error), remedy) from None
        self.port = int(self.server.server_address[1])
        self._thread = threading.Thread(target=self.server.serve_forever, args=(0.2,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self._thread.join(2)


class LoopbackHandler(BaseHTTPRequestHandler):
    timeout = 5.0
    server_version, sys_version = "latencyprism", ""

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, status: int, kind: str, body: bytes, *more: tuple[str, str]) -> None:
        """An answer whole; ``more``: headers besides those of type and length."""
        self.send_response(status)
        for name, value in (("Content-Type", kind), ("Content-Length", str(len(body))), *more):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: standard error belongs to the watch."""
