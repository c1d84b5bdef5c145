"""Steps beside our own deep probes: how late they may be, and for how long."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import cast

from latencyprism.records import Step
from latencyprism.sentinel.operator_dive import OperatorDives
from latencyprism.sentinel.replica_watch import DEEP_EXCUSE, OPERATORS_EXCUSE, ReplicaWatch


def watch(operators: bool) -> ReplicaWatch:
    made = object.__new__(ReplicaWatch)
    made._dives = deque(maxlen=4)
    made.operators = cast(OperatorDives, SimpleNamespace()) if operators else None
    return made


def step(start_ns: int, end_ns: int) -> Step:
    return Step("vllm", 0, 0, 1, start_ns, end_ns)


def test_steps_that_touch_a_dive_are_excused_and_no_others() -> None:
    for operators, share in ((True, OPERATORS_EXCUSE), (False, DEEP_EXCUSE)):
        one = watch(operators)
        one.diving(1000, 2000)
        assert one._excuse(step(900, 1000)) == 0.0
        assert one._excuse(step(990, 1010)) == share
        assert one._excuse(step(1990, 2100)) == share
        assert one._excuse(step(2000, 2100)) == 0.0
        assert not one._dives  # it is over: nothing is looked at from here on


def test_a_second_dive_holds_on_its_own() -> None:
    one = watch(True)
    one.diving(1000, 2000)
    one.diving(5000, 6000)
    assert [one._excuse(step(at, at + 10)) > 0.0 for at in (1500, 3000, 5500, 6500)] == [
        True, False, True, False,
    ]  # fmt: skip
