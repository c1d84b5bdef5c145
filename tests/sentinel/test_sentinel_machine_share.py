"""What of an alert's excess the machine made itself."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator

import pytest
from sentinel_windows import Source

from latencyprism.attach.process import read_process
from latencyprism.engines.discovery import Member, Replica
from latencyprism.host.machine import MachineCounters
from latencyprism.records import Alert, Step
from latencyprism.sentinel.machine_share import machine_share
from latencyprism.sentinel.replica_watch import ReplicaWatch
from latencyprism.sentinel.targets import Attachment

S, MS = 1_000_000_000, 1_000_000
PIDS = (os.getpid(),)


def stat(busy: int, steal: int) -> bytes:
    cpu = min(os.sched_getaffinity(0))
    return f"cpu  0 0 0 0\ncpu{cpu} {busy} 0 0 50 0 0 0 {steal} 0 0\nintr".encode()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[MachineCounters]:
    """Ten seconds at work with nothing stolen, up to now."""
    made = MachineCounters()
    now = time.monotonic_ns()
    made.history.extend((now - (10 - n) * S, stat(100 * n, 0)) for n in range(11))
    monkeypatch.setattr(made, "cpu_times", lambda: stat(1000 + 60, 40))
    yield made
    made.close()


def test_stolen_time_is_shared_out_over_the_late_steps(machine: MachineCounters) -> None:
    onset_ns = machine.history[-1][0]
    # 400 ms were stolen; steps were late by 800 ms together, this one by 20 ms.
    time.sleep(0.001)
    machine.history[-1] = (onset_ns - S, machine.history[-1][1])
    found = machine_share(machine, PIDS, onset_ns, 20.0, [(30.0, 10.0)] * 40, 30.0)
    assert found is not None
    assert found.stolen_ms == pytest.approx(10.0, rel=0.05)
    assert found.values()["explains"] == pytest.approx(0.5, rel=0.05)
    assert found.values()["steal_share"] == pytest.approx(0.4)
    assert found.text() == f"of the 20.0 ms beyond that, {found.stolen_ms:.1f} ms is time the hypervisor took"


def test_nothing_is_told_of_a_slow_down_of_the_engines_own(
    machine: MachineCounters, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "cpu_times", lambda: stat(1100, 0))
    assert machine_share(machine, PIDS, machine.history[-1][0], 20.0, [(30.0, 10.0)], 30.0) is None


def test_a_lower_clock_is_told(machine: MachineCounters, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cpu_times", lambda: stat(1100, 0))
    machine.frequencies.extend([{0: 3_000_000}] * 3)
    monkeypatch.setattr(machine, "clocks", lambda cpus, within_ns: {0: 1_500_000})
    found = machine_share(machine, PIDS, machine.history[-1][0], 12.0, [(20.0, 8.0)], 20.0)
    assert found is not None and found.clock_ms == pytest.approx(10.0)
    assert found.values()["frequency_ratio"] == 0.5 and "a CPU clock at 0.50 of what it was" in found.text()
    monkeypatch.setattr(machine, "clocks", lambda cpus, within_ns: {0: 2_850_000})
    assert machine_share(machine, PIDS, machine.history[-1][0], 12.0, [(20.0, 8.0)], 20.0) is None


def test_nothing_is_known_without_readings(machine: MachineCounters) -> None:
    machine.history.clear()
    assert machine_share(machine, PIDS, time.monotonic_ns(), 20.0, [(30.0, 10.0)], 30.0) is None


def steps_and_a_stall(watch: ReplicaWatch, stolen_ticks: int, monkeypatch: pytest.MonkeyPatch) -> Alert:
    """300 steps of 10 ms up to now, then one of 110 ms, of which so many ticks were stolen."""
    source: Source = watch.attachment.source  # type: ignore[assignment]
    now = time.monotonic_ns()
    machine = watch.host.machine
    machine.history.clear()
    machine.history.extend((now - (10 - n) * S, stat(100 * n, 0)) for n in range(10))
    monkeypatch.setattr(machine, "cpu_times", lambda: stat(1000 - stolen_ticks, stolen_ticks))
    found = []
    for number in range(301):
        late = 100 * MS if number == 300 else 0
        at = now - (301 - number) * 11 * MS - 100 * MS
        source.window.steps.append(
            Step("vllm", 0, 0, number, at, at + 10 * MS + late, "decode", requests=4, prefill_requests=0,
                 decode_requests=4, prefill_tokens=0, decode_tokens=4, context_tokens=400, attention_work=0,
                 running=4, waiting=0)
        )  # fmt: skip
        found += watch.look()
    ((alert, _),) = found
    return alert


@pytest.fixture
def watch() -> Iterator[ReplicaWatch]:
    here = Replica("vllm", 0, (Member(read_process(os.getpid()), "engine"),), "0.32")
    made = ReplicaWatch(Attachment(here, Source(PIDS), [], None))  # type: ignore[arg-type]
    yield made
    made.close()


def test_the_alert_says_what_the_hypervisor_took(
    watch: ReplicaWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    alert = steps_and_a_stall(watch, 9, monkeypatch)
    assert alert.machine is not None and alert.machine["explains"] == pytest.approx(0.9, abs=0.02)
    assert alert.text is not None and alert.text.endswith("90.0 ms is time the hypervisor took")
    assert json.loads(alert.to_json())["machine"]["steal_share"] > 0.0


def test_the_alert_says_nothing_of_a_machine_that_took_nothing(
    watch: ReplicaWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    alert = steps_and_a_stall(watch, 0, monkeypatch)
    assert alert.machine is None and json.loads(alert.to_json())["machine"] is None
    assert alert.text is not None and "hypervisor" not in alert.text


def test_it_takes_less_than_a_millisecond() -> None:
    machine = MachineCounters()
    for n in range(60):
        machine.history.append((time.monotonic_ns() - (60 - n) * S // 4, machine.cpu_times()))
    best = float("inf")
    for _ in range(20):
        begun = time.perf_counter()
        machine_share(machine, PIDS, time.monotonic_ns() - S, 20.0, [(30.0, 10.0)] * 500, 30.0)
        best = min(best, time.perf_counter() - begun)
    machine.close()
    assert best < 1e-3, best
