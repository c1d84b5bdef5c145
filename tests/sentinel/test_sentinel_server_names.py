"""Model names and port from command lines, whatever they look like."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from latencyprism.engines.discovery import Replica
from latencyprism.sentinel.server_names import server_names


def replica(engine: str, *words: str, role: str = "api") -> Replica:
    member: Any = SimpleNamespace(role=role, process=SimpleNamespace(cmdline=words))
    return cast(Replica, SimpleNamespace(engine=engine, members=(member,)))


@pytest.mark.parametrize(
    ("engine", "line", "models", "port"),
    [
        ("vllm", "vllm serve org/m --port 8001", {"org/m"}, 8001),
        ("vllm", "vllm serve org/m --served-model-name a b --port=9", {"a", "b"}, 9),
        ("vllm", "vllm serve --model=org/m", {"org/m"}, 8000),
        ("sglang", "python -m sglang.launch_server --model-path x", {"x"}, 30000),
        ("tgi", "python /t/bin/text-generation-server serve org/m --uds-path /tmp/s", {"org/m"}, None),
        ("llama.cpp", "llama-server --port soon", set(), 8080),
        ("vllm", "", set(), 8000),
        ("unknown", "python x.py --served-model-name", set(), None),
    ],
)
def test_names(engine: str, line: str, models: set[str], port: int | None) -> None:
    found = server_names(replica(engine, *line.split()))
    assert (found.models, found.port) == (models, port)


def test_without_an_api_process_the_first_member_tells() -> None:
    assert server_names(replica("vllm", "vllm", "serve", "m", role="engine")).models == {"m"}
