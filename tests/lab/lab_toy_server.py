"""A toy completions server with known timing, and ways to misbehave: the load generator's own yardstick."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class ToyServer:
    """Streams as llama.cpp does, one token every ``gap_s``. ``fault``: refuse, short, break or hang."""

    def __init__(self, gap_s: float = 0.005, fault: str = "") -> None:
        toy = self
        self.gap_s, self.fault, self.in_flight, self.most_in_flight, self.served = gap_s, fault, 0, 0, 0
        self._lock = threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                toy._answer(self)

            def log_message(self, format: str, *args: object) -> None:
                return

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        order = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        handler.close_connection = True
        with self._lock:
            self.in_flight += 1
            self.served += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            if self.fault == "refuse":
                handler.send_error(503)
                return
            self._stream(handler, order)
        except OSError:
            return  # the client went away
        finally:
            with self._lock:
                self.in_flight -= 1

    def _stream(self, handler: BaseHTTPRequestHandler, order: dict) -> None:
        handler.send_response(200)
        handler.end_headers()
        tokens = order["max_tokens"] - (1 if self.fault == "short" else 0)
        for _ in range(tokens):
            time.sleep(30 if self.fault == "hang" else self.gap_s)
            handler.wfile.write(b'data: {"choices":[{"text":"a","index":0,"finish_reason":null}]}\n\n')
            if self.fault == "break":
                return
        usage = {"completion_tokens": tokens, "prompt_tokens": len(order["prompt"])}
        closing = {"choices": [{"text": "", "index": 0, "finish_reason": "length"}], "usage": usage}
        handler.wfile.write(f"data: {json.dumps(closing)}\n\ndata: [DONE]\n\n".encode())

    def __enter__(self) -> ToyServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
