"""Real time for short work, given back in the end, also where one block lies in another."""

from __future__ import annotations

import os
import threading
import time

import pytest

from latencyprism.agent.session import LEASE_S
from latencyprism.sentinel import priority
from latencyprism.sentinel.priority import PAUSE_S, OnTime, on_time, start_alike


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


def run_on(block: OnTime, brakes: int) -> float:
    """Compute until the brake was needed so often; the processor time that took, s."""
    begun = time.thread_time()
    while block.braked < brakes and time.thread_time() - begun < 3.0:
        pass
    return time.thread_time() - begun


@pytest.mark.root
@pytest.mark.usefixtures("ordinary")
def test_who_runs_on_has_to_sleep_longer_each_time_and_stays_on_time() -> None:
    with OnTime() as block:
        if not block.active:
            pytest.skip("real time is not permitted here")
        pauses = []
        for brake in (1, 2, 3):
            begun, ran = time.monotonic(), run_on(block, brake)
            assert block.braked == brake and policy() == os.SCHED_RR
            assert 0.1 < ran < 1.0  # the kernel looks once a tick, and each time as early as the first
            pauses.append(time.monotonic() - begun - ran)
        assert pauses[0] >= PAUSE_S and pauses[1] >= 2 * PAUSE_S and pauses[2] >= 4 * PAUSE_S
    assert policy() == os.SCHED_OTHER


@pytest.mark.root
def test_after_a_calm_time_the_pause_is_short_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(priority, "CALM_S", 1.0)
    slept: list[float] = []
    block = OnTime()
    monkeypatch.setattr(time, "sleep", slept.append)
    for wait_s in (0.0, 0.0, 1.1, 0.0):
        until = time.monotonic() + wait_s
        while time.monotonic() < until:
            pass
        block._brake(0, None)
    assert slept == [PAUSE_S, 2 * PAUSE_S, PAUSE_S, 2 * PAUSE_S]


def test_the_longest_pause_is_within_the_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    block = OnTime()
    monkeypatch.setattr(time, "sleep", slept.append)
    for _ in range(20):
        block._brake(0, None)
    assert max(slept) == slept[-1] < LEASE_S - 0.5


@pytest.mark.root
@pytest.mark.usefixtures("ordinary")
def test_a_thread_on_time_starts_ordinary_ones() -> None:
    found: list[int] = []

    def thread() -> None:
        if on_time():
            found.append(policy())
            inner = threading.Thread(target=lambda: found.append(policy()))
            inner.start()
            inner.join()

    outer = threading.Thread(target=thread)
    outer.start()
    outer.join()
    if not found:
        pytest.skip("real time is not permitted here")
    assert found == [os.SCHED_RR, os.SCHED_OTHER] and policy() == os.SCHED_OTHER


@pytest.mark.root
def test_who_was_at_real_time_before_is_so_afterwards() -> None:
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(2))
    except OSError:
        pytest.skip("real time is not permitted here")
    with OnTime() as block:
        run_on(block, 1)
        assert block.braked == 1
    assert policy() == os.SCHED_RR and os.sched_getparam(0).sched_priority == 2


@pytest.mark.root
@pytest.mark.usefixtures("ordinary")
def test_a_thread_may_be_started_as_its_starter_is_scheduled() -> None:
    found: list[int] = []

    def see() -> None:
        found.append(policy())

    with OnTime() as block:
        if not block.active:
            pytest.skip("real time is not permitted here")
        before = os.sched_getscheduler(0)
        one = threading.Thread(target=see)
        start_alike(one)
        one.join()
        assert os.sched_getscheduler(0) == before  # what it starts otherwise is ordinary as ever
        other = threading.Thread(target=see)
        other.start()
        other.join()
    last = threading.Thread(target=see)
    start_alike(last)
    last.join()
    assert found == [os.SCHED_RR, os.SCHED_OTHER, os.SCHED_OTHER]
