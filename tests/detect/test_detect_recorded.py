"""Recorded streams: a calm GPU engine, a restless virtual machine, the same with a neighbour."""

from __future__ import annotations

import csv
import gzip
import random

import pytest
from detect_streams import recorded, steady

from latencyprism.detect import Detector
from latencyprism.detect.graded import GRADES, Event, Fault, Score, grade, judge, place, spoil
from latencyprism.detect.steplog import StepLog


def test_a_restless_machine_is_not_paged() -> None:
    detector = Detector()
    found = [detector.observe(step) for step in StepLog(recorded("vllm_cpu_normal.csv.gz"), "vllm-probe")]
    assert not [f for f in found if f is not None and f.level == "page"]


def test_a_neighbour_on_the_core_is_paged_soon() -> None:
    path = recorded("vllm_cpu_neighbour.csv.gz")
    with gzip.open(path, "rt") as table:
        phases = [row["phase"] for row in csv.DictReader(table)]
    detector = Detector()
    found = [f for step in StepLog(path, "vllm-probe") if (f := detector.observe(step)) is not None]
    paged = [f.step for f in found if f.level == "page"]
    slow = 580  # the first step that the neighbour slowed
    assert phases[slow] == "during"
    assert slow <= paged[0] <= slow + 20
    assert all(phases[step] == "during" for step in paged if step < phases.index("after"))


def test_stalls_on_the_restless_machine_are_told() -> None:
    steps = list(StepLog(recorded("vllm_cpu_normal.csv.gz"), "vllm-probe"))
    where = [at for at in range(600, 4200, 97) if not steps[at].prefill_tokens]
    for at in where:
        steps[at] = steps[at]._replace(end_ns=steps[at].end_ns + 50_000_000)
    detector = Detector()
    told = {f.step for step in steps if (f := detector.observe(step)) is not None}
    assert len(told & set(where)) >= 0.9 * len(where)


def test_graded_faults_on_the_calm_engine() -> None:
    log = StepLog(recorded("decode_vllm.csv.gz"), "latencyprism-artefact")
    steps = list(log)
    faults = [fault for fault in GRADES if fault.name in ("mult_0.1", "mult_0.3", "stall_50")]
    result = grade(steps, log.stretches, faults=faults, splits=2, placements=1)
    rows = result["faults"]
    assert isinstance(rows, dict)
    assert rows["mult_0.1"]["evidence"]["recall"] > 0.95
    assert rows["mult_0.3"]["page"]["f1"] > 0.95
    assert rows["stall_50"]["evidence"]["f1"] > 0.97


def test_grading_is_reproducible_and_counts_right() -> None:
    steps = list(steady(2400, sd=0.01))
    jobs = [f"job{number // 200}" for number in range(2400)]
    faults = [Fault("mult", 0.3), Fault("stall", 50.0)]
    first = grade(steps, jobs, faults=faults, splits=1, placements=1, seed=3)
    again = grade(steps, jobs, faults=faults, splits=1, placements=1, seed=3)
    assert first["faults"] == again["faults"]
    score = Score()
    judge([5, 100, 111, 300, 320, 400], [Event(100, 110)], score)
    assert (score.events, score.found, score.false_episodes, score.lags) == (1, 1, 3, [0])


@pytest.mark.parametrize("fault", GRADES, ids=lambda fault: fault.name)
def test_faults_change_times_only_where_they_are_put(fault: Fault) -> None:
    steps = list(steady(1500))
    events = place(fault, len(steps), random.Random(1))
    assert events
    inside = {at for start, end in events for at in range(start, end + 1)}
    spoiled = spoil(steps, fault, events)
    for at, (clean, bad) in enumerate(zip(steps, spoiled)):
        assert bad._replace(end_ns=clean.end_ns) == clean
        assert bad.end_ns >= clean.end_ns
        assert at in inside or bad.end_ns == clean.end_ns
