"""Where alerts go: the webhook against a real HTTP server on loopback."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from latencyprism.errors import BadInput
from latencyprism.records import Alert
from latencyprism.sentinel import sinks


def an_alert(identity: str = "a1", level: str = "page") -> Alert:
    return Alert(
        id=identity, kind="shift", level=level, engine="vllm", replica=0, rank=0, step=9, onset_step=7,
        time="2026-01-01T00:00:00.000Z", observed_ms=30.0, expected_ms=20.0, excess=0.5, where="Worker 12",
    )  # fmt: skip


class Receiver:
    def __init__(self) -> None:
        self.answers: list[int] = []
        self.bodies: list[dict[str, Any]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(outer.answers.pop(0) if outer.answers else 200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                return

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.server.shutdown()
    made.server.server_close()


def test_payload_is_what_alertmanager_sends(receiver: Receiver) -> None:
    hook = sinks.Webhook(receiver.url)
    hook.offer(an_alert())
    hook.close()
    (body,) = receiver.bodies
    assert body["version"] == "4" and body["status"] == "firing" and body["receiver"]
    assert {
        "groupKey",
        "groupLabels",
        "commonLabels",
        "commonAnnotations",
        "externalURL",
        "truncatedAlerts",
    } <= set(body)
    (alert,) = body["alerts"]
    assert alert["labels"]["alertname"] == "LatencyPrismShift" and alert["labels"]["level"] == "page"
    assert alert["fingerprint"] == "a1" and alert["startsAt"].endswith("Z")
    assert all(isinstance(value, str) for value in alert["labels"].values())


def test_failure_is_retried_until_it_is_taken(receiver: Receiver) -> None:
    receiver.answers = [503, 500]
    hook = sinks.Webhook(receiver.url, first_wait_s=0.01)
    hook.offer(an_alert())
    hook.close()
    assert len(receiver.bodies) == 3 and hook.sent == 1 and hook.failed == 0


def test_refusal_for_good_is_not_repeated(receiver: Receiver) -> None:
    receiver.answers = [400]
    hook = sinks.Webhook(receiver.url, first_wait_s=0.01)
    hook.offer(an_alert())
    hook.close()
    assert len(receiver.bodies) == 1 and hook.failed == 1


def test_dead_receiver_never_blocks_and_queue_is_bounded() -> None:
    hook = sinks.Webhook("http://127.0.0.1:9/", first_wait_s=0.01)
    begun = time.monotonic()
    for number in range(sinks.QUEUE_LIMIT + 50):
        hook.offer(an_alert(str(number)))
    assert time.monotonic() - begun < 0.5
    assert hook.dropped > 0
    hook.close(wait_s=0.2)
    assert hook.sent == 0


@pytest.mark.parametrize("url", ["ftp://x/", "nonsense", "http://", "file:///etc/passwd"])
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(BadInput):
        sinks.Webhook(url)


def test_json_lines_hold_one_object_each_and_no_nan() -> None:
    stream = io.StringIO()
    out = sinks.JsonLines(stream)
    out.event("attached", pid=5, text="a\nb")
    out.write(an_alert().to_json())
    lines = stream.getvalue().splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["attached", "alert"]
    with pytest.raises(ValueError):
        out.event("x", value=float("nan"))
