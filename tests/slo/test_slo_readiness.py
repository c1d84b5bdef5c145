"""Readiness has hysteresis, and its endpoint answers what load balancers and Prometheus ask."""

from __future__ import annotations

import json
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latencyprism.errors import PrismError
from latencyprism.slo.readiness import CALM_NS, HOLD_NS, Endpoint, Readiness

S = 1_000_000_000


def run(states: str) -> list[int]:
    """Seconds at which it changed; a letter a second: b burning, c calm, anything else neither."""
    one, changes = Readiness(), []
    for second, state in enumerate(states):
        if one.update(second * S, state == "b", state == "c"):
            changes.append(second)
    return changes


def test_it_ends_with_the_first_burn_and_comes_back_after_hold_and_calm() -> None:
    assert run("ccc") == []
    assert run("cbb" + "c" * 30) == [1, 1 + HOLD_NS // S]
    assert run("b" * 20 + "c" * 30) == [0, 20 + CALM_NS // S]


def test_neither_burning_nor_calm_is_no_reason_to_come_back() -> None:
    assert run("b" + "." * 100) == [0]


def test_calm_has_to_last() -> None:
    assert run("b" + "cccc." * 20) == [0]
    assert run("b" + "cccc." * 20 + "c" * 10) == [0, 106]


def test_a_flapping_budget_does_not_flap_the_replica() -> None:
    assert run("bc" * 100) == [0]


def test_a_clock_that_jumps_back_only_waits() -> None:
    one = Readiness()
    assert one.update(100 * S, True, False)
    assert not one.update(50 * S, False, True)
    assert not one.update(50 * S + CALM_NS, False, True)
    assert one.update(100 * S + HOLD_NS, False, True)


@given(st.lists(st.sampled_from("bc."), max_size=300))
def test_it_never_changes_more_often_than_it_holds(states: list[str]) -> None:
    changes = run("".join(states))
    back = changes[1::2]
    assert all(ready - gone >= HOLD_NS // S for gone, ready in zip(changes[::2], back))
    for ready in back:
        assert set(states[ready - CALM_NS // S : ready + 1]) == {"c"}


@pytest.fixture
def endpoint() -> Iterator[tuple[Endpoint, list[Any]]]:
    told: list[Any] = [(True, {"objectives": []}, "x 1\n")]
    one = Endpoint(0, lambda: told[0])
    yield one, told
    one.close()


def ask(port: int, path: str) -> tuple[int, str, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return answer.status, answer.headers["Content-Type"], answer.read().decode()
    except urllib.error.HTTPError as refused:
        with refused:
            return refused.code, refused.headers["Content-Type"], refused.read().decode()


def test_200_and_503(endpoint: tuple[Endpoint, list[Any]]) -> None:
    one, told = endpoint
    status, kind, body = ask(one.port, "/ready")
    assert (status, kind) == (200, "application/json") and json.loads(body) == {
        "ready": True,
        "objectives": [],
    }
    told[0] = (False, {"objectives": [{"burning": True}]}, "x 2\n")
    status, _, body = ask(one.port, "/ready?verbose=1")
    assert status == 503 and json.loads(body)["ready"] is False
    assert ask(one.port, "/metrics")[::2] == (200, "x 2\n")
    assert ask(one.port, "/")[0] == 404 and ask(one.port, "/ready/../../etc")[0] == 404


def test_it_listens_on_loopback_alone(endpoint: tuple[Endpoint, list[Any]]) -> None:
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    mine = [line.split()[1] for line in lines if line.split()[1].endswith(f":{endpoint[0].port:04X}")]
    assert mine and all(address.startswith("0100007F:") for address in mine)


def test_nonsense_on_the_wire_does_no_harm(endpoint: tuple[Endpoint, list[Any]]) -> None:
    for raw in (b"", b"\x00\xff\r\n\r\n", b"GET\r\n\r\n", b"POST /ready HTTP/1.1\r\n\r\n", b"A" * 70_000):
        with socket.create_connection(("127.0.0.1", endpoint[0].port), timeout=5) as sock:
            try:
                sock.sendall(raw)
                sock.shutdown(socket.SHUT_WR)
                while sock.recv(4096):
                    pass
            except OSError:
                pass  # refused while we still wrote
    assert ask(endpoint[0].port, "/ready")[0] == 200


def test_a_port_that_is_taken_is_told(endpoint: tuple[Endpoint, list[Any]]) -> None:
    with pytest.raises(PrismError, match="cannot listen"):
        Endpoint(endpoint[0].port, lambda: (True, {}, ""))
