"""Asking for a capture over HTTP, on loopback: ``POST /capture``, and ``POST /alertmanager`` with the body of
Alertmanager's webhook, version 4. What comes in is bounded and read as hostile."""

from __future__ import annotations

import json
import queue
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from typing import Any

from latencyprism.recorder.trigger import Asked
from latencyprism.slo.loopback import Listening, LoopbackHandler, LoopbackServer

MOST_BYTES = {"/capture": 64 << 10, "/alertmanager": 1 << 20}
MOST_WAITING, MOST_AT_ONCE, MOST_ALERTS = 64, 8, 64
_HOSTS = ("127.0.0.1", "localhost")


@dataclass(frozen=True, slots=True)
class Wish:
    """What was asked for, and of whom: None is anybody's."""

    asked: Asked
    pid: int | None = None
    engine: str | None = None
    replica: str | None = None


class _Server(LoopbackServer):
    request_queue_size = 16

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self.wishes: queue.Queue[Wish] = queue.Queue(MOST_WAITING)
        self._at_once = threading.BoundedSemaphore(MOST_AT_ONCE)
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._at_once.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._at_once.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away or speaks no HTTP is its own affair."""


class Receiver(Listening[_Server]):
    """Listens on 127.0.0.1 from construction to ``close``, on threads of its own. ``port`` 0: any free one.

    PrismError where it cannot listen."""

    def __init__(self, port: int) -> None:
        super().__init__(port, lambda address: _Server(address, _Handler), "give another port with --listen")

    def wishes(self) -> list[Wish]:
        """What came in since the last call."""
        found = []
        while True:
            try:
                found.append(self.server.wishes.get_nowait())
            except queue.Empty:
                return found


class _Handler(LoopbackHandler):
    server: _Server

    def do_GET(self) -> None:
        self._answer(404, "POST /capture and POST /alertmanager are here")

    def do_POST(self) -> None:
        path = self.path.partition("?")[0]
        if path not in MOST_BYTES:
            self._answer(404, "POST /capture and POST /alertmanager are here")
        elif self.headers.get("Origin") or not self._is_local():
            # A page in somebody's browser can reach loopback, too.
            self._answer(403, "only programs of this machine may ask")
        else:
            body = self._body(MOST_BYTES[path])
            if body is not None:
                self._take(path, body)

    def _is_local(self) -> bool:
        return (self.headers.get("Host") or "").partition(":")[0] in _HOSTS

    def _body(self, most: int) -> bytes | None:
        told = self.headers.get("Content-Length", "")
        if self.headers.get("Transfer-Encoding") or not told.isdigit() or len(told) > 12:
            self._answer(411, "say how long the body is")
            return None
        if int(told) > most:
            self._answer(413, f"the body may have {most} bytes")
            return None
        body = self.rfile.read(int(told))
        if len(body) < int(told):
            self._answer(400, "the body is cut off")
            return None
        return body

    def _take(self, path: str, body: bytes) -> None:
        try:
            wishes = plain_wish(body) if path == "/capture" else alertmanager_wishes(body)
        except (ValueError, RecursionError) as error:
            self._answer(400, str(error)[:200])
            return
        try:
            for wish in wishes:
                self.server.wishes.put_nowait(wish)
        except queue.Full:
            self._answer(429, "too many wait")
            return
        self._answer(202, f"{len(wishes)} asked for")

    def _answer(self, status: int, text: str) -> None:
        body = json.dumps({"told": text}).encode() + b"\n"
        self.send(status, "application/json", body, ("Connection", "close"))
        self.close_connection = True


def plain_wish(body: bytes) -> list[Wish]:
    """Of an empty body, or a JSON object with ``reason`` and ``pid``, both optional. ValueError."""
    told = _object(body) if body.strip() else {}
    pid = told.get("pid")
    if pid is not None and (not isinstance(pid, int) or isinstance(pid, bool) or not 0 < pid <= 1 << 22):
        raise ValueError("pid is no process id")
    reason = told.get("reason", "asked for over HTTP")
    if not isinstance(reason, str):
        raise ValueError("reason is no text")
    return [Wish(Asked("http", words(reason)), pid)]


def alertmanager_wishes(body: bytes) -> list[Wish]:
    """One for each firing alert that is not our own. ValueError where it is no webhook of version 4."""
    told = _object(body)
    alerts = told.get("alerts")
    if told.get("version") != "4" or not isinstance(alerts, list):
        raise ValueError("it is no webhook of Alertmanager, version 4")
    group = told.get("groupKey")
    found = []
    for alert in alerts[:MOST_ALERTS]:
        labels = alert.get("labels") if isinstance(alert, dict) else None
        if not isinstance(labels, dict) or alert.get("status") != "firing":
            continue
        name = _text(labels, "alertname") or "alert"
        if name.startswith("LatencyPrism"):
            continue  # what we alerted about is captured already
        key = _text(alert, "fingerprint") or (group if isinstance(group, str) else name)
        pid = _text(labels, "pid")
        number = int(pid) if pid is not None and pid.isdigit() and len(pid) < 8 else None
        asked = Asked("webhook", words(f"alert {name}"), words(key, 200))
        found.append(Wish(asked, number, _text(labels, "engine"), _text(labels, "replica")))
    return found


def words(text: str, most: int = 120) -> str:
    """Printable and not long: it goes into files and onto terminals."""
    return "".join(c if c.isprintable() else " " for c in text[:most]).strip() or "?"


def _object(body: bytes) -> dict[str, Any]:
    try:
        told = json.loads(body)
    except ValueError:
        raise ValueError("the body is no JSON") from None
    if not isinstance(told, dict):
        raise ValueError("the body is no JSON object")
    return told


def _text(told: dict[str, Any], name: str) -> str | None:
    value = told.get(name)
    return value if isinstance(value, str) and value else None
