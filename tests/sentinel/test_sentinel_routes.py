"""A real vLLM: requests are recorded with the API that they came by."""

from __future__ import annotations

import json
import time
import urllib.request
from typing import Any

from latencyprism.engines.discovery import discover
from latencyprism.lab.serve import Server
from latencyprism.records import Request
from latencyprism.timeline.python_source import PythonSource


def ask(server: Server, route: str, **body: Any) -> None:
    data = json.dumps({"model": server.model, "max_tokens": 4, "ignore_eos": True, **body}).encode()
    url = f"http://127.0.0.1:{server.port}{route}"
    asked = urllib.request.Request(url, data, {"Content-Type": "application/json", "X-Request-Id": "one"})
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(asked, timeout=60) as answer:
        answer.read()


def test_requests_carry_the_route_they_came_by(vllm_server: Server) -> None:
    (replica,) = discover(vllm_server.pid)
    source = PythonSource(replica, budget_ppm=50_000)
    found: list[Request] = []
    try:
        ask(vllm_server, "/v1/completions", prompt=[300, 301, 302], n=2)
        deadline = time.monotonic() + 10
        while len(found) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
            source.renew()
            found += source.poll().requests
    finally:
        source.close()
    assert [one.route for one in found] == ["/v1/completions"] * 2
