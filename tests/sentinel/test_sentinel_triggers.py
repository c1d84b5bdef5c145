from __future__ import annotations

import io
import json
import os
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentinel_stepping import alert_of, watch_of_this_process

from latencyprism.errors import PrismError
from latencyprism.recorder.trigger import Asked
from latencyprism.sentinel import captures as captures_module
from latencyprism.sentinel import flight_tape
from latencyprism.sentinel.captures import Captures
from latencyprism.sentinel.receiver import Receiver, alertmanager_wishes, plain_wish
from latencyprism.sentinel.replica_watch import ReplicaWatch
from latencyprism.sentinel.sinks import JsonLines
from latencyprism.sentinel.trigger_watch import TriggerOptions, TriggerWatch

S = 1_000_000_000


@pytest.fixture()
def watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ReplicaWatch]:
    (tmp_path / "tapes").mkdir(mode=0o700)
    monkeypatch.setattr(flight_tape, "tape_folder", lambda: tmp_path / "tapes")
    made = watch_of_this_process()
    time.sleep(0.03)
    made.poll()
    yield made
    made.close()


class Stub:
    """In place of a capture under way."""

    def __init__(
        self, watch: ReplicaWatch, alert: Any, path: Path, *, deep: bool, meta: Any, kernels: bool
    ) -> None:
        self.watch, self.alert, self.path, self.meta, self.open = watch, alert, path, meta, True
        self.kernels = kernels


@pytest.fixture()
def captures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Captures, io.StringIO]:
    monkeypatch.setattr(captures_module, "IncidentCapture", Stub)
    out = io.StringIO()
    made = Captures(
        tmp_path / "c", ("evidence", "page"), JsonLines(out), lambda text: None, lambda c: None, deep=False
    )
    return made, out


def events(out: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.getvalue().splitlines()]


def post(port: int, path: str, body: bytes = b"", **headers: str) -> int:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body, dict(headers), method="POST")
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def webhook(*alerts: dict[str, Any], version: str = "4") -> bytes:
    return json.dumps({"version": version, "groupKey": "{}:{x}", "alerts": list(alerts)}).encode()


def firing(name: str = "SlowTokens", fingerprint: str = "f1", **labels: str) -> dict[str, Any]:
    return {"status": "firing", "fingerprint": fingerprint, "labels": {"alertname": name, **labels}}


# -- what is worth a capture ------------------------------------------------------------------------


def test_what_is_asked_for_is_begun_and_told_with_its_reason(
    watch: ReplicaWatch, captures: tuple[Captures, io.StringIO]
) -> None:
    made, out = captures
    path = made.begin_for(watch, Asked("signal", "SIGUSR1"))
    assert path is not None and made.under_way[0].path == path
    assert made.under_way[0].meta["trigger"] == {"kind": "signal", "reason": "SIGUSR1", "incident": None}
    assert made.begin_for(watch, Asked("http", "again")) is None
    first, second = events(out)
    assert first["event"] == "asked" and first["capture"] == str(path) and first["refused"] is None
    assert "under way" in second["refused"] and second["capture"] is None


def test_kernels_are_for_pages_and_for_who_asks(
    watch: ReplicaWatch, captures: tuple[Captures, io.StringIO]
) -> None:
    made, _ = captures
    assert watch.last_step is not None
    watch.counts.steps = 1000
    evidence, page = alert_of(watch.last_step, "e0"), alert_of(watch.last_step, "p0")
    evidence.level = "evidence"
    for alert in (evidence, page):
        assert made.choose(watch, alert, 0)
        made.begin(watch, alert)
    assert [capture.kernels for capture in made.under_way] == [False, True]
    made.under_way.clear()
    assert made.begin_for(watch, Asked("signal", "SIGUSR1")) is not None
    assert made.under_way[0].kernels


def test_an_alert_that_comes_from_outside_again_and_again_is_one_incident(
    watch: ReplicaWatch, captures: tuple[Captures, io.StringIO]
) -> None:
    made, out = captures
    for fingerprint in ("f1", "f1", "f1", "f2", "f1", "f2"):
        made.begin_for(watch, Asked("webhook", "alert SlowTokens", fingerprint))
        made.under_way.clear()
    assert [event["capture"] is not None for event in events(out)] == [True, False, False, True, False, False]
    assert all("captured already" in event["refused"] for event in events(out) if event["refused"])


def test_what_the_detector_has_captured_is_not_captured_for_alertmanager_too(
    watch: ReplicaWatch, captures: tuple[Captures, io.StringIO]
) -> None:
    made, out = captures
    assert watch.last_step is not None
    assert made.choose(watch, alert_of(watch.last_step), time.monotonic_ns())
    assert made.begin_for(watch, Asked("webhook", "alert SlowTokens", "f1")) is None
    assert "5e8b3c1d" in events(out)[0]["refused"]
    assert made.begin_for(watch, Asked("signal", "SIGUSR1")) is not None, "a person who asks means it"


def test_an_objective_that_burns_is_captured_once_with_the_incident_behind_it(
    watch: ReplicaWatch, captures: tuple[Captures, io.StringIO]
) -> None:
    made, _ = captures
    assert watch.last_step is not None
    burn = alert_of(watch.last_step, "b0")
    burn.kind = "slo"
    assert made.choose(watch, burn, 0)
    made.begin(watch, burn)
    assert made.under_way[0].meta == {"trigger": {"kind": "slo", "reason": "slo"}}
    again = alert_of(watch.last_step, "b1")
    assert not made.choose(watch, again, 5 * S) and again.capture == str(made.under_way[0].path)


def test_no_more_than_so_many_an_hour_however_asked(
    watch: ReplicaWatch, captures: tuple[Captures, io.StringIO]
) -> None:
    made, out = captures
    for number in range(40):
        made.begin_for(watch, Asked("http", "x"))
        made.begin_for(watch, Asked("webhook", "x", f"f{number}"))
        made.under_way.clear()
    told = [event for event in events(out) if event["capture"]]
    assert len([event for event in told if event["kind"] == "http"]) == 30
    assert "within the hour" in events(out)[-2]["refused"]


# -- who asks ---------------------------------------------------------------------------------------


def test_a_signal_a_file_and_a_schedule_ask_once_each(watch: ReplicaWatch, tmp_path: Path) -> None:
    there, appearing = tmp_path / "there", tmp_path / "appearing"
    there.write_text("old")
    before = signal.getsignal(signal.SIGUSR1)
    attendant = TriggerWatch(TriggerOptions((there, appearing), None, 60.0))
    try:
        attendant.attached(watch)

        def asked(now_ns: int) -> list[str]:
            return [raised.capture.kind for raised in attendant.tick(now_ns) if raised.capture]

        assert asked(0) == []
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert asked(S) == ["signal"] and asked(2 * S) == []
        appearing.write_text("")
        assert asked(3 * S) == ["file"] and asked(4 * S) == []
        os.utime(there, (7, 7))
        assert asked(5 * S) == ["file"]
        appearing.unlink()
        assert asked(6 * S) == []
        appearing.write_text("")
        assert asked(7 * S) == ["file"]
        assert asked(61 * S) == ["schedule"] and asked(62 * S) == []
        assert asked(500 * S) == ["schedule"] and asked(501 * S) == [], "missed ones are not made up for"
        attendant.detached(watch)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert asked(502 * S) == []
    finally:
        attendant.close()
    assert signal.getsignal(signal.SIGUSR1) == before


def test_http_asks_of_those_who_are_meant(watch: ReplicaWatch) -> None:
    attendant = TriggerWatch(TriggerOptions(listen=0))
    other = watch_of_this_process("transformers")
    said: list[dict[str, Any]] = []
    attendant.emit = lambda kind, **values: said.append({"event": kind, **values})
    try:
        attendant.attached(watch)
        attendant.attached(other)
        assert attendant.receiver is not None
        port = attendant.receiver.port
        assert said == [{"event": "listening", "url": f"http://127.0.0.1:{port}/capture"}]

        def meant() -> list[tuple[str, str, str]]:
            return [
                (raised.watch.replica.engine, raised.capture.kind, raised.capture.reason)
                for raised in attendant.tick(0)
                if raised.capture
            ]

        assert post(port, "/capture") == 202
        assert [engine for engine, _, _ in meant()] == ["vllm", "transformers"]
        assert post(port, "/capture", b'{"reason": "deploy\\u001b[2J", "pid": 1}') == 202
        assert meant() == []
        body = json.dumps({"reason": "a\u001b[2Jb", "pid": os.getpid()}).encode()
        assert post(port, "/capture", body) == 202
        assert meant()[0] == ("vllm", "http", "a [2Jb")
        assert post(port, "/alertmanager", webhook(firing(engine="transformers"))) == 202
        assert meant() == [("transformers", "webhook", "alert SlowTokens")]
        ours = firing("LatencyPrismStall")
        resolved = {**firing(), "status": "resolved"}
        assert post(port, "/alertmanager", webhook(ours, resolved, firing("Disk"))) == 202
        assert [reason for _, _, reason in meant()] == ["alert Disk", "alert Disk"]
        assert meant() == []
    finally:
        attendant.close()
        other.close()


def test_what_is_too_large_malformed_or_from_a_browser_is_refused() -> None:
    receiver = Receiver(0)
    try:
        port = receiver.port
        assert post(port, "/capture", b"x" * 70_000) == 413
        assert post(port, "/alertmanager", b"x" * 70_000) == 400
        assert post(port, "/capture", b"[") == 400
        assert post(port, "/capture", b'["a"]') == 400
        assert post(port, "/capture", b'{"pid": "12"}') == 400
        assert post(port, "/capture", b'{"pid": true}') == 400
        assert post(port, "/capture", b"[" * 60_000) == 400
        assert post(port, "/alertmanager", webhook(version="3")) == 400
        assert post(port, "/alertmanager", b'{"version": "4", "alerts": {}}') == 400
        assert post(port, "/elsewhere") == 404
        assert post(port, "/capture", b"", Origin="http://evil.example") == 403
        assert post(port, "/capture", b"", Host="evil.example") == 403
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/capture", timeout=10)
        assert receiver.wishes() == []
        answers = [post(port, "/capture") for _ in range(70)]
        assert answers.count(202) == 64 and set(answers) == {202, 429}
        assert len(receiver.wishes()) == 64 and post(port, "/capture") == 202
    finally:
        receiver.close()


def test_clients_that_say_nothing_hold_up_nobody_for_long() -> None:
    receiver = Receiver(0)
    silent = []
    try:
        for garbage in (
            b"",
            b"POST /capture HTTP/1.1\r\nContent-Length: 50\r\nHost: localhost\r\n\r\n",
            b"\xff\x00\r\n",
        ):
            for _ in range(6):
                opened = socket.create_connection(("127.0.0.1", receiver.port), timeout=5)
                opened.sendall(garbage)
                silent.append(opened)
        until = time.monotonic() + 15
        answered = 0
        while answered != 202 and time.monotonic() < until:
            try:
                answered = post(receiver.port, "/capture")
            except (OSError, urllib.error.URLError):
                time.sleep(0.2)
        assert answered == 202
        assert sum(thread.name.startswith("Thread-") for thread in threading.enumerate()) < 30
    finally:
        for opened in silent:
            opened.close()
        receiver.close()


def test_a_port_that_is_taken_is_refused_in_words() -> None:
    receiver = Receiver(0)
    try:
        with pytest.raises(PrismError, match="cannot listen"):
            Receiver(receiver.port)
    finally:
        receiver.close()


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["version", "alerts", "labels", "status", "alertname", "fingerprint", "pid"]),
        inner | st.sampled_from(["4", "firing"]), max_size=4,
    ),
    max_leaves=20,
)  # fmt: skip


@given(anything, st.binary(max_size=40))
def test_any_body_is_wishes_or_a_value_error(told: Any, raw: bytes) -> None:
    for body in (json.dumps(told).encode(), raw):
        for read in (plain_wish, alertmanager_wishes):
            try:
                wishes = read(body)
            except ValueError as error:
                assert str(error)
                continue
            assert all(len(wish.asked.reason) <= 140 and wish.asked.reason.isprintable() for wish in wishes)
