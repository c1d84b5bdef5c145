"""What watching costs is a metric, and what a full ring loses is said once."""

from __future__ import annotations

from typing import Any, cast

from latencyprism.records import StepSource
from latencyprism.sentinel.below_watch import BelowWatch
from latencyprism.sentinel.cost import PERIOD_NS, Cost


class Source:
    def health(self) -> dict[int, dict[str, Any]]:
        return {7: {"budget_share": 0.0021}, 8: {"budget_share": None}}


class Probe:
    lost = 0


class Below:
    def __init__(self) -> None:
        self.probe = Probe()

    def describe(self) -> dict[str, Any]:
        return {"estimated_share": 0.0004, "lost": self.probe.lost}


def cost(source: object, below: Below | None) -> Cost:
    return Cost(cast(StepSource, source), cast("BelowWatch | None", below))


def test_counters_every_two_seconds() -> None:
    made = cost(Source(), Below())
    first = {counter.name: counter for counter in made.counters(10**10)}
    assert first["below_share"].value == 0.0004 and first["below_lost"].value == 0
    assert first["probe_share 7"].value == 0.0021 and "probe_share 8" not in first
    assert first["watch_cpu_ns"].value > 0 and first["watch_cpu_ns"].unit == "ns"
    assert made.counters(10**10 + PERIOD_NS - 1) == []
    assert len(made.counters(10**10 + PERIOD_NS)) == len(first)


def test_what_is_not_observed_is_not_zero() -> None:
    made = cost(object(), None)
    assert made.values() == {"below_share": None, "below_lost": None, "probe_share": {}}
    assert [counter.name for counter in made.counters(10**10)] == ["watch_cpu_ns"]


def test_lost_records_are_said_when_there_are_more() -> None:
    below = Below()
    made = cost(Source(), below)
    assert made.notices() == []
    below.probe.lost = 5
    assert "lost 5 waits" in made.notices()[0] and made.notices() == []
    below.probe.lost = 7
    assert "lost 2 waits" in made.notices()[0]
