"""Causes that all make the engine wait: told by the account that moved as much as the slow-down."""

import pytest
from diagnose_scenes import ROLES, Scene, window

from latencyprism.diagnose import localise
from latencyprism.diagnose.posterior import TEMPER, weights
from latencyprism.diagnose.shifts import Shift
from latencyprism.diagnose.signatures import builtin_table

REFERENCE = window(Scene(probed=True), seconds=30, seed=1)


def waits(s, **more):
    """The engine's loop sleeps on a futex for the whole slow-down."""
    return Scene(probed=True, slow=s, idle=s, wait_lock=s, voluntary=6, **more)


ALIKE = {
    "another thread burns the time": ("python.gil", lambda s: waits(s, siblings=s)),
    "another thread collects": ("python.gc", lambda s: waits(s, siblings=s, gc=s)),
    "the loop itself collects": ("python.gc", lambda s: Scene(probed=True, slow=s, gc=s, cpu=s)),
    "nobody burns anything": ("python.lock", lambda s: waits(s)),
    "another thread writes lines": ("log.flood", lambda s: waits(s, siblings=s, writes=300)),
    "the loop itself writes lines": ("log.flood", lambda s: Scene(probed=True, slow=s, cpu=s, writes=300)),
    "the quota holds it back": (
        "cpu.quota", lambda s: Scene(probed=True, slow=s, throttled=s, runqueue=s),
    ),
    "the quota holds back two CPUs": (
        "cpu.quota", lambda s: waits(s, throttled=2 * s),
    ),
    "pages come from disk": (
        "memory.reclaim", lambda s: waits(s, faults=100, io=0.1 * s),
    ),
    "fewer CPUs for the same threads": (
        "cpu.oversubscription", lambda s: Scene(probed=True, slow=s, runqueue=s, allowed_cpus=1),
    ),
    "another process takes the CPU": (
        "cpu.neighbour", lambda s: Scene(probed=True, slow=s, runqueue=s, foreign=s, involuntary=4 * s),
    ),
}  # fmt: skip


def named(scene, seed, reference=REFERENCE):
    return localise(reference, window(scene, seconds=4, seed=seed, start_s=1100), roles=ROLES)


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("what", sorted(ALIKE))
def test_the_dedicated_account_outranks_the_waiting(what, strength):
    cause, scene = ALIKE[what]
    assert [named(scene(strength), seed).cause for seed in (7, 8)] == [cause, cause]


@pytest.mark.parametrize("account", [{"throttled": 0.05}, {"gc": 0.05}])
def test_an_account_of_a_twentieth_does_not_explain_a_doubling(account):
    assert named(waits(1.0, **account), 7).cause not in ("cpu.quota", "python.gc", "none")


def test_a_strange_account_under_a_slow_down_is_not_the_locks():
    """Throttled and asleep for as long: without quota in the catalogue it is not called a lock."""
    table = builtin_table()
    less = type(table)(table.signals, {c: s for c, s in table.causes.items() if c != "cpu.quota"})
    suspect = window(waits(1.0, throttled=1.0), seconds=4, seed=7, start_s=1100)
    verdict = localise(REFERENCE, suspect, roles=ROLES, table=less)
    lock = next(ranked.probability for ranked in verdict.ranking if ranked.cause == "python.lock")
    assert lock < 0.5


@pytest.mark.parametrize("scene", [Scene(probed=True), Scene(probed=True, allowed_cpus=1)])
def test_healthy_probed_windows_and_a_harmless_affinity_are_none(scene):
    assert [named(scene, seed).cause for seed in range(40, 50)] == ["none"] * 10


def test_fewer_cpus_are_said_in_words():
    verdict = named(Scene(probed=True, slow=1.0, runqueue=1.0, allowed_cpus=1), 7)
    assert any("may run on 1 CPUs, normally on 2" in each.text for each in verdict.evidence)


def test_signals_that_tell_the_same_time_count_as_one():
    table = builtin_table()
    shifts = {name: Shift(name, "", 0.0, 1.0, 0.7, 0.05) for name in ("idle", "offcpu", "slept", "siblings")}
    found = weights(shifts, table)
    assert found["siblings"] == pytest.approx(TEMPER)
    assert found["idle"] + found["offcpu"] + found["slept"] == pytest.approx(TEMPER)
