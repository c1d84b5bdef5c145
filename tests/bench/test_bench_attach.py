"""``bench attach``: what it prints for people and for programs."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from latencyprism.bench import attach_engine
from latencyprism.lab.serve import Server

pytestmark = pytest.mark.attach_safety


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "latencyprism", "bench", "attach", *arguments],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_versions_as_json() -> None:
    done = run("--cycles", "4", "--python", sys.executable, "--json")
    assert done.returncode == 0, done.stderr
    (version,) = json.loads(done.stdout)["versions"].items()
    assert version[0] == f"{sys.version_info[0]}.{sys.version_info[1]}"
    figures = version[1]
    wanted = (
        "crashes",
        "hangs",
        "wrong",
        "leftovers",
        "held_us_p50",
        "held_us_p99",
        "target_gap_ratio",
        "cycles",
    )
    assert all(figures[name] is not None for name in wanted)
    assert (figures["crashes"], figures["hangs"], figures["wrong"], figures["cycles"]) == (0, 0, 0, 4)


def test_versions_for_people() -> None:
    done = run("--cycles", "2", "--python", sys.executable)
    assert done.returncode == 0, done.stderr
    assert "held p99 us" in done.stdout and "{" not in done.stdout


def test_killed_tracer() -> None:
    done = run("--kill", "4", "--python", sys.executable, "--json")
    assert done.returncode == 0, done.stderr
    (paths,) = json.loads(done.stdout)["killed"].values()
    assert [path["survived"] for path in paths] == [4, 4] and all(path["wrong"] == 0 for path in paths)


@pytest.mark.parametrize(
    "arguments", [("--cycles", "0"), ("--kill", "0"), ("--python", "/nonexistent"), ("--python", "/bin/true")]
)
def test_bad_arguments(arguments: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.strip()


def test_cycles_on_an_engine_under_load(transformers_server: Server) -> None:
    figures = attach_engine.measure(transformers_server, 6, lambda text: None)
    assert (figures["failed_requests"], figures["crashes"], figures["silent"]) == (0, 0, 0)
    assert figures["attached"] == 6 and figures["refused"] == {}
    assert figures["requests"] > 0 and min(figures["gaps"]) > 0
    assert figures["leftovers"] == 0, figures["left"]
    assert transformers_server.complete() > 0
