from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latencyprism.agent.operator_ring import OperatorRecords
from latencyprism.records import NULL, Step
from latencyprism.timeline.operators import BY_A_STRING, operators_of

Row = tuple[int, int, int, int]
THREADS = (0x7000, 0x8000)


def seen_as(rows: list[Row], **told: object) -> OperatorRecords:
    """One tick is two nanoseconds, from 1,000,000 ns on."""
    table = np.array(rows, dtype=np.int64).reshape(-1, 4)
    last = int(table[-1, 0]) + 10 if len(table) else 10
    return OperatorRecords(
        7, chunks=[table], names={1: "aten::a.x", 2: "aten::b"}, threads={0x7000: 71},
        readings=[(0, 1_000_000), (last, 1_000_000 + 2 * last)], **told,  # type: ignore[arg-type]
    )  # fmt: skip


def step(number: int, start_ns: int, end_ns: int) -> Step:
    return Step(engine="vllm", replica=0, rank=0, step=number, start_ns=start_ns, end_ns=end_ns)


@st.composite
def programs(draw: st.DrawFn) -> tuple[list[Row], list[tuple[int, int, int, int]]]:
    """Records of two threads that call and return at random, and the calls that came to their end: (thread,
    schema, start, end in ticks)."""
    stacks: dict[int, list[tuple[int, int]]] = {thread: [] for thread in THREADS}
    rows: list[Row] = []
    calls = []
    for tick, (thread, begins, schema) in enumerate(
        draw(st.lists(st.tuples(st.sampled_from(THREADS), st.booleans(), st.sampled_from([0, 1, 2])))), 1
    ):
        stack = stacks[thread]
        if begins or not stack:
            stack.append((schema, tick))
            rows.append((tick, schema, thread, len(rows) + 1))
        else:
            begun_schema, begun = stack.pop()
            calls.append((thread, begun_schema, begun, tick))
            rows.append((tick, 0, thread | 1, len(rows) + 1))
    return rows, calls


@settings(deadline=None)
@given(programs())
def test_every_whole_call_is_found_with_its_own_end(program: tuple[list[Row], list[Row]]) -> None:
    rows, calls = program
    found = operators_of(seen_as(rows), "Worker 7", []) if rows else []
    names = {0: BY_A_STRING, 1: "aten::a.x", 2: "aten::b"}
    for thread in THREADS:
        wanted = sorted((b, e, names[s]) for t, s, b, e in calls if t == thread)
        own = [one for one in found if ("71" in one.track[1]) == (thread == 0x7000)]
        got = [
            ((row["start_ns"] - 1_000_000) / 2, (row["end_ns"] - 1_000_000) / 2, one.names[row["name"]])
            for one in own
            for row in one.rows
        ]
        assert got == wanted


@settings(deadline=None)
@given(programs(), st.sets(st.integers(0, 60)))
def test_around_a_loss_nothing_is_matched_wrongly(
    program: tuple[list[Row], list[Row]], lost: set[int]
) -> None:
    rows, calls = program
    left = [row for place, row in enumerate(rows) if place not in lost]
    if not left:
        return
    true = {(1_000_000 + 2 * begun, 1_000_000 + 2 * ended) for _, _, begun, ended in calls}
    for one in operators_of(seen_as(left), "Worker 7", []):
        assert {(row["start_ns"], row["end_ns"]) for row in one.rows} <= true


def flat(count: int) -> list[Row]:
    rows: list[Row] = []
    for call in range(count):
        rows.append((10 * call + 1, 1, 0x7000, len(rows) + 1))
        rows.append((10 * call + 2, 0, 0x7001, len(rows) + 1))
    return rows


def test_a_call_belongs_to_the_step_in_whose_time_it_began() -> None:
    steps = [step(4, 1_000_000, 1_000_040), step(5, 1_000_060, 1_000_100)]
    [found] = operators_of(seen_as(flat(6)), "Worker 7", steps)
    assert found.rows["step"].tolist() == [4, 4, NULL, 5, 5, NULL]
    assert found.track == ("Worker 7", "operators (thread 71)") and found.every == 1


def test_too_many_calls_are_thinned_by_whole_steps_and_that_is_told() -> None:
    steps = [step(n, 1_000_000 + 40 * n, 1_000_040 + 40 * n) for n in range(10)]  # two calls a step
    [found] = operators_of(seen_as(flat(20)), "Worker 7", steps, most=7)
    assert found.every == 3
    assert found.rows["step"].tolist() == [0, 0, 3, 3, 6, 6, 9, 9]


@pytest.mark.parametrize("readings", [[], [(5, 10)]])
def test_without_two_readings_of_the_clock_there_is_nothing(readings: list[tuple[int, int]]) -> None:
    seen = seen_as(flat(2))
    seen.readings = readings
    assert operators_of(seen, "Worker 7", []) == []
