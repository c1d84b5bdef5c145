"""Ranks beside each other: runs of one batch put together, and who became a straggler."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest

from latencyprism.detect.rank_groups import RankGroup, RankGroups, group_of
from latencyprism.detect.straggler import BLOCK, IN_A_ROW, LEAST_LEARNED, Straggler, StragglerTest

MS = 1_000_000


def group(at_ms: float, *runs: tuple[float, float]) -> RankGroup:
    """``runs``: begin and end of each rank, ms after ``at_ms``."""
    return group_of([(int((at_ms + a) * MS), int((at_ms + b) * MS)) for a, b in runs])


def test_a_rank_that_returns_later_is_longer() -> None:
    found = group(100, (0, 12), (0, 31))
    assert (found.behind_ns(0), found.behind_ns(1)) == (0, 19 * MS)


def test_a_rank_that_waits_for_one_that_begins_late_is_not_blamed() -> None:
    """Both end together, so the first one's call is the longer one."""
    found = group(100, (0, 31), (19, 31))
    assert found.execute_ns == (31 * MS, 12 * MS)
    assert (found.behind_ns(0), found.behind_ns(1)) == (0, 19 * MS)


def test_ranks_that_wait_for_each_other_in_between_are_not_behind() -> None:
    found = group(100, (0, 31), (0, 31))
    assert (found.behind_ns(0), found.behind_ns(1)) == (0, 0)


def test_runs_pair_whatever_order_they_are_read_in() -> None:
    groups = RankGroups([0, 1])
    assert [groups.take(0, at, at + 5) for at in (0, 10, 20)] == [None] * 3
    found = [groups.take(1, at + 1, at + 5) for at in (0, 10, 20)]
    assert [one and one.start_ns for one in found] == [0, 10, 20]
    assert groups.dropped == 0


def test_a_lost_run_costs_one_group_and_no_more() -> None:
    groups = RankGroups([0, 1])
    found = []
    for number in range(20):
        at = number * 1000
        found.append(groups.take(0, at, at + 500))
        if number != 7:
            found.append(groups.take(1, at + 20, at + 510))
    whole = [one for one in found if one is not None]
    assert len(whole) >= 18
    assert all(one.late_ns == (0, 20) for one in whole if one.start_ns > 8000)
    assert groups.dropped == 1


def stream(behind: Callable[[int], float], count: int, seed: int = 3) -> list[Straggler]:
    """Rank 1 of two is behind by that part of a run, on a restless machine."""
    test, told = StragglerTest(2), []
    chance = random.Random(seed)
    for number in range(count):
        took = 12.0 * chance.uniform(0.8, 1.3)
        late = took * behind(number) + abs(chance.gauss(0.0, 0.4))
        told += test.feed(group(number * 40.0, (0, took), (0, took + late)))
    return told


LEARNED = BLOCK * (LEAST_LEARNED + 4)


def test_a_rank_that_stays_behind_is_told_once() -> None:
    (found,) = stream(lambda number: 0.3 if number >= LEARNED else 0.02, LEARNED + BLOCK * 12)
    assert found.place == 1
    assert found.share == pytest.approx(0.32, abs=0.06) and found.usual_share < 0.08
    assert found.longer_ns > found.late_ns
    assert found.onset_ns == pytest.approx(LEARNED * 40 * MS, abs=BLOCK * 40 * MS)


def test_a_rank_that_was_behind_from_the_first_is_as_usual() -> None:
    assert stream(lambda number: 0.3, LEARNED + BLOCK * 12) == []


def test_stalls_and_a_short_spell_are_no_straggler() -> None:
    def behind(number: int) -> float:
        spell = LEARNED <= number < LEARNED + BLOCK * (IN_A_ROW - 1)
        return 9.0 if number % 5 == 0 else 0.4 if spell else 0.02

    assert stream(behind, LEARNED + BLOCK * 20) == []


@pytest.mark.parametrize("seed", range(20))
def test_a_restless_machine_alone_makes_none(seed: int) -> None:
    assert stream(lambda number: 0.05, 3000, seed) == []


def test_told_again_after_it_had_recovered() -> None:
    def behind(number: int) -> float:
        return 0.3 if number // (BLOCK * 12) % 2 else 0.02

    assert len(stream(behind, BLOCK * 12 * 4)) == 2


def test_it_costs_little() -> None:
    groups, test = RankGroups([0, 1, 2, 3]), StragglerTest(4)
    best = float("inf")
    for _ in range(5):
        begun = time.perf_counter()
        for number in range(BLOCK * 20):
            for rank in range(4):
                found = groups.take(rank, number * 1000, number * 1000 + 500 + rank)
                if found is not None:
                    test.feed(found)
        best = min(best, (time.perf_counter() - begun) / (BLOCK * 20 * 4))
    assert best < 10e-6
