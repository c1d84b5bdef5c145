"""Collectives out of made-up operators of several workers: the truth is known, and must be found whatever
records were lost."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latencyprism.records import NULL, Step
from latencyprism.records.operators import OPERATOR_DTYPE, Operators
from latencyprism.timeline.collective_feed import feed_of, numbered, parts_of, several_ranks, summary
from latencyprism.timeline.collectives import CollectiveSpan, Operation, Place, join

US, MS = 1_000, 1_000_000
REDUCE, GATHER, OTHER = "_C::shm_allreduce", "_C::shm_all_gather", "aten::linear"
NAMES = [OTHER, REDUCE, GATHER]


def worker(rank: int) -> str:
    return f"Worker {rank} {700 + rank}" if rank else "Worker 700"


def operators(rank: int, calls: list[tuple[int, int, str]], names: list[str] = NAMES) -> Operators:
    rows = np.zeros(len(calls), OPERATOR_DTYPE)
    for at, (start_ns, end_ns, name) in enumerate(sorted(calls)):
        rows[at] = (start_ns, end_ns, NULL, names.index(name))
    return Operators((worker(rank), f"operators (thread {700 + rank})"), names, rows)


class World:
    """``truth``: when each rank came to each operation, and what it costs once all are there. Ranks leave a
    little after each other."""

    def __init__(self, seed: int, ranks: int, count: int, late: int | None = None) -> None:
        dice = random.Random(seed)
        self.ranks, self.workers = ranks, [worker(rank) for rank in range(ranks)]
        self.truth: list[tuple[list[int], int]] = []
        self.calls: list[list[tuple[int, int, str]]] = [[] for _ in range(ranks)]
        now = 10**12
        for number in range(count):
            came = [now + dice.randint(0, 300 * US) for _ in range(ranks)]
            if late is not None:
                came[late] = max(came) + dice.randint(1 * MS, 3 * MS)
            link = dice.randint(5 * US, 90 * US)
            done = max(came) + link
            leaving = [dice.randint(0, 20 * US) for _ in range(ranks)]
            leaving[dice.randrange(ranks)] = 0
            for rank in range(ranks):
                name = GATHER if number % 10 == 9 else REDUCE
                self.calls[rank].append((came[rank], done + leaving[rank], name))
                self.calls[rank].append((done + 25 * US, done + 30 * US, OTHER))
            self.truth.append((came, link))
            now = done + dice.randint(50 * US, 900 * US)

    def operators(self) -> list[Operators]:
        return [operators(rank, calls) for rank, calls in enumerate(self.calls)]


worlds = st.builds(World, st.integers(0, 1 << 30), st.integers(2, 5), st.integers(1, 40))


@settings(deadline=None, max_examples=60)
@given(worlds)
def test_every_operation_is_joined_with_its_waits_and_its_cost(world: World) -> None:
    feed = feed_of(world.operators(), world.workers)
    assert len(feed.operations) == len(world.truth)
    assert len(feed.spans) == world.ranks * len(world.truth)
    for operation, (came, link) in zip(feed.operations, world.truth):
        assert operation.complete and operation.link_ns == link
        assert operation.waited_ns() == {rank: max(came) - at for rank, at in enumerate(came)}
    assert [span.start_ns for span in feed.spans] == sorted(span.start_ns for span in feed.spans)
    assert {span.name for span in feed.spans} <= {"all_reduce", "all_gather"}


@settings(deadline=None, max_examples=80)
@given(worlds, st.data())
def test_lost_records_cost_their_own_operations_only(world: World, data: st.DataObject) -> None:
    """Nothing is matched wrongly, and what all ranks have is joined."""
    count = len(world.truth)
    gone = data.draw(st.lists(st.tuples(st.integers(0, world.ranks - 1), st.integers(0, count - 1))))
    calls = [
        [call for at, call in enumerate(own) if (rank, at // 2) not in gone or call[2] == OTHER]
        for rank, own in enumerate(world.calls)
    ]
    number_of = {came: number for number, (times, _) in enumerate(world.truth) for came in times}
    feed = feed_of([operators(rank, own) for rank, own in enumerate(calls)], world.workers)
    for operation in feed.operations:
        assert len({number_of[part.start_ns] for part in operation.parts.values()}) == 1
    whole = {number for number in range(count) if number not in {n for _, n in gone}}
    joined = {number_of[o.parts[0].start_ns] for o in feed.operations if o.complete}
    assert joined == whole


def test_the_late_rank_is_named_by_the_time_that_others_waited_for_it() -> None:
    world = World(3, 4, 50, late=2)
    steps = [Step("vllm", 0, 0, 9, 0, 10**13)]
    (told,) = summary(feed_of(world.operators(), world.workers, steps))
    assert told["waited_for"] == told["straggler"] == 2
    assert told["ranks"][0]["rank"] == 2 and told["ranks"][0]["last_share"] == 1.0
    assert {wait["for"] for wait in told["waits"]} == {2} and len(told["waits"]) == 3
    waited = sum(max(came) * 4 - sum(came) for came, _ in world.truth) / MS
    assert told["ranks"][0]["caused_ms"] == pytest.approx(waited)
    assert told["processes"]["2"] == "Worker 2 702" and told["missing"] == []
    assert told["kinds"] == {"all_reduce": 45, "all_gather": 5} and told["steps"] == 1
    assert told["longest"][0]["waited_for"] == 2 and told["longest"][0]["spread_ms"] > 2


def test_nobody_is_named_where_all_take_turns() -> None:
    world = World(4, 4, 200)
    (told,) = summary(feed_of(world.operators(), world.workers))
    assert told["waited_for"] is None and told["straggler"] is None


def test_spans_say_for_whom_they_waited_and_which_step_it_was() -> None:
    calls = [[(100, 900, REDUCE)], [(600, 905, REDUCE)]]
    step = Step("vllm", 0, 0, 7, 50, 1000)
    feed = feed_of([operators(rank, own) for rank, own in enumerate(calls)], [worker(0), worker(1)], [step])
    first, second = feed.spans
    assert first.track == ("Worker 700", "collectives") and first.step == second.step == 7
    assert dict(first.details) == {
        "communicator": "tp", "rank": 0, "operation": 0, "waited_ns": 500, "waited_for": "Worker 1 701",
    }  # fmt: skip
    assert dict(second.details)["waited_ns"] == 0 and "waited_for" not in dict(second.details)


def test_a_rank_that_was_not_seen_is_missing_and_no_wait_is_told() -> None:
    world = World(5, 3, 20)
    feed = feed_of(world.operators()[:2], world.workers)
    (told,) = summary(feed)
    assert told["missing"] == [2] and told["joined"] == 0 and told["link_us"] is None
    assert told["waits"] == [] and told["waited_for"] is None
    assert all("waited_ns" not in dict(span.details) for span in feed.spans)


def test_stages_of_a_pipeline_are_communicators_of_their_own() -> None:
    world = World(6, 2, 10)
    names = ["Worker 1", "Worker 1 2", "Worker 1000 3", "Worker 1001 4"]
    found = [one for _ in range(2) for one in world.operators()]
    for one, name in zip(found, names):
        one.track = (name, one.track[1])
    parts = parts_of(found, names)
    assert {(part.communicator, part.rank, part.size) for part in parts} == {
        ("tp", 0, 2), ("tp", 1, 2), ("tp pp 1", 0, 2), ("tp pp 1", 1, 2),
    }  # fmt: skip
    assert len({part.place.pid for part in parts}) == 4


def test_operators_that_only_enqueue_and_processes_that_are_no_workers_are_left_alone() -> None:
    names = ["c10d::allreduce_", "vllm::all_reduce", "_C::shm_allreduce.x"]
    one = operators(0, [(0, 5, names[0]), (6, 9, names[1]), (10, 20, names[2])], names)
    assert [(part.start_ns, part.kind) for part in parts_of([one], [worker(0)])] == [(10, "all_reduce")]
    assert parts_of([one], []) == []
    assert several_ranks(["Worker 7", "Worker 1 8"]) and several_ranks(["Worker 1 8", "Worker 2 9", "x"])
    assert not several_ranks(["EngineCore 6", "Worker 7"]) and not several_ranks(["engine 5"])


def met(rank: int, start_ns: int, end_ns: int, node: str = "") -> CollectiveSpan:
    return CollectiveSpan("c", rank, 2, "all_reduce", start_ns, end_ns, Place(node, rank), 0)


def test_who_is_held_up_before_it_leaves_has_waited_for_nobody() -> None:
    """Rank 0 came first, and was not let run until long after rank 1 had left."""
    held_up: Operation
    (held_up,) = join([met(0, 100, 9000), met(1, 300, 350)])
    assert held_up.last_rank == 1 and held_up.link_ns == 50
    assert held_up.waited_ns() == {0: 200, 1: 0} and held_up.spread_ns == 200
    (apart,) = join([met(0, 100, 9000, "a"), met(1, 300, 350, "b")])
    assert apart.waited_ns() == {0: 8850, 1: 0}  # without one clock only lengths tell


def test_parts_of_different_kinds_are_never_one_operation() -> None:
    parts = [met(0, 0, 100)._replace(sequence=None), met(1, 0, 100)._replace(sequence=None, kind="barrier")]
    assert len({part.sequence for part in numbered(parts)}) == 1 and len(list(numbered(parts))) == 1
