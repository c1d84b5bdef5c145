"""Collectives of made-up ranks with skewed clocks: the truth is known, and must be found whatever the
clocks say."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latencyprism.timeline.collectives import (
    CollectiveSpan,
    Place,
    align,
    clock_difference,
    groups,
    join,
)
from latencyprism.timeline.communicators import Entry, match

US = 1000
MS = 1_000_000


class World:
    """``ranks`` on ``nodes`` in turn; each node's clock is off by its skew. The truth of each operation:
    when each rank arrived, and the link's cost."""

    def __init__(self, seed: int, ranks: int, nodes: int, operations: int, late: int | None = None) -> None:
        rng = random.Random(seed)
        self.skews = [0] + [rng.randint(-50 * MS, 50 * MS) for _ in range(nodes - 1)]
        self.ranks, self.nodes = ranks, nodes
        self.truth: list[tuple[list[int], int]] = []
        self.spans: list[CollectiveSpan] = []
        now = 1_000_000 * MS
        for number in range(operations):
            arrivals = [now + rng.randint(0, 400 * US) for _ in range(ranks)]
            if late is not None:
                arrivals[late] = max(arrivals) + rng.randint(300 * US, 900 * US)
            link = rng.randint(50 * US, 200 * US)
            end = max(arrivals) + link
            self.truth.append((arrivals, link))
            for rank, arrival in enumerate(arrivals):
                skew = self.skews[rank % nodes]
                place = Place(f"node{rank % nodes}", 100 + rank, 0)
                self.spans.append(
                    CollectiveSpan("c", rank, ranks, "all_reduce", arrival + skew, end + skew, place, number)
                )
            now = end + rng.randint(1 * MS, 9 * MS)


worlds = st.builds(
    World,
    seed=st.integers(0, 1 << 30),
    ranks=st.integers(2, 8),
    nodes=st.integers(1, 4),
    operations=st.integers(1, 30),
)


@settings(deadline=None, max_examples=60)
@given(worlds)
def test_waits_and_link_cost_are_right_whatever_the_clocks_say(world: World) -> None:
    operations = join(random.Random(3).sample(world.spans, len(world.spans)))
    assert len(operations) == len(world.truth)
    for operation, (arrivals, link) in zip(operations, world.truth):
        assert operation.complete and operation.link_ns == link
        assert operation.waited_ns() == {rank: max(arrivals) - at for rank, at in enumerate(arrivals)}
        assert arrivals[operation.last_rank] == max(arrivals)
        assert operation.spread_ns == max(arrivals) - min(arrivals)


@settings(deadline=None, max_examples=60)
@given(worlds)
def test_sums_of_waits_agree_from_both_sides(world: World) -> None:
    (group,) = groups(join(world.spans))
    caused, waited = sum(d.caused_ns for d in group.delays), sum(d.waited_ns for d in group.delays)
    assert caused == waited == sum(group.waits.values())
    assert sum(delay.last_share for delay in group.delays) == pytest.approx(1.0)
    assert group.missing == () and group.nodes == min(world.nodes, world.ranks)


@settings(deadline=None, max_examples=60)
@given(worlds)
def test_the_difference_of_two_clocks_lies_within_its_error(world: World) -> None:
    operations = join(world.spans)
    if min(world.nodes, world.ranks) < 2:
        assert clock_difference(operations, "node0", "node1") is None
        return
    found = clock_difference(operations, "node0", "node1")
    assert found is not None
    assert abs(found.offset_ns - world.skews[1]) <= found.error_ns
    assert abs(found.offset_ns - world.skews[1]) < 1 * MS


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 1 << 30),
    nodes=st.integers(1, 3),
    cut=st.lists(st.integers(0, 20), min_size=3, max_size=3),
)
def test_operations_without_numbers_are_matched_though_probes_came_at_different_times(
    seed: int, nodes: int, cut: list[int]
) -> None:
    world = World(seed, 3, nodes, 60)
    unnumbered = [
        span._replace(sequence=None) for span in world.spans if (span.sequence or 0) >= cut[span.rank]
    ]
    truth = {(s.rank, s.start_ns): s.sequence for s in world.spans}
    matched = 0
    for operation in join(unnumbered):
        numbers = {truth[part.rank, part.start_ns] for part in operation.parts.values()}
        assert len(numbers) == 1
        matched += operation.complete
    assert matched == 60 - max(cut)


def test_a_rank_of_another_rhythm_is_not_forced_into_operations() -> None:
    world, stranger = World(1, 2, 1, 40), World(2, 2, 1, 40)
    mine = [span for span in world.spans if span.rank == 0]
    other = [span._replace(start_ns=span.start_ns + 10**12, end_ns=span.end_ns + 10**12)
             for span in stranger.spans if span.rank == 1]  # fmt: skip
    assert align(mine, other) is None
    assert all(not o.complete for o in join([s._replace(sequence=None) for s in mine + other]))


def regular(rank: int, node: str, skew_ns: int) -> list[CollectiveSpan]:
    """Every 10 ms, without any unevenness."""
    times = [number * 10 * MS + skew_ns for number in range(50)]
    return [CollectiveSpan("c", rank, 2, "all_reduce", t, t + MS, Place(node, rank)) for t in times]


def test_a_regular_rhythm_between_unknown_clocks_is_not_guessed_but_a_bound_on_them_decides() -> None:
    reference, other = regular(0, "a", 0), regular(1, "b", 3 * MS)[7:]
    assert align(reference, other) is None
    assert align(reference, other, skew_ns=4 * MS) == 7
    assert sum(o.complete for o in join(reference + other, skew_ns=4 * MS)) == 43
    assert align(reference, regular(1, "a", 0)[7:]) == 7  # one clock: the moment itself decides


def test_a_straggler_is_told_with_its_place_and_nobody_where_all_take_turns() -> None:
    (group,) = groups(join(World(5, 4, 2, 50, late=2).spans))
    worst = group.straggler()
    assert worst is not None and worst.rank == 2 and worst.place == Place("node0", 102, 0)
    assert worst.last_share == 1.0 and worst.waited_ns == 0
    assert {culprit for _, culprit in group.waits} == {2}
    (calm,) = groups(join(World(5, 4, 2, 200).spans))
    assert calm.straggler() is None


def test_a_slow_link_raises_the_link_and_not_the_spread() -> None:
    world = World(7, 4, 2, 30)
    slow = [span._replace(end_ns=span.end_ns + 5 * MS) for span in world.spans]
    (before,), (after,) = groups(join(world.spans)), groups(join(slow))
    assert before.link_ns is not None and after.link_ns == before.link_ns + 5 * MS
    assert after.spread_ns == before.spread_ns


def test_what_was_not_seen_is_said() -> None:
    world = World(3, 4, 1, 10)
    seen = [span for span in world.spans if span.rank != 3]
    operations = join(seen)
    assert not any(operation.complete for operation in operations)
    (group,) = groups(operations)
    assert group.missing == (3,) and group.complete == 0
    assert group.link_ns is group.spread_ns is group.straggler() is None


def test_kinds_that_do_not_meet_are_joined_but_not_judged() -> None:
    spans = [span._replace(kind="broadcast") for span in World(3, 4, 1, 10).spans]
    (group,) = groups(join(spans))
    assert group.operations == 10 and group.complete == 0 and group.link_ns is None


def test_a_clock_that_was_stepped_gives_no_difference() -> None:
    world = World(4, 2, 2, 20)
    stepped = [
        span._replace(start_ns=span.start_ns + 10**9, end_ns=span.end_ns + 10**9)
        if span.rank == 1 and (span.sequence or 0) > 10
        else span
        for span in world.spans
    ]
    assert clock_difference(join(stepped), "node0", "node1") is None


def test_impossible_spans_are_left_out() -> None:
    place = Place("node0", 1)
    backwards = CollectiveSpan("c", 0, 2, "barrier", 10, 5, place, 0)
    beyond = CollectiveSpan("c", 7, 2, "barrier", 0, 5, place, 0)
    assert join([backwards, beyond]) == []


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 1 << 30), size=st.integers(1, 6), count=st.integers(1, 4), nodes=st.integers(1, 3))
def test_communicators_are_joined_by_when_their_ranks_joined(
    seed: int, size: int, count: int, nodes: int
) -> None:
    rng = random.Random(seed)
    skews = [rng.randint(-2 * MS, 2 * MS) for _ in range(nodes)]
    entries, truth, now = [], {}, 0
    for number in range(count):
        arrivals = [now + rng.randint(0, 5 * MS) for _ in range(size)]
        for rank, at in enumerate(arrivals):
            place = Place(f"node{rank % nodes}", 100 + rank)
            end = max(arrivals) + rng.randint(1, 100) * US
            skew = skews[rank % nodes]
            entry = Entry(place, rng.getrandbits(40), rank, size, at + skew, end + skew)
            entries.append(entry)
            truth[place, entry.handle] = number
        now = max(arrivals) + 100 * MS
    rng.shuffle(entries)
    names = match(entries, skew_ns=4 * MS)
    by_number: dict[int, set[str]] = {}
    for key, number in truth.items():
        by_number.setdefault(number, set()).add(names[key])
    assert all(len(found) == 1 for found in by_number.values())
    assert len({name for found in by_number.values() for name in found}) == count
