"""Where what the watcher says goes: JSON lines on a stream, and an Alertmanager-style webhook.

The watch never waits for a sink: the stream is written line by line, the webhook has a thread and a bounded
queue of its own.
"""

from __future__ import annotations

import json
import queue
import threading
import time
import urllib.error
import urllib.request
from typing import Any, TextIO
from urllib.parse import urlsplit

from latencyprism.errors import BadInput
from latencyprism.records import Alert

QUEUE_LIMIT = 256
ATTEMPTS = 6
TIMEOUT_S = 5.0


class JsonLines:
    """One JSON object a line, flushed at once. A reader that went away ends the watch (BrokenPipeError)."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()

    def event(self, event: str, **fields: Any) -> None:
        self.write(json.dumps({"event": event, **fields}, allow_nan=False))


class Webhook:
    """Posts alerts as Alertmanager webhook payloads, version 4, each retried with back-off.

    ``offer`` never blocks; when ``QUEUE_LIMIT`` payloads wait, further ones are counted in ``dropped``.
    ``sent`` and ``failed`` count what became of the others."""

    def __init__(self, url: str, *, first_wait_s: float = 0.5) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise BadInput(f"cannot use the webhook {url!r}", "it is no http or https URL")
        self._url = url
        self._first_wait_s = first_wait_s
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue(QUEUE_LIMIT)
        self._stop = threading.Event()
        self.sent = self.failed = self.dropped = self._accepted = 0
        self.last_error = ""
        self._thread = threading.Thread(target=self._run, name="webhook", daemon=True)
        self._thread.start()

    def offer(self, alert: Alert, status: str = "firing") -> None:
        try:
            self._queue.put_nowait(webhook_payload(alert, status))
            self._accepted += 1
        except queue.Full:
            self.dropped += 1

    def close(self, wait_s: float = 5.0) -> None:
        """Let what is queued go out for at most ``wait_s``, then stop."""
        deadline = time.monotonic() + wait_s
        while self.sent + self.failed < self._accepted and time.monotonic() < deadline:
            time.sleep(0.02)
        self._stop.set()
        try:
            self._queue.put_nowait(None)
        except queue.Full:
            self.dropped += self._queue.qsize()
        self._thread.join(max(deadline - time.monotonic(), 0.1))

    def _run(self) -> None:
        while not self._stop.is_set():
            payload = self._queue.get()
            if payload is None:
                return
            if self._deliver(payload):
                self.sent += 1
            else:
                self.failed += 1

    def _deliver(self, payload: dict[str, Any]) -> bool:
        body = json.dumps(payload).encode()
        wait_s = self._first_wait_s
        for attempt in range(ATTEMPTS):
            request = urllib.request.Request(self._url, body, {"Content-Type": "application/json"})
            try:
                with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
                    if 200 <= answer.status < 300:
                        return True
                    self.last_error = f"HTTP {answer.status}"
            except urllib.error.HTTPError as error:
                self.last_error = f"HTTP {error.code}"
                if error.code < 500 and error.code != 429:
                    return False  # the receiver will not like it better later
            except (OSError, ValueError) as error:
                self.last_error = str(error)[:200]
            if attempt + 1 < ATTEMPTS and self._stop.wait(wait_s):
                return False
            wait_s = min(wait_s * 2, 30.0)
        return False


def webhook_payload(alert: Alert, status: str) -> dict[str, Any]:
    """One alert as the body of Alertmanager's webhook, data format version 4."""
    labels = {
        "alertname": "LatencyPrism" + alert.kind.capitalize(),
        "severity": "page" if alert.level == "page" else "info",
        "level": alert.level,
        "kind": alert.kind,
        "engine": alert.engine,
        "replica": str(alert.replica),
        "rank": str(alert.rank),
    }
    summary = f"step {alert.step} took {alert.observed_ms:.1f} ms, expected {alert.expected_ms:.1f} ms"
    annotations = {
        "summary": (alert.kind == "straggler" and alert.text) or summary,
        "where": alert.where or "",
        "capture": alert.capture or "",
        "alert_id": alert.id,
    }
    entry = {
        "status": status,
        "labels": labels,
        "annotations": {name: text for name, text in annotations.items() if text},
        "startsAt": alert.time,
        "endsAt": "0001-01-01T00:00:00Z" if status == "firing" else alert.time,
        "generatorURL": "",
        "fingerprint": alert.id,
    }
    return {
        "version": "4",
        "groupKey": f'{{}}:{{alertname="{labels["alertname"]}", replica="{alert.replica}"}}',
        "truncatedAlerts": 0,
        "status": status,
        "receiver": "latencyprism",
        "groupLabels": {"alertname": labels["alertname"]},
        "commonLabels": labels,
        "commonAnnotations": entry["annotations"],
        "externalURL": "",
        "alerts": [entry],
    }
