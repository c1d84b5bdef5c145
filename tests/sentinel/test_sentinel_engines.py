"""The watch on real engines: what it sees is what happened, and nothing of it stays."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from latencyprism.bench.fidelity import compare
from latencyprism.engines.discovery import discover
from latencyprism.lab.load import Load
from latencyprism.lab.profiles import Profile, profile
from latencyprism.lab.serve import Server, start
from latencyprism.sentinel.targets import attach

pytestmark = [pytest.mark.engine, pytest.mark.root, pytest.mark.attach_safety]

LEASE_S = 3.0


def short(seconds: float, **changes: Any) -> Profile:
    return profile("mixed").but(duration_s=seconds, **changes)


def watch(*arguments: str, **popen: Any) -> subprocess.Popen[str]:
    """Without a folder for captures none is written: a deep dive keeps its ring's addresses in the engine."""
    captures = [] if "-o" in arguments else ["--no-capture"]
    return subprocess.Popen(
        [sys.executable, "-m", "latencyprism", "watch", "--json", *captures, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tempfile.gettempdir(), **popen,
    )  # fmt: skip


def first_event(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, process.stderr.read() if process.stderr else ""
    event: dict[str, Any] = json.loads(line)
    return event


def traces(pid: int) -> list[str]:
    """Mappings and descriptors of ours in a process."""
    maps = [line for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if "lprism" in line]
    descriptors = [os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir() if entry.is_symlink()]
    return maps + [target for target in descriptors if "lprism" in target]


def wait_until_clean(pid: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while traces(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert traces(pid) == []


def test_vllm_records_equal_the_engines_own_counts(vllm_server: Server) -> None:
    found = compare(vllm_server, short(10, clients=6), print)
    assert found["steps_seen"] == found["steps_true"] > 50
    assert found["tokens_seen"] == found["tokens_true"]
    assert found["output_tokens_seen"] == found["output_tokens_client"]
    assert found["lost"] == 0 and found["in_order"] and found["failed"] == 0
    assert all(probe["errors"] == 0 and probe["dropped"] == 0 for probe in found["probes"].values())
    wait_until_clean(vllm_server.pid, 1)


def test_transformers_tokens_equal_the_clients(transformers_server: Server) -> None:
    found = compare(transformers_server, short(8), print)
    assert found["tokens_seen"] == found["tokens_true"] > 0
    assert found["output_tokens_seen"] == found["output_tokens_client"]
    assert found["lost"] == 0 and found["in_order"] and found["failed"] == 0
    assert all(probe["errors"] == 0 for probe in found["probes"].values())


@pytest.mark.bpf
def test_llama_cpp_steps_equal_the_engines_own_count(llama_server: Server) -> None:
    found = compare(llama_server, short(8), print)
    assert found["steps_seen"] == found["steps_true"] > 50
    assert found["tokens_seen"] == found["tokens_true"]
    assert found["lost"] == 0 and found["in_order"] and found["failed"] == 0


def test_watch_attaches_while_serving_logs_steps_and_leaves_nothing(
    transformers_server: Server, tmp_path: Path
) -> None:
    before = len(list(Path(f"/proc/{transformers_server.pid}/fd").iterdir()))
    log = tmp_path / "steps.csv"
    with Load(transformers_server, short(8)) as load:
        time.sleep(0.5)
        process = watch("-p", str(transformers_server.pid), "--steps", str(log))
        assert first_event(process)["event"] == "attached"
        assert traces(transformers_server.pid)
        time.sleep(4)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=20)
        load.wait()
        assert load.result().summary()["failed"] == 0
    assert process.returncode == 0 and err == ""
    ended = json.loads(out.splitlines()[-1])
    rows = list(csv.DictReader(log.open()))
    assert ended["event"] == "ended" and ended["lost"] == 0 and ended["steps"] == len(rows) > 50
    assert traces(transformers_server.pid) == []
    deadline = time.monotonic() + 5  # the client's own connections close in their own time
    while (
        len(list(Path(f"/proc/{transformers_server.pid}/fd").iterdir())) > before
        and time.monotonic() < deadline
    ):
        time.sleep(0.1)
    assert len(list(Path(f"/proc/{transformers_server.pid}/fd").iterdir())) <= before
    assert not list(Path("/dev/shm").glob("lprism-*"))


def test_killed_watch_is_outlived_and_its_probe_removes_itself(transformers_server: Server) -> None:
    process = watch("-p", str(transformers_server.pid))
    assert first_event(process)["event"] == "attached"
    process.kill()
    process.communicate(timeout=10)
    time.sleep(LEASE_S + 0.5)
    assert transformers_server.complete() > 0  # the probe meets its lease at the next step
    wait_until_clean(transformers_server.pid, 3)
    again = watch("-p", str(transformers_server.pid), "-d", "1s")
    assert first_event(again)["event"] == "attached"
    again.communicate(timeout=20)
    assert again.returncode == 0


def test_second_watch_is_told_who_has_it(transformers_server: Server) -> None:
    first = watch("-p", str(transformers_server.pid))
    assert first_event(first)["event"] == "attached"
    second = watch("-p", str(transformers_server.pid), "-d", "1s")
    _, err = second.communicate(timeout=20)
    assert second.returncode == 3 and str(first.pid) in err
    first.send_signal(signal.SIGINT)
    first.communicate(timeout=20)
    assert first.returncode == 0


def test_detach_by_somebody_else_is_noticed(transformers_server: Server) -> None:
    process = watch("-p", str(transformers_server.pid))
    assert first_event(process)["event"] == "attached"
    done = subprocess.run(
        [sys.executable, "-m", "latencyprism", "detach", "-p", str(transformers_server.pid), "--json"],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert json.loads(done.stdout)["processes"][0]["removed"] is True
    out, _ = process.communicate(timeout=20)
    assert any(json.loads(line)["event"] == "gone" for line in out.splitlines())
    wait_until_clean(transformers_server.pid, 1)


@pytest.mark.parametrize("fixture", ["transformers_server", "vllm_server"])
def test_idle_engine_can_be_attached_to_and_left(fixture: str, request: pytest.FixtureRequest) -> None:
    server: Server = request.getfixturevalue(fixture)
    time.sleep(1.0)
    for _ in range(3):
        attachment = attach(discover(server.pid)[0])
        attachment.close()
        assert all(traces(pid) == [] for pid in attachment.replica.pids)
    assert server.alive() and server.complete() > 0


@pytest.mark.bpf
def test_restarted_engine_is_found_again() -> None:
    first = start("llama.cpp")
    process = watch("-p", str(first.pid), "-d", "25s")
    try:
        assert first_event(process)["event"] == "attached"
        first.stop()
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["event"] == "gone"
        with start("llama.cpp") as second:
            event = json.loads(process.stdout.readline())
            assert event["event"] == "reattached" and str(second.pid) in event["pids"]
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)
        first.stop()
    assert process.returncode == 0


@pytest.mark.bpf
def test_disturbance_is_alerted_captured_and_diagnosed(llama_server: Server, tmp_path: Path) -> None:
    """Stops of 300 ms in a stream of steps of a few milliseconds: alert, capture with a verdict. One may
    fall into a moment without a request, or follow another long stall at once, and is not told then."""
    with Load(llama_server, short(32, clients=2, think_ms=0.0)):
        process = watch("-p", str(llama_server.pid), "-o", str(tmp_path))
        assert first_event(process)["event"] == "attached"
        time.sleep(9)
        for _ in range(3):
            os.kill(llama_server.pid, signal.SIGSTOP)
            try:
                time.sleep(0.3)
            finally:
                os.kill(llama_server.pid, signal.SIGCONT)
            time.sleep(6)
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
    events = [json.loads(line) for line in out.splitlines()]
    stalls = [e for e in events if e["event"] == "alert" and e["observed_ms"] >= 280]
    assert stalls, "\n".join(out.splitlines())
    assert stalls[0]["expected_ms"] < 200 and stalls[0]["delay_ms"] < 1000
    verdicts = [e for e in events if e["event"] == "verdict"]
    captures = [e for e in events if e["event"] == "capture"]
    assert captures and all(Path(e["path"]).stat().st_size > 10_000 for e in captures)
    assert {e["alert"] for e in verdicts} == {e["alert"] for e in captures}, json.dumps(captures)
    assert all(e["verdict"]["cause"] for e in verdicts)
