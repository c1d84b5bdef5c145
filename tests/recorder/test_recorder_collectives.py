from __future__ import annotations

from itertools import count
from pathlib import Path

import numpy as np
import pytest
import recorder_trace_processor

from latencyprism.agent.operator_ring import OperatorRecords
from latencyprism.faces import collective_words, story
from latencyprism.recorder import Capture, read_capture, write_raw
from latencyprism.recorder.write import convert
from latencyprism.records import Span, Step

NOT_HERE = recorder_trace_processor.missing()
STEPS, OPERATIONS = 6, 3
STEP_NS, LATE_NS, LINK_NS = 1_000_000, 60_000, 10_000
NAMES = {1: "_C::shm_allreduce", 2: "aten::mm"}


def records(pid: int, late: bool) -> OperatorRecords:
    """Three operations a step, each begun 100 us after the one before; who is late comes 60 us later. A tick
    is a nanosecond."""
    rows: list[tuple[int, int, int, int]] = []
    sequence = count(1)
    for step in range(STEPS):
        for number in range(OPERATIONS):
            met = step * STEP_NS + 300_000 + number * 100_000
            for schema, start, end in (
                (2, met - 20_000, met - 10_000),
                (1, met + late * LATE_NS, met + LATE_NS + LINK_NS),
            ):
                rows += [(start, schema, 0x7000, next(sequence)), (end, 0, 0x7001, next(sequence))]
    return OperatorRecords(
        pid, chunks=[np.array(rows, dtype=np.int64)], names=NAMES, threads={0x7000: pid},
        readings=[(0, 0), (STEPS * STEP_NS, STEPS * STEP_NS)],
    )  # fmt: skip


def recording(lost: int = 0) -> Capture:
    steps, spans = [], []
    for number in range(STEPS):
        start = number * STEP_NS
        steps.append(
            Step("vllm", 0, 0, number, start, start + 900_000, "decode", schedule_ns=50_000, update_ns=50_000)
        )
        for rank, worker in enumerate(("Worker 11", "Worker 1 12")):
            spans.append(Span((worker,), "execute_model", start + 100_000, start + 800_000 + rank))
    meta = {"roles": {"11": "Worker", "12": "Worker 1", "10": "EngineCore"}, "operators": {"lost": lost}}
    found = [("Worker 11", records(11, late=False)), ("Worker 1 12", records(12, late=True))]
    return Capture(meta=meta, steps=steps, spans=spans, operator_records=found)


def written(folder: Path, capture: Capture) -> Capture:
    write_raw(folder / "a.raw", capture)
    convert(str(folder / "a.raw"), str(folder / "a.pftrace"), None, 1.0)
    return read_capture(folder / "a.pftrace")


def test_a_capture_of_several_ranks_says_who_waited_for_whom(tmp_path: Path) -> None:
    back = written(tmp_path, recording())
    assert back.notices == []
    (told,) = back.meta["collectives"]
    assert told["joined"] == told["operations"] == STEPS * OPERATIONS and told["steps"] == STEPS
    assert told["waited_for"] == 1 and told["link_us"] == 10.0 and told["spread_us"] == 60.0
    assert told["waits"] == [{"rank": 0, "for": 1, "ms": STEPS * OPERATIONS * LATE_NS / 1e6}]
    met = [span for span in back.spans if span.track[-1] == "collectives"]
    assert len(met) == 2 * STEPS * OPERATIONS
    words = "\n".join(story.tell(back, "a.pftrace", 0))
    assert "COLLECTIVES of 2 ranks (tp): 18 all_reduce in 6 steps" in words
    assert "rank 1 (Worker 1 12) came last in 100% of 18; the other waited 0.18 ms a step for it" in words
    assert "So 100% of all waiting was for rank 1 (Worker 1 12)." in words
    assert len(back.operators) == 2  # they are drawn as they were


def test_steps_within_the_window_have_their_time_in_collectives_and_others_null(tmp_path: Path) -> None:
    """The first and the last step reach beyond the first and the last operation: not all of them is known.
    Rank 1 ended last: of its time in them nothing is waiting."""
    back = written(tmp_path, recording())
    assert [step.collective_ns for step in back.steps] == [
        None, *[OPERATIONS * LINK_NS] * (STEPS - 2), None
    ]  # fmt: skip
    told = "\n".join(story.tell_step(back, 2))
    assert "collective " in told and "collective_wait" not in told


def test_where_records_were_lost_no_step_is_said_to_be_known(tmp_path: Path) -> None:
    back = written(tmp_path, recording(lost=2))
    assert {step.collective_ns for step in back.steps} == {None}
    assert back.meta["collectives"][0]["joined"] == STEPS * OPERATIONS


def test_one_rank_alone_has_no_collectives(tmp_path: Path) -> None:
    capture = recording()
    del capture.operator_records[1]
    back = written(tmp_path, capture)
    assert "collectives" not in back.meta and len(back.operators) == 1
    assert list(collective_words.tell(back)) == []


def test_a_failing_feed_never_costs_the_capture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr("latencyprism.recorder.write.add_collectives", broken)
    back = written(tmp_path, recording())
    assert back.meta["not_available"] == ["collectives: RuntimeError: no"] and len(back.operators) == 2


@pytest.mark.parametrize(
    "told",
    [
        "x", [1], [{}], [{"size": "many", "joined": 3, "ranks": [{}, 7], "waited_for": "\x1b[2J"}],
        [{"kinds": {"a": "b"}, "missing": ["\x1b"], "joined": 2, "size": -1, "ranks": {"a": 1}}],
        [{"size": 2, "joined": 1, "steps": 1, "link_us": float("nan"), "spread_us": 1e300, "ranks": [
            {"rank": None, "caused_ms": "much", "last_share": True}], "processes": [3]}],
    ],
)  # fmt: skip
def test_what_a_hostile_file_says_is_told_or_passed_over(told: object) -> None:
    words = "\n".join(collective_words.tell(Capture(meta={"collectives": told})))
    assert "\x1b" not in words


@pytest.mark.skipif(bool(NOT_HERE), reason=NOT_HERE)
def test_flows_lead_from_rank_to_rank(tmp_path: Path) -> None:
    written(tmp_path, recording())
    with recorder_trace_processor.opened(tmp_path / "a.pftrace") as processor:
        rows = processor.query(
            "select a.name as one, b.name as other, tp.upid != tq.upid as apart, count(*) as n from flow "
            "join slice a on flow.slice_out = a.id join slice b on flow.slice_in = b.id "
            "join process_track p on a.track_id = p.id join process tp using(upid) "
            "join process_track q on b.track_id = q.id join process tq on tq.upid = q.upid "
            "where a.name = 'all_reduce' group by 1, 2, 3"
        )
        drawn = [(row.one, row.other, row.apart, row.n) for row in rows]
    assert drawn == [("all_reduce", "all_reduce", 1, STEPS * OPERATIONS)]
