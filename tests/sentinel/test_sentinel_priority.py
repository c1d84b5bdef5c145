"""Real time for short work, given back in the end, also where one block lies in another."""

from __future__ import annotations

import os
import time

import pytest

from latencyprism.sentinel.priority import FAVOURED_NICE, OnTime, favoured


def policy() -> int:
    return os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK


@pytest.fixture
def ordinary() -> None:
    """This thread as any, however the tests were started."""
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    os.setpriority(os.PRIO_PROCESS, 0, 0)


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


@pytest.mark.root
@pytest.mark.usefixtures("ordinary")
def test_who_ran_too_long_is_ordinary_but_favoured_and_all_is_as_before_in_the_end() -> None:
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    with OnTime() as block:
        if not block.active:
            pytest.skip("real time is not permitted here")
        begun = time.thread_time()
        while not block.braked and time.thread_time() - begun < 2.0:
            pass
        assert block.braked == 1 and policy() == os.SCHED_OTHER
        assert os.getpriority(os.PRIO_PROCESS, 0) == FAVOURED_NICE
    assert os.getpriority(os.PRIO_PROCESS, 0) == nice and policy() == os.SCHED_OTHER


@pytest.mark.root
@pytest.mark.usefixtures("ordinary")
def test_what_a_favoured_thread_starts_is_not_favoured() -> None:
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    with favoured():
        if os.getpriority(os.PRIO_PROCESS, 0) != FAVOURED_NICE:
            pytest.skip("a higher priority is not permitted here")
        with OnTime():
            pass
        child = os.fork()
        if child == 0:
            os._exit(os.getpriority(os.PRIO_PROCESS, 0) + 20)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) - 20 == 0
    assert os.getpriority(os.PRIO_PROCESS, 0) == nice
    assert not os.sched_getscheduler(0) & os.SCHED_RESET_ON_FORK


@pytest.mark.root
def test_the_brake_makes_ordinary_whoever_was_at_real_time_before() -> None:
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(2))
    except OSError:
        pytest.skip("real time is not permitted here")
    with OnTime() as block:
        begun = time.thread_time()
        while not block.braked and time.thread_time() - begun < 2.0:
            pass
        assert block.braked == 1 and policy() == os.SCHED_OTHER
    assert policy() == os.SCHED_RR and os.sched_getparam(0).sched_priority == 2
