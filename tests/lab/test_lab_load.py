"""The load generator against a server whose timing and faults are known."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from lab_toy_server import ToyServer

from latencyprism.errors import BadInput
from latencyprism.lab.generate import Generator, Target
from latencyprism.lab.load import Load
from latencyprism.lab.outcome import GAP, Result, read
from latencyprism.lab.profiles import Length, Profile

SMALL = Profile("small", clients=3, prompt=Length(5), output=Length(10), requests=9)


def generate(toy: ToyServer, wanted: Profile, **limits: float) -> Result:
    generator = Generator(Target("llama.cpp", toy.port, "toy"), wanted, lambda: False, **limits)
    began, ended = generator.run()
    gaps = np.frombuffer(generator.gaps.tobytes(), dtype=GAP)
    return Result(wanted.name, began, ended, generator.requests, gaps)


def test_counts_are_exact_and_gaps_are_those_of_the_server() -> None:
    with ToyServer(gap_s=0.01) as toy:
        result = generate(toy, SMALL)
        assert toy.most_in_flight == 3
    summary = result.summary()
    assert (summary["requests"], summary["ok"], summary["failed"], summary["cut"]) == (9, 9, 0, 0)
    assert (summary["output_tokens"], summary["prompt_tokens"]) == (90, 45)
    assert int(result.gaps["events"].sum()) == 90
    assert int((result.gaps["gap_ns"] < 0).sum()) == 9
    assert 9.0 < summary["itl_ms"]["p50"] < 40.0
    assert 9.0 < summary["ttft_ms"]["p50"] < 400.0


def test_windows_are_cut_by_time() -> None:
    with ToyServer() as toy:
        result = generate(toy, SMALL)
    middle = int(np.median(result.gaps["time_ns"]))
    before, after = result.itl_ms(end_ns=middle), result.itl_ms(start_ns=middle)
    assert len(before) > 0
    assert len(after) > 0
    assert len(before) + len(after) == len(result.itl_ms())


def test_open_loop_keeps_its_rate_and_counts_the_wait_in_ttft() -> None:
    # 40 requests/s arrive, one at a time takes 0.1 s: the queue grows at the client, and shows in TTFT.
    wanted = SMALL.but(clients=1, rate=40.0, requests=10)
    with ToyServer(gap_s=0.01) as toy:
        result = generate(toy, wanted)
        assert toy.most_in_flight == 1
    assert result.summary()["ok"] == 10
    last = result.requests[-1]
    assert last.first_ns is not None
    assert last.sent_ns - last.due_ns > 200e6
    assert last.first_ns - last.due_ns > last.first_ns - last.sent_ns


def test_duration_ends_it() -> None:
    with ToyServer() as toy:
        began = time.monotonic()
        result = generate(toy, SMALL.but(requests=None, duration_s=0.5))
        assert 0.5 <= time.monotonic() - began < 10.0
    assert result.summary()["cut"] == 0
    assert 0.45 < (result.ended_ns - result.began_ns) / 1e9 < 5.0


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("refuse", "status 503"),
        ("short", "9 of 10 tokens"),
        ("break", "stream broke off"),
        ("hang", "timeout"),
    ],
)
def test_failures_are_told_apart(fault: str, why: str) -> None:
    with ToyServer(gap_s=0.001, fault=fault) as toy:
        result = generate(toy, SMALL.but(requests=3), timeout_s=2.0)
    assert [request.why for request in result.failures] == [why] * 3
    assert result.summary()["output_tokens"] == 0


def test_nobody_listens() -> None:
    with ToyServer() as toy:
        port = toy.port
    generator = Generator(Target("llama.cpp", port, "toy"), SMALL.but(requests=2, clients=1), lambda: False)
    generator.run()
    assert {request.why for request in generator.requests} == {"ECONNREFUSED"}


class _Stub:
    """As much of a Server as Load looks at."""

    def __init__(self, port: int) -> None:
        self.engine, self.port, self.model = "llama.cpp", port, "toy"


def test_load_process_stops_when_told_and_drains() -> None:
    with ToyServer() as toy:
        load = Load(_Stub(toy.port), SMALL.but(requests=None)).start()  # type: ignore[arg-type]
        deadline = time.monotonic() + 10
        while toy.served < 6 and time.monotonic() < deadline:
            time.sleep(0.02)
        load.stop()
        result = load.result()
        assert toy.in_flight == 0
        assert result.summary()["ok"] == toy.served >= 6
    assert load.result() is result


def test_load_process_ends_with_its_starter() -> None:
    code = (
        "import sys, os; sys.path.insert(0, sys.argv[2]);"
        "from test_lab_load import _Stub, SMALL; from latencyprism.lab.load import Load;"
        "load = Load(_Stub(int(sys.argv[1])), SMALL.but(requests=None)).start();"
        "print(load.pid, flush=True); sys.stdin.read(); os._exit(1)"
    )
    with ToyServer() as toy:
        starter = subprocess.Popen(
            [sys.executable, "-c", code, str(toy.port), str(Path(__file__).parent)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert starter.stdin is not None
        assert starter.stdout is not None
        pid = int(starter.stdout.readline())
        deadline = time.monotonic() + 10
        while toy.served < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
        starter.stdin.close()
        starter.wait(10)
        starter.stdout.close()
        while _running(pid) and time.monotonic() < deadline + 10:
            time.sleep(0.05)
        assert not _running(pid)


def _running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_command_line_prints_a_summary(tmp_path: Path) -> None:
    with ToyServer(gap_s=0.001) as toy:
        what = ["--engine", "llama.cpp", "--port", str(toy.port), "--profile", "decode"]
        what += ["--clients", "2", "--requests", "2"]
        where = ["--output", str(tmp_path / "r.json"), "--gaps", str(tmp_path / "g.bin")]
        answer = subprocess.run(
            [sys.executable, "-m", "latencyprism.lab.load", *what, *where],
            capture_output=True,
            text=True,
            check=False,
        )
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)["output_tokens"] == 512
    result = read(tmp_path / "r.json", tmp_path / "g.bin")
    assert len(result.requests) == 2
    assert int(result.gaps["events"].sum()) == 512


def test_broken_result_file_is_bad_input(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    for text in ("", "{}", '{"requests": [{"x": 1}]}'):
        path.write_text(text)
        with pytest.raises(BadInput):
            read(path)
