"""The operator probe in a real PyTorch, against PyTorch's own profiler in the same process."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latencyprism.agent import operator_build
from latencyprism.agent import operator_code as code
from latencyprism.agent.operator_build import recognise
from latencyprism.agent.operators import Addresses, OperatorProbe
from latencyprism.attach.inject import Injector
from latencyprism.errors import TargetRefused
from latencyprism.lab.install import EngineUnavailable, ensure
from latencyprism.timeline.operators import operators_of

pytestmark = [pytest.mark.engine, pytest.mark.root, pytest.mark.attach_safety]

SCRIPT = """
import json, sys, threading, time, torch
torch.set_num_threads(1)
layers = torch.nn.Sequential(*[torch.nn.Linear(32, 32) for _ in range(4)])
x = torch.zeros(4, 32)
def steps(n):
    with torch.no_grad():
        for _ in range(n):
            layers(x)
def profiled(n):
    from torch.profiler import ProfilerActivity, profile
    steps(1)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        steps(n)
    return [e.name() for e in seen.profiler.kineto_results.events()]
def elsewhere(n):
    thread = threading.Thread(target=steps, args=(n,))
    thread.start(); thread.join()
    return True
def for_seconds(s):
    until = time.monotonic() + s
    n = 0
    while time.monotonic() < until:
        steps(1); n += 1
    return n
steps(3)
print("ready", flush=True)
for line in sys.stdin:
    print(json.dumps(eval(line, globals())), flush=True)
"""


class Torch:
    """A process with PyTorch that evaluates what it is asked."""

    def __init__(self, python: str) -> None:
        self.process = subprocess.Popen(
            [python, "-u", "-c", SCRIPT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.pid = self.process.pid
        assert self.process.stdout is not None
        assert self.process.stdout.readline().strip() == "ready"

    def tell(self, expression: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(expression + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def ask(self, expression: str) -> Any:
        self.tell(expression)
        return self.answer()

    def rss_mb(self) -> float:
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) / 1024


def torch_python() -> str:
    if sys.platform != "linux" or platform.machine() != "x86_64":
        pytest.skip("the operator probe is made for Linux on x86-64")
    if os.geteuid() != 0:
        pytest.skip("needs the right to ptrace")
    try:
        return str(ensure("transformers").python)
    except EngineUnavailable as missing:
        pytest.skip(f"engine unavailable: {missing.why}")


@pytest.fixture
def target() -> Iterator[Torch]:
    started = Torch(torch_python())
    yield started
    started.process.kill()
    started.process.communicate()


def probe(target: Torch, seconds: float = 20.0, **options: Any) -> OperatorProbe:
    return OperatorProbe(Injector(target.pid), recognise(target.pid), seconds, **options)


def names_seen(armed: OperatorProbe) -> list[list[str]]:
    """By thread, without the overloads, which the profiler does not tell."""
    found = operators_of(armed.records, "process", [])
    return [[calls.names[place].split(".")[0] for place in calls.rows["name"].tolist()] for calls in found]


def test_every_operator_of_a_step_is_seen_as_pytorchs_own_profiler_sees_it(target: Torch) -> None:
    told = target.ask("profiled(5)")
    armed = probe(target)
    target.ask("steps(5)")
    armed.close()
    assert armed.records.lost == 0
    [seen] = names_seen(armed)
    assert len(told) > 5 * 4 * 5
    assert seen == told
    [calls] = operators_of(armed.records, "process", [])
    assert calls.track == ("process", f"operators (thread {target.pid})")
    lengths = calls.rows["end_ns"] - calls.rows["start_ns"]
    assert (lengths > 0).all() and (lengths < 10**9).all()
    assert (calls.rows["start_ns"][1:] >= calls.rows["start_ns"][:-1]).all()


def test_operators_of_other_threads_have_lanes_of_their_own(target: Torch) -> None:
    armed = probe(target)
    begun = time.monotonic_ns()
    target.ask("elsewhere(3)")
    target.ask("steps(2)")
    ended = time.monotonic_ns()
    armed.close()
    found = operators_of(armed.records, "process", [])
    assert sorted(len(calls.rows) for calls in found) == [2 * len(found[0].rows) // 3, len(found[0].rows)]
    assert len({calls.track for calls in found}) == 2
    for calls in found:
        assert begun < calls.rows["start_ns"].min() and calls.rows["end_ns"].max() < ended


def test_the_target_gets_its_memory_back_and_is_observed_again_and_again(target: Torch) -> None:
    target.ask("steps(100)")
    before = target.rss_mb()
    injector, build = Injector(target.pid), recognise(target.pid)
    counts = set()
    for _ in range(5):
        armed = OperatorProbe(injector, build, 20.0)
        target.ask("steps(20)")
        armed.close()
        counts.add(len(operators_of(armed.records, "process", [])[0].rows))
        assert target.ask("steps(1)") is None
    assert len(counts) == 1
    assert target.rss_mb() - before < 20


def test_it_is_armed_once(target: Torch) -> None:
    first = probe(target)
    with pytest.raises(TargetRefused, match="another watcher observes"):
        probe(target)
    target.ask("steps(2)")
    first.close()
    assert first.records.lost == 0 and len(names_seen(first)) == 1
    probe(target).close()


def test_it_goes_by_itself_at_its_end(target: Torch) -> None:
    armed = probe(target, 0.3)
    time.sleep(0.4)
    target.ask("steps(1)")
    assert armed.state == code.STATE_DISARMED
    armed.drain()
    assert not armed.records.chunks
    armed.close()


def test_it_goes_by_itself_at_its_limit_of_records(target: Torch) -> None:
    armed = probe(target, limit=100)
    target.ask("steps(20)")
    assert armed.state == code.STATE_DISARMED
    armed.close()
    assert armed.records.limited
    assert sum(len(chunk) for chunk in armed.records.chunks) == 100
    again = probe(target)
    target.ask("steps(1)")
    again.close()
    assert not again.records.limited and len(names_seen(again)[0]) > 10


def test_a_ring_that_wraps_loses_whole_records_and_says_how_many(target: Torch) -> None:
    armed = probe(target, lease_s=20.0)
    target.ask("steps(6000)")  # 40 operators a step, two records each
    armed.close()
    lost = armed.records.lost
    kept = sum(len(chunk) for chunk in armed.records.chunks)
    assert lost > 0 and kept + lost == 6000 * 40 * 2
    for calls in operators_of(armed.records, "process", []):
        assert (calls.rows["end_ns"] > calls.rows["start_ns"]).all()


def test_a_lease_that_is_renewed_all_the_time_never_lapses(target: Torch) -> None:
    armed = probe(target, lease_s=0.5)
    target.tell("for_seconds(1.5)")
    until = time.monotonic() + 1.5
    while time.monotonic() < until:
        for _ in range(500):
            armed._renew()
        armed.drain()
    assert target.answer() > 10
    state = armed.state
    armed.close()
    assert state == code.STATE_ARMED and not armed.records.lapsed


def test_a_watcher_that_is_killed_leaves_nothing_running(target: Torch) -> None:
    watcher = (
        "import sys, time\n"
        "from latencyprism.agent.operator_build import recognise\n"
        "from latencyprism.agent.operators import OperatorProbe\n"
        "from latencyprism.attach.inject import Injector\n"
        f"armed = OperatorProbe(Injector({target.pid}), recognise({target.pid}), 60.0, lease_s=0.5)\n"
        "print('armed', flush=True)\n"
        "while True:\n armed.drain(); time.sleep(0.02)\n"
    )
    killed = subprocess.Popen([sys.executable, "-c", watcher], stdout=subprocess.PIPE, text=True)
    assert killed.stdout is not None and killed.stdout.readline().strip() == "armed"
    with pytest.raises(TargetRefused, match="another watcher observes"):
        probe(target)
    target.tell("for_seconds(2.0)")
    time.sleep(0.5)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert target.answer() > 10
    # Its lease is over: the next one is let in, and finds no second callback beside its own.
    armed = probe(target)
    target.ask("steps(3)")
    armed.close()
    assert names_seen(armed) == [target.ask("profiled(3)")]


def test_a_target_that_ends_in_the_window_is_no_trouble(target: Torch) -> None:
    armed = probe(target)
    target.ask("steps(3)")
    target.process.kill()
    target.process.wait()
    armed.drain()
    armed.close()
    assert sum(len(chunk) for chunk in armed.records.chunks) == 3 * 40 * 2


def test_a_build_that_is_not_known_is_left_alone(target: Torch, monkeypatch: pytest.MonkeyPatch) -> None:
    known = operator_build.known_builds()
    monkeypatch.setattr(operator_build, "known_builds", lambda: {**known, "builds": []})
    with pytest.raises(TargetRefused, match="is not known"):
        recognise(target.pid)
    other = [{**entry, "name_code": "90" * 8} for entry in known["builds"]]
    monkeypatch.setattr(operator_build, "known_builds", lambda: {**known, "builds": other})
    with pytest.raises(TargetRefused, match="not that of the build it says it is"):
        recognise(target.pid)
    with pytest.raises(TargetRefused, match="no libtorch_cpu"):
        recognise(os.getpid())


@given(st.lists(st.lists(st.integers(1, 2**47 - 1), max_size=40), max_size=6))
def test_every_address_is_given_at_least_once(batches: list[list[int]]) -> None:
    addresses, before = Addresses(), set[int]()
    for batch in batches:
        given_now = addresses.new(np.array(batch, dtype=np.int64))
        assert set(batch) - before <= given_now <= set(batch)
        before |= set(batch)


def test_addresses_that_come_again_are_given_once_and_forgotten_ones_again() -> None:
    addresses, batch = Addresses(), np.array([0x7F0000001230, 0x7F0000004560] * 5000, dtype=np.int64)
    assert addresses.new(batch) == {0x7F0000001230, 0x7F0000004560}
    assert addresses.new(batch) == set()
    addresses.forget({0x7F0000004560})
    assert addresses.new(batch) == {0x7F0000004560}
