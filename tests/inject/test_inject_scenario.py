"""Scenario files: read strictly, played on time, told with what was truly done."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from latencyprism import inject
from latencyprism.errors import BadInput
from latencyprism.inject import needs, scenario
from latencyprism.records.verdict import CAUSES

EXAMPLE = Path(__file__).parents[2] / "docs" / "scenarios" / "lock-then-neighbour.toml"

TWO = """
name = "two"
duration_s = 6.0
[[inject]]
cause = "peer.stalled"
at_s = 1.2
for_s = 4.0
stop_ms = 60
every_s = 0.3
[[inject]]
cause = "cpu.neighbour"
at_s = 0.2
for_s = 1.0
strength = 0.5
[[expect]]
from_s = 0.2
to_s = 1.0
causes = ["cpu.neighbour"]
"""


@pytest.fixture
def target():
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    time.sleep(0.1)
    yield process
    process.kill()
    process.wait()


def write(tmp_path, text):
    path = tmp_path / "scenario.toml"
    path.write_text(text)
    return path


def test_acts_come_in_their_order_and_on_time(tmp_path, target):
    told = []
    wanted = scenario.read(write(tmp_path, TWO))
    begun_ns, played = scenario.play(
        wanted, {"target": target.pid}, tell=lambda at_s, text: told.append((at_s, text))
    )
    assert [one.act.cause for one in played] == ["cpu.neighbour", "peer.stalled"]
    assert [at_s for at_s, _ in told] == [0.2, 1.2]
    neighbour, stalled = played
    assert 0.2 <= (neighbour.truth[0].start_ns - begun_ns) / 1e9 < 1.3
    assert all(1.2 <= (stop.start_ns - begun_ns) / 1e9 < 6 for stop in stalled.truth)
    assert stalled.effect.measured == len(stalled.truth) >= 1
    assert time.monotonic_ns() - begun_ns >= 6e9


def test_what_is_refused_is_noted_and_the_rest_goes_on(tmp_path, target):
    text = TWO.replace('"cpu.neighbour"\nat_s', '"workload.long_prompt"\nat_s')
    _, played = scenario.play(scenario.read(write(tmp_path, text)), {"target": target.pid})
    assert "--url" in played[0].refused and played[0].effect is None
    assert played[1].refused is None and played[1].truth


def test_the_verb_tells_truth_and_what_is_expected(tmp_path, target):
    words = [sys.executable, "-m", "latencyprism", "inject", "--scenario", str(write(tmp_path, TWO))]
    done = subprocess.run(
        [*words, "-p", str(target.pid), "--i-know", "--json"], capture_output=True, text=True, timeout=60
    )
    told = json.loads(done.stdout)
    assert done.returncode == (0 if all(one["effective"] for one in told["injected"]) else 1)
    assert [one["cause"] for one in told["injected"]] == ["cpu.neighbour", "peer.stalled"]
    (expected,) = told["expected"]
    assert expected["causes"] == ["cpu.neighbour"]
    assert expected["start_ns"] - told["start_ns"] == 200_000_000
    interval = told["injected"][0]["intervals"][0]
    assert told["start_ns"] < interval["start_ns"] < interval["end_ns"]
    assert "Traceback" not in done.stderr and "cpu.neighbour on" in done.stderr


def test_the_example_is_one():
    read = scenario.read(EXAMPLE)
    assert [act.cause for act in read.acts] == ["python.lock", "cpu.neighbour"] and len(read.expected) == 3
    assert read.engine == "transformers" and read.profile == "decode"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"cpu.neighbour"\nat_s', '"cpu.nobody"\nat_s'),
        ("at_s = 0.2", "at_s = -1"),
        ("at_s = 0.2", "at_s = nan"),
        ("at_s = 0.2", 'at_s = "soon"'),
        ("at_s = 0.2", "at_s = true"),
        ("for_s = 1.0", "for_s = 5.9"),
        ("for_s = 1.0", ""),
        ("strength = 0.5", "strength = 99"),
        ("strength = 0.5", "colour = 1"),
        ("strength = 0.5", 'process = "init"'),
        ("stop_ms = 60", 'stop_ms = "x"'),
        ("duration_s = 6.0", "duration_s = 1e9"),
        ("duration_s = 6.0", ""),
        ('causes = ["cpu.neighbour"]', 'causes = ["weather"]'),
        ('causes = ["cpu.neighbour"]', "causes = []"),
        ('causes = ["cpu.neighbour"]', 'causes = "cpu.neighbour"'),
        ("to_s = 1.0", "to_s = 0.1"),
        ('name = "two"', "name = 5"),
        ('name = "two"', "name = "),
        ('name = "two"', "inject = 3"),
        ('name = "two"', "[workload]\nprofile = 3"),
    ],
)
def test_a_file_that_is_wrong_is_bad_input(tmp_path, old, new):
    assert old in TWO
    with pytest.raises(BadInput):
        scenario.read(write(tmp_path, TWO.replace(old, new)))


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"duration_s = 5\n", b"[[[" * 1000, b"#" * (2 << 20)])
def test_other_files_are_bad_input(tmp_path, content):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(BadInput):
        scenario.read(path)


def test_a_file_that_is_not_there(tmp_path):
    words = [sys.executable, "-m", "latencyprism", "inject", "--scenario", str(tmp_path / "no")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_a_scenario_without_an_engine_wants_a_pid(tmp_path):
    words = [sys.executable, "-m", "latencyprism", "inject", "--scenario", str(write(tmp_path, TWO))]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "-p PID" in done.stderr


def test_every_cause_says_what_it_needs_and_is_one_of_a_verdict():
    assert set(needs.NEEDS) == set(inject.CATALOGUE) and set(inject.CATALOGUE) < set(CAUSES)
    for need in needs.NEEDS.values():
        missing = need.missing()
        assert need.text and (missing is None or len(missing) > 10)


def test_needs_are_looked_for(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0})
    assert "one CPU" in needs.NEEDS["disk.stall"].missing()
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert "aarch64" in needs.NEEDS["python.gil"].missing()
