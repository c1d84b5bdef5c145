"""Known waits in known steps are found there, under their reason and culprit."""

from __future__ import annotations

import numpy as np
import pytest

from latencyprism.bench import attribution
from latencyprism.bpf.waits import INTERVAL_DTYPE, Intervals, Kind, syscall_number

LOOP, HOG = 10, 99


def interval(start: int, end: int, kind: Kind, **more: object) -> Intervals:
    record = np.zeros(1, INTERVAL_DTYPE)
    record["start_ns"], record["end_ns"], record["kind"], record["syscall"] = start, end, kind, -1
    record["tid"] = record["tgid"] = LOOP
    for name, value in more.items():
        record[name] = value
    return record


def test_the_score_counts_only_the_right_step_reason_and_culprit() -> None:
    told = [
        {"what": "preempted", "start_ns": 0, "end_ns": 100, "injected_ns": 50},
        {"what": "plain", "start_ns": 100, "end_ns": 200},
        {"what": "futex", "start_ns": 200, "end_ns": 300, "injected_ns": 40},
        {"what": "fsync", "start_ns": 300, "end_ns": 400, "injected_ns": 40},
        {"what": "faults", "start_ns": 400, "end_ns": 500, "major_faults": 4},
    ]
    fsync = syscall_number("fsync")
    intervals = np.concatenate([
        interval(10, 35, Kind.PREEMPTED, culprit_tgid=HOG),
        interval(40, 60, Kind.PREEMPTED, culprit_tgid=7),  # somebody else
        interval(110, 120, Kind.PREEMPTED, culprit_tgid=HOG),
        interval(190, 300, Kind.FUTEX),  # begins in the step before, lasts longer than injected
        interval(300, 340, Kind.SYSCALL, syscall=fsync),
        interval(450, 450, Kind.FAULTS, culprit_tid=3),
    ])  # fmt: skip
    result = attribution.score(told, intervals, LOOP, HOG)
    assert result["preempted"]["found_share"] == 0.5
    assert result["preempted"]["in_undisturbed_steps"] == 0.2
    assert result["futex"]["found_share"] == 1.0 and result["futex"]["in_undisturbed_steps"] == 0.25
    assert result["fsync"]["found_share"] == 1.0
    assert result["faults"]["found_share"] == 0.75 and result["faults"]["unit"] == "faults"
    assert result["least_found_share"] == 0.5


@pytest.mark.bpf
@pytest.mark.root
def test_injected_waits_are_found() -> None:
    result = attribution.run(20, 0, lambda _: None)
    assert result["lost"] == 0
    for what in ("preempted", "futex", "read", "fsync", "faults"):
        assert result[what]["found_share"] >= attribution.TARGET, (what, result)
    if "throttled" in result:
        assert result["throttled"]["found_share"] >= attribution.TARGET, result
    else:
        assert result["not_available"]
