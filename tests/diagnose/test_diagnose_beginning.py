"""Where a slow-down really began: found behind the detector's onset, never after it, never without reason."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latencyprism.diagnose import begun_ns
from latencyprism.diagnose.beginning import KEPT
from latencyprism.records import Step

MS = 1_000_000


def steps_of(durations_ms):
    found, at_ns = [], 10**12
    for number, took_ms in enumerate(durations_ms):
        end_ns = at_ns + int(took_ms * MS)
        found.append(Step("vllm", 0, 0, number, at_ns, end_ns, "decode"))
        at_ns = end_ns + 100_000
    return found


def noisy(rng, mean_ms, count, noise=0.1):
    return [mean_ms * rng.lognormvariate(0.0, noise) for _ in range(count)]


def bursts(rng, count):
    """A neighbour that lets most steps be and hits some hard."""
    return [10.0 * (rng.choice([1.0, 1.0, 2.2])) * rng.lognormvariate(0.0, 0.1) for _ in range(count)]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("fault", ["level", "bursts"])
def test_the_beginning_is_found_behind_a_late_onset(seed, fault):
    rng = random.Random(seed)
    late = noisy(rng, 13.0, 400) if fault == "level" else bursts(rng, 400)
    steps = steps_of([*noisy(rng, 10.0, 2000), *late])
    found = begun_ns(steps, [10.0] * 2400, steps[2260].start_ns, steps[2350].end_ns)
    number = next(step.step for step in steps if step.start_ns == found)
    assert 1970 <= number <= 2040


@given(st.integers(0, 10**6), st.floats(1.0, 4.0), st.integers(150, 900))
@settings(max_examples=60, deadline=None)
def test_it_is_never_after_the_onset_and_leaves_something_before_it(seed, slower, onset):
    rng = random.Random(seed)
    steps = steps_of([*noisy(rng, 10.0, onset, 0.3), *noisy(rng, 10.0 * slower, 100, 0.3)])
    onset_ns = steps[onset].start_ns
    found = begun_ns(steps, [10.0] * len(steps), onset_ns, steps[-1].end_ns)
    assert steps[KEPT].start_ns <= found <= onset_ns


def test_steps_that_the_fault_did_not_touch_are_not_taken_for_it():
    rng = random.Random(1)
    steps = steps_of([*noisy(rng, 10.0, 2000), *noisy(rng, 13.0, 100)])
    found = begun_ns(steps, [10.0] * 2100, steps[2000].start_ns, steps[2099].end_ns)
    assert found >= steps[1985].start_ns


def test_nothing_known_or_nothing_late_leaves_the_onset_as_it_was():
    steps = steps_of([10.0] * 300)
    onset_ns, alert_ns = steps[200].start_ns, steps[-1].end_ns
    assert begun_ns(steps, [None] * 300, onset_ns, alert_ns) == onset_ns
    assert begun_ns(steps, [10.0] * 300, onset_ns, alert_ns) == onset_ns
    assert begun_ns([], [], onset_ns, alert_ns) == onset_ns
