"""Waits and steps joined: split where a wait spans several, nothing counted twice, nothing left out."""

from __future__ import annotations

import numpy as np
import pytest

from latencyprism.bpf.waits import INTERVAL_DTYPE, TOTALS_DTYPE, Intervals, Kind
from latencyprism.records import Step
from latencyprism.timeline.attribution import API, LOOP, OTHER, WORKER, Attribution, Roles, by_step, to_spans

LOOP_TID, WORKER_TID, API_TID = 10, 20, 30
ROLES = Roles.of({10: "EngineCore", 20: "Worker", 21: "Worker 1", 30: API})
MS = 1_000_000


def interval(start: int, end: int, kind: Kind, tid: int = LOOP_TID, **more: object) -> Intervals:
    record = np.zeros(1, INTERVAL_DTYPE)
    record["start_ns"], record["end_ns"], record["kind"] = start, end, kind
    record["tid"], record["tgid"], record["syscall"] = tid, tid, -1
    for name, value in more.items():
        record[name] = value
    return record


def totals(**ns: int) -> np.void:
    row = np.zeros(1, TOTALS_DTYPE)
    for name, value in ns.items():
        row["ns"][0][Kind[name.upper()]] = value
    found: np.void = row[0]
    return found


def step(number: int, start: int, end: int) -> Step:
    return Step("e", 0, 0, number, start, end)


def joined(*intervals: Intervals) -> Attribution:
    attribution = Attribution(ROLES, 0)
    attribution.update(1, {}, np.concatenate(intervals) if intervals else np.empty(0, INTERVAL_DTYPE))
    return attribution


def test_roles_of_threads() -> None:
    assert ROLES.loop == {10} and ROLES.workers == {20, 21}
    assert [ROLES.of_thread(*ids) for ids in ((10, 10), (20, 20), (11, 10), (30, 30), (31, 30))] == [
        LOOP, WORKER, OTHER, API, API,
    ]  # fmt: skip
    assert Roles.of({10: "engine"}, loop=[17]).of_thread(17, 10) == LOOP
    assert Roles.of({10: "engine"}, loop=[17]).of_thread(10, 10) == OTHER


def test_a_wait_over_two_steps_is_split_between_them() -> None:
    first, second, third = joined(interval(50, 130, Kind.PREEMPTED)).fill(
        [step(1, 0, 100), step(2, 110, 200), step(3, 200, 300)]
    )
    assert (first.runqueue_ns, second.runqueue_ns, third.runqueue_ns) == (50, 20, 0)
    assert (first.offcpu_ns, first.throttled_ns, first.major_faults) == (0, 0, 0)


def test_each_kind_goes_to_its_column() -> None:
    (filled,) = joined(
        interval(0, 10, Kind.QUEUED),
        interval(10, 20, Kind.YIELDED),
        interval(20, 50, Kind.FUTEX),
        interval(50, 55, Kind.READ),
        interval(60, 67, Kind.THROTTLED),
        interval(70, 71, Kind.SOFTIRQ),
        interval(71, 71, Kind.FAULTS, culprit_tid=3),
    ).fill([step(1, 0, 100)])
    assert (filled.runqueue_ns, filled.offcpu_ns, filled.throttled_ns, filled.major_faults) == (20, 35, 7, 3)


def test_faults_without_a_sleep_go_to_the_step_that_has_most_of_their_time_whoever_asks() -> None:
    faults = interval(60, 110, Kind.FAULTS, culprit_tid=4)
    first, second = step(1, 0, 100), step(2, 100, 200)
    assert [s.major_faults for s in joined(faults).fill([first, second])] == [4, 0]
    apart = joined(faults)
    assert [apart.fill([s])[0].major_faults for s in (first, second)] == [4, 0]


def test_a_step_waits_for_its_slowest_worker_and_sleeps_meanwhile() -> None:
    (filled,) = joined(
        interval(0, 10, Kind.PREEMPTED),
        interval(10, 90, Kind.FUTEX),
        interval(20, 25, Kind.PREEMPTED, WORKER_TID),
        interval(20, 60, Kind.PREEMPTED, 21),
        interval(0, 100, Kind.SLEEP, WORKER_TID),
        interval(0, 100, Kind.PREEMPTED, API_TID),
    ).fill([step(1, 0, 100)])
    assert (filled.runqueue_ns, filled.offcpu_ns) == (50, 80)


def test_before_the_probe_nothing_is_known_and_null_stays_null() -> None:
    attribution = Attribution(ROLES, 50)
    old, new = attribution.fill([step(1, 40, 60), step(2, 60, 80)])
    assert (old.runqueue_ns, old.offcpu_ns, old.major_faults) == (None, None, None)
    assert (new.runqueue_ns, new.offcpu_ns, new.major_faults) == (0, 0, 0)


def test_short_waits_come_from_the_totals_spread_over_the_time_between_readings() -> None:
    attribution = Attribution(ROLES, 0)
    # Of 50 us preempted until 100 us, 30 us are a record; 20 us of short waits remain.
    attribution.update(100, {LOOP_TID: totals(preempted=50)}, interval(10, 40, Kind.PREEMPTED))
    first, second = attribution.fill([step(1, 0, 50), step(2, 50, 100)])
    assert (first.runqueue_ns, second.runqueue_ns) == (40, 10)
    attribution.update(200, {LOOP_TID: totals(preempted=50)}, np.empty(0, INTERVAL_DTYPE))
    (third,) = attribution.fill([step(3, 100, 200)])
    assert third.runqueue_ns == 0


def test_a_record_newer_than_the_totals_is_counted_once() -> None:
    attribution = Attribution(ROLES, 0)
    attribution.update(100, {LOOP_TID: totals(futex=0)}, interval(60, 99, Kind.FUTEX))
    attribution.update(200, {LOOP_TID: totals(futex=39)}, np.empty(0, INTERVAL_DTYPE))
    first, second = attribution.fill([step(1, 0, 100), step(2, 100, 200)])
    assert (first.offcpu_ns, second.offcpu_ns) == (39, 0)


def test_records_that_were_lost_are_still_in_the_sum() -> None:
    attribution = Attribution(ROLES, 0)
    attribution.update(100 * MS, {LOOP_TID: totals(futex=40 * MS)}, np.empty(0, INTERVAL_DTYPE))
    assert [s.offcpu_ns for s in attribution.fill([step(1, 0, 50 * MS), step(2, 50 * MS, 100 * MS)])] == [
        20 * MS, 20 * MS,
    ]  # fmt: skip


def test_by_step_names_role_reason_and_culprit() -> None:
    waits = by_step(
        [step(7, 0, 100), step(8, 100, 200)],
        np.concatenate([
            interval(90, 150, Kind.PREEMPTED, culprit_tid=99, culprit_tgid=98, culprit=b"hog\x1b"),
            interval(150, 160, Kind.SYNC, API_TID, syscall=74),
            interval(300, 400, Kind.FUTEX),
        ]),
        ROLES,
    )  # fmt: skip
    assert [(w.step, w.role, w.kind, w.ns) for w in waits] == [
        (7, LOOP, Kind.PREEMPTED, 10), (8, LOOP, Kind.PREEMPTED, 50), (8, API, Kind.SYNC, 10),
    ]  # fmt: skip
    assert (waits[0].culprit_pid, waits[0].culprit) == (98, "hog?")


@pytest.mark.parametrize(("starts", "ends"), [((0, 100), (100, 200)), ((0, 120), (80, 200))])
def test_by_step_loses_nothing_inside_steps(starts: tuple[int, int], ends: tuple[int, int]) -> None:
    steps = [step(n, start, end) for n, (start, end) in enumerate(zip(starts, ends))]
    generator = np.random.default_rng(0)
    begun = generator.integers(0, 180, 50)
    pieces = [interval(int(b), int(b) + 15, Kind.FUTEX) for b in begun]
    waits = by_step(steps, np.concatenate(pieces), ROLES)
    inside = sum(max(0, min(int(b) + 15, s.end_ns) - max(int(b), s.start_ns)) for b in begun for s in steps)
    assert sum(wait.ns for wait in waits) == inside


def test_spans_speak_the_words_of_the_rest() -> None:
    spans = to_spans(
        np.concatenate([
            interval(0, 10, Kind.PREEMPTED, culprit_tid=99, culprit_tgid=98, culprit=b"hog"),
            interval(10, 20, Kind.QUEUED),
            interval(20, 30, Kind.THROTTLED),
            interval(30, 40, Kind.FUTEX, syscall=-1, culprit_tgid=5, culprit=b"waker"),
            interval(40, 50, Kind.SOFTIRQ, value=3),
            interval(50, 60, Kind.RECLAIM),
            interval(60, 61, Kind.STOPPED),
            interval(61, 61, Kind.OOM),
        ]),
        {LOOP_TID: "engine"},
    )  # fmt: skip
    assert [(span.track[1], span.name) for span in spans] == [
        ("sched", "run-queue (after 98 hog)"), ("sched", "run-queue (after idle)"),
        ("sched", "run-queue (throttled)"), ("sched", "off-CPU (futex)"),
        ("interrupts", "softirq 3"), ("memory", "reclaim"), ("sched", "off-CPU (stopped)"),
    ]  # fmt: skip
    assert {span.track[0] for span in spans} == {"engine 10"}
    assert dict(spans[0].details) == {"preempted_by": 98, "preempted_by_comm": "hog"}
    assert dict(spans[3].details) == {"woken_by": 5, "woken_by_comm": "waker"}
