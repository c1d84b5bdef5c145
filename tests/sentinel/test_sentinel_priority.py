"""Real time for short work, given back in the end, also where one block lies in another."""

from __future__ import annotations

import os

import pytest

from latencyprism.sentinel.priority import OnTime


def policy() -> int:
    return os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK


@pytest.mark.root
def test_an_inner_block_leaves_the_outer_one_as_it_is() -> None:
    before = policy()
    with OnTime() as outer:
        if not outer.active:
            pytest.skip("real time is not permitted here")
        assert policy() == os.SCHED_RR
        with OnTime() as inner:
            assert policy() == os.SCHED_RR and not inner.active
        assert policy() == os.SCHED_RR
    assert policy() == before
    with OnTime() as later:
        assert later.active
    assert policy() == before


def test_not_wanted_changes_nothing() -> None:
    before = policy()
    with OnTime(False) as block:
        assert policy() == before and not block.active


@pytest.mark.root
def test_children_are_ordinary() -> None:
    with OnTime() as block:
        if not block.active:
            pytest.skip("real time is not permitted here")
        child = os.fork()
        if child == 0:
            os._exit(policy())
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == os.SCHED_OTHER
