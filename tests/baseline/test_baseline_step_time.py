"""The step-time model: learns known costs of work, abstains where it knows nothing."""

from __future__ import annotations

import math
import random

import pytest

from latencyprism.baseline import StepTime, work_of
from latencyprism.baseline.line import RobustLine
from latencyprism.baseline.work import batch_bucket, half_octave
from latencyprism.records.step import Step


def make(ms: float = 1.0, decode: int = 8, context: int | None = 1600, prefill: int = 0) -> Step:
    attention = None if context is None else prefill * context
    return Step("e", 0, 0, 0, 0, int(ms * 1e6), None, decode + (prefill > 0), int(prefill > 0), decode,
                prefill, decode, 0, context, attention)  # fmt: skip


def cost(decode: int, context: int, prefill: int = 0) -> float:
    return 10.0 + 0.2 * decode + context / 2000 + (3.0 + 0.5 * prefill if prefill else 0.0)


def taught(count: int = 1500, seed: int = 0, noise: float = 0.01, factor: float = 1.0) -> StepTime:
    rng, model = random.Random(seed), StepTime()
    for _ in range(count):
        decode, context = rng.choice((1, 4, 8, 16, 32)), rng.randint(200, 20000)
        prefill = rng.choice((0, 0, 0, 16, 64, 256))
        work = work_of(make(decode=decode, context=context, prefill=prefill))
        assert work is not None
        model.learn(work, cost(decode, context, prefill) * rng.gauss(1.0, noise) * factor, noise)
    return model


@pytest.mark.parametrize(
    ("decode", "context", "prefill"), [(8, 5000, 0), (32, 15000, 0), (8, 5000, 64), (16, 9000, 256)]
)
def test_learned_costs(decode: int, context: int, prefill: int) -> None:
    expected = taught().expect(make(decode=decode, context=context, prefill=prefill))
    assert expected is not None
    assert expected.known
    assert expected.ms == pytest.approx(cost(decode, context, prefill), rel=0.05)
    assert expected.allowance < 0.15
    assert sum(expected.terms.values()) == pytest.approx(expected.ms)


def test_the_unfamiliar_is_allowed_more() -> None:
    model = taught()
    at_home = model.expect(make(decode=8, context=5000))
    new_batch = model.expect(make(decode=256, context=5000))
    new_prompt = model.expect(make(decode=8, context=9000, prefill=4096))
    assert at_home is not None
    assert new_batch is not None
    assert new_prompt is not None
    assert new_batch.allowance > at_home.allowance + 0.3
    assert new_prompt.allowance > at_home.allowance + 0.3
    assert not new_batch.known


def test_nothing_known_nothing_said() -> None:
    assert StepTime().expect(make()) is None
    assert taught().expect(make(decode=0, context=0, prefill=0)) is None


def test_counts_that_were_not_observed_drop_out() -> None:
    model = StepTime()
    bare = Step("e", 0, 0, 0, 0, 20_000_000)
    work = work_of(bare)
    assert work is not None
    for _ in range(50):
        model.learn(work, 20.0)
    expected = model.expect(bare)
    assert expected is not None
    assert expected.ms == pytest.approx(20.0)


def test_the_unit_of_time_does_not_matter() -> None:
    step = make(decode=16, context=7000, prefill=64)
    small, large = taught().expect(step), taught(factor=1000.0).expect(step)
    assert small is not None
    assert large is not None
    assert large.ms == pytest.approx(1000.0 * small.ms)
    assert large.allowance == pytest.approx(small.allowance)


def test_a_few_wild_steps_hardly_move_it() -> None:
    model = taught()
    before = model.expect(make(decode=8, context=5000))
    work = work_of(make(decode=8, context=5000))
    assert before is not None
    assert work is not None
    for _ in range(5):
        model.learn(work, 5000.0, 0.01)
    after = model.expect(make(decode=8, context=5000))
    assert after is not None
    assert after.ms == pytest.approx(before.ms, rel=0.03)


def test_more_work_never_costs_less() -> None:
    rng, line = random.Random(5), RobustLine()
    for _ in range(500):
        u = rng.uniform(0, 1)
        line.learn(u, u * rng.uniform(0.9, 1.1), 10.0 - 2.0 * u + rng.gauss(0, 0.1))
    assert line.b >= 0.0
    assert line.c >= 0.0
    assert line.at(5.0, 5.0) >= 0.9 * line.at(0.0, 0.0)


def test_buckets() -> None:
    assert [batch_bucket(b) for b in (0, 1, 7, 8, 9, 16, 17, 256)] == [0, 1, 7, 8, 16, 16, 24, 256]
    assert batch_bucket(257) > 256
    assert batch_bucket(10**9) < 10**4
    assert half_octave(0) == 0
    assert half_octave(400) == half_octave(500)
    assert half_octave(400) < half_octave(600)
    for amount in (1, 2, 3, 5, 6, 7, 8, 11, 12, 90, 91, 4096, 10**6, 2**40 + 1):
        assert half_octave(amount) == int(2.0 * math.log2(amount)) + 1
