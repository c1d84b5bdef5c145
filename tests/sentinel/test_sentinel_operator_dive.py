from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import ClassVar

import pytest

from latencyprism.agent.operator_ring import OperatorRecords
from latencyprism.errors import TargetBusy, TargetRefused
from latencyprism.sentinel import operator_dive
from latencyprism.sentinel.operator_dive import OperatorDives


def test_a_capture_without_operators_says_that_they_were_not_found_out_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found_out = threading.Event()

    def slowly(pid: int) -> None:
        found_out.wait(20)
        raise OSError("gone")

    monkeypatch.setattr(operator_dive, "recognise", slowly)
    monkeypatch.setattr(operator_dive, "READY_S", 0.02)
    dives = OperatorDives({7: "Worker"}, realtime=False)
    try:
        dive = dives.begin(0.2)
        dive.finish()
        assert dive.records == []
        assert dive.missing == ["operators: what arming them needs was not found out in time"]
    finally:
        found_out.set()
    assert dives.wait_ready(10.0) and dives.missing == ["operators: gone"]


class Probe:
    """Stands for one process's operators; process 8 is busy the first two times that it is asked."""

    asked: ClassVar[list[int]] = []

    def __init__(self, injector: int, build: None, seconds: float, **_: object) -> None:
        self.asked.append(injector)
        if injector == 8 and self.asked.count(8) < 3:
            raise TargetBusy("no", "the main thread is in native code")
        if injector == 9:
            raise TargetRefused("no", "another watcher observes its operators")
        self.pid, self.armed_ns, self.records = injector, time.monotonic_ns(), OperatorRecords(injector)
        self.drained = 0

    def drain(self) -> None:
        self.drained += 1

    def close(self) -> None: ...


@pytest.mark.parametrize(("seconds", "seen"), [(5.0, {7, 8}), (0.15, {7})])
def test_a_process_that_is_busy_is_asked_again_one_that_refuses_is_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seconds: float, seen: set[int]
) -> None:
    Probe.asked = []
    usual = sys.getswitchinterval()
    monkeypatch.setattr(operator_dive, "OperatorProbe", Probe)
    monkeypatch.setattr(operator_dive, "recognise", lambda pid: None)
    monkeypatch.setattr(operator_dive, "Injector", lambda pid: pid)
    monkeypatch.setattr(operator_dive, "TscClock", lambda: None)
    dives = OperatorDives({7: "Worker 0", 8: "Worker 1", 9: "Worker 2"}, realtime=False)
    assert dives.wait_ready(5.0)
    dive = dives.begin(seconds, tmp_path)
    until = time.monotonic() + 5
    while (len(dive.armed_ms) < len(seen) or Probe.asked.count(8) < 2) and time.monotonic() < until:
        time.sleep(0.01)
    dive.finish()
    assert {records.pid for _, records in dive.records} == set(dive.armed_ms) == seen
    assert Probe.asked.count(7) == Probe.asked.count(9) == 1
    assert sys.getswitchinterval() == usual
    busy = [] if 8 in seen else ["operators: the main thread is in native code"]
    assert sorted(dive.missing) == sorted(["operators: another watcher observes its operators", *busy])
    dive.forget()
    assert not dive.kept_in


def test_to_ask_for_its_end_waits_for_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Beside an engine that spins disarming can take as long as the engine's main thread likes."""
    disarmed = threading.Event()

    class Slow(Probe):
        def close(self) -> None:
            assert disarmed.wait(20)

    Probe.asked = []
    monkeypatch.setattr(operator_dive, "OperatorProbe", Slow)
    monkeypatch.setattr(operator_dive, "recognise", lambda pid: None)
    monkeypatch.setattr(operator_dive, "Injector", lambda pid: pid)
    monkeypatch.setattr(operator_dive, "TscClock", lambda: None)
    dives = OperatorDives({7: "Worker 0"}, realtime=False)
    assert dives.wait_ready(5.0)
    dive = dives.begin(10.0, tmp_path)
    until = time.monotonic() + 5
    while not dive.armed_ms and time.monotonic() < until:
        time.sleep(0.01)
    begun = time.monotonic()
    assert not dive.end() and not dive.end()
    assert time.monotonic() - begun < 0.5
    disarmed.set()
    while not dive.end() and time.monotonic() < until:
        time.sleep(0.01)
    dive.finish(0.0)
    assert [records.pid for _, records in dive.records] == [7] and dive.missing == []
