from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import recorder_trace_processor
from recorder_samples import START_NS, incident

from latencyprism.agent.operator_ring import OperatorRecords
from latencyprism.recorder import Capture, read_capture, write_capture, write_raw
from latencyprism.recorder.blocks import Block
from latencyprism.recorder.operator_blocks import read_operators
from latencyprism.recorder.write import convert
from latencyprism.records import NULL
from latencyprism.records.operators import OPERATOR_DTYPE, Operators

NOT_HERE = recorder_trace_processor.missing()
NAMES = ["aten::linear", "aten::addmm", "aten::t"]


def calls(count: int, track: tuple[str, ...] = ("Worker 9", "operators (thread 9)")) -> Operators:
    """``count`` calls of linear, each with two others in it."""
    rows = np.zeros(3 * count, OPERATOR_DTYPE)
    begun = START_NS + 10_000 * np.arange(count)
    for inner, (after, length) in enumerate(((0, 9000), (1000, 3000), (4000, 5000))):
        rows["start_ns"][inner::3] = begun + after
        rows["end_ns"][inner::3] = begun + after + length
        rows["name"][inner::3] = inner
    rows["step"] = np.repeat(np.arange(count) // 50, 3)
    rows["step"][:3] = NULL
    return Operators(track, list(NAMES), rows)


def same(one: Operators, other: Operators) -> bool:
    return (
        (one.track, one.names, one.every) == (other.track, other.names, other.every)
        and len(one.rows) == len(other.rows)
        and all((one.rows[name] == other.rows[name]).all() for name in OPERATOR_DTYPE.names or ())
    )


def test_operators_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    capture = incident(30, 15)
    capture.operators = [calls(400), calls(3, ("Worker 9", "operators (thread 10)"))]
    write_capture(tmp_path / "a.pftrace", capture)
    back = read_capture(tmp_path / "a.pftrace")
    assert back.notices == []
    assert len(back.operators) == 2
    assert all(same(one, other) for one, other in zip(back.operators, capture.operators))


def test_a_thread_in_several_blocks_comes_back_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("latencyprism.recorder.operator_blocks._ROWS_PER_BLOCK", 100)
    write_capture(tmp_path / "a.pftrace", Capture(operators=[calls(400)]))
    [back] = read_capture(tmp_path / "a.pftrace").operators
    assert same(back, calls(400))


def test_a_call_takes_few_bytes(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    many = calls(100_000)
    many.rows["end_ns"][1::3] -= draw.integers(0, 2000, 100_000)
    many.rows["end_ns"][2::3] -= draw.integers(0, 3000, 100_000)
    size = write_capture(tmp_path / "a.pftrace", Capture(operators=[many]))
    assert size / len(many.rows) < 16


@pytest.mark.parametrize(
    "change",
    [
        {"rows": 7}, {"rows": -1}, {"rows": "3"}, {"every": 0}, {"names": ["one"]}, {"names": [1, 2, 3]},
        {"track": [1]}, {"columns": [["start_ns", "<i8"]]}, {"track": None}, {"names": None},
    ],
)  # fmt: skip
def test_a_block_that_lies_is_left_out(change: dict[str, object]) -> None:
    from latencyprism.recorder.operator_blocks import operator_blocks

    [block] = operator_blocks([calls(1)])
    with pytest.raises((ValueError, TypeError, KeyError)):
        read_operators(Block(block.kind, {**block.header, **change}, block.data))


def test_the_writing_process_makes_operators_of_raw_records(tmp_path: Path) -> None:
    rows: list[tuple[int, int, int, int]] = []
    for tick in range(0, 40, 4):
        rows += [(tick, 1, 0x7000, len(rows) + 1), (tick + 2, 0, 0x7001, len(rows) + 2)]
    half = len(rows) // 2
    chunks = [np.array(part, dtype=np.int64) for part in (rows[:half], rows[half:])]
    seen = OperatorRecords(
        9, chunks=chunks, names={1: "aten::mm"}, threads={0x7000: 12},
        readings=[(0, START_NS), (100, START_NS + 1000)],
    )  # fmt: skip
    capture = incident(30, 15)
    capture.operator_records = [("Worker 9", seen)]
    write_raw(tmp_path / "a.raw", capture)
    told = convert(str(tmp_path / "a.raw"), str(tmp_path / "a.pftrace"), None, 1.0)
    assert told["operators"] == 10
    back = read_capture(tmp_path / "a.pftrace")
    [found] = back.operators
    assert back.operator_records == [] and found.track == ("Worker 9", "operators (thread 12)")
    assert found.names == ["aten::mm"] or "aten::mm" in found.names
    assert (found.rows["end_ns"] - found.rows["start_ns"] == 20).all()


@pytest.mark.skipif(bool(NOT_HERE), reason=NOT_HERE)
def test_perfetto_draws_them_nested_under_their_process(tmp_path: Path) -> None:
    capture = incident(30, 15)
    capture.operators = [calls(400), calls(3, ("Worker 9", "operators (thread 10)"))]
    write_capture(tmp_path / "a.pftrace", capture)
    with recorder_trace_processor.opened(tmp_path / "a.pftrace") as processor:
        drawn = processor.query(
            "select p.pid, t.name, count(*) as n, min(s.ts) as begun, max(s.ts + s.dur) as ended, "
            "max(s.depth) as depth, min(s.dur) as shortest from slice s join process_track t on "
            "s.track_id = t.id join process p using(upid) where t.name like 'operators%' "
            "group by t.id order by n"
        )
        told = [(r.pid, r.name, r.n, r.begun, r.ended, r.depth, r.shortest) for r in drawn]
        names = processor.query(
            "select s.name, count(*) as n from slice s join track t on s.track_id = t.id "
            "where t.name like 'operators%' group by s.name order by s.name"
        )
        assert [(r.name, r.n) for r in names] == [(name, 403) for name in sorted(NAMES)]
    start, end = START_NS, START_NS + 399 * 10_000 + 9000
    assert told == [
        (9, "operators (thread 10)", 9, start, start + 29_000, 1, 3000),
        (9, "operators (thread 9)", 1200, start, end, 1, 3000),
    ]
