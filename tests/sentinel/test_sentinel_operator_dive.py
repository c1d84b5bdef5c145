from __future__ import annotations

import threading

import pytest

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
