"""What must hold for budgets, windows, effects and prices whatever comes."""

from __future__ import annotations

import math
import random
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from latencyprism.records import Request, Step
from latencyprism.slo.budget import LEAST_REQUESTS, LEAST_VIOLATIONS, Account
from latencyprism.slo.effect import Effect, Tally
from latencyprism.slo.objectives import parse_objectives
from latencyprism.slo.prefill_cost import PrefillCost
from latencyprism.slo.windows import BUCKETS, SlidingCount, standard_windows

S = 1_000_000_000
times = st.integers(-(10**18), 10**18)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30 * S), st.booleans()), max_size=200), st.floats(0.5, 100.0))
def test_a_sliding_count_is_the_count_of_its_window(steps: list[tuple[int, bool]], length_s: float) -> None:
    """Between the events of the last 59/60 of the window and those of all of it."""
    count, now, seen = SlidingCount(length_s), 0, []
    for pause, violated in steps:
        now += pause
        seen.append((now, violated))
        count.add(now, violated)
        total, bad = count.counts(now)
        width = int(length_s * 1e9) // BUCKETS
        sure = [v for at, v in seen if at > now - (BUCKETS - 1) * width]
        most = [v for at, v in seen if at > now - BUCKETS * width]
        assert len(sure) <= total <= len(most)
        assert sum(sure) <= bad <= sum(most) and bad <= total


@given(st.lists(st.tuples(times, st.booleans()), max_size=200), st.floats(0.1, 1e7))
def test_a_jumping_clock_never_breaks_a_count(steps: list[tuple[int, bool]], length_s: float) -> None:
    count, latest = SlidingCount(length_s), None
    for now, violated in steps:
        count.add(now, violated)
        total, bad = count.counts(now)
        assert 1 <= total <= len(steps) and 0 <= bad <= total
        latest = now if latest is None else max(latest, now)
    assert count.counts(10**19) == (0, 0)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(times, st.one_of(st.none(), st.integers(-5, 10**10)), st.booleans()), max_size=120))
def test_an_account_survives_any_stream(stream: list[tuple[int, int | None, bool]]) -> None:
    found = parse_objectives("period = '1h'\nttft_p99 = '< 1 s'")
    account = Account(found.objectives[0], found.windows_of(found.objectives[0]))
    told = 0
    for now, ttft, asks in stream:
        account.take(now, Request("vllm", 0, 1, 0, ttft_ns=ttft))
        if asks:
            told += len(account.news(now))
            left = account.left(now)
            assert left is None or left <= 1.0
            if account.burning(now):
                assert account.total >= LEAST_REQUESTS and account.violations >= LEAST_VIOLATIONS
    assert account.violations <= account.total <= len(stream) == account.total + account.unjudged
    assert told <= len(stream)


@given(st.floats(60.0, 366 * 86400.0))
def test_standard_windows_never_overlap(period_s: float) -> None:
    windows = standard_windows(period_s)
    for one, other in pairwise(windows):
        assert one.long_s < other.long_s and one.burn > other.burn
    assert all(w.short_s < w.long_s <= period_s for w in windows)


def test_a_burn_is_told_again_only_after_rest() -> None:
    found = parse_objectives("period = '1h'\nttft_p99 = '< 1 s'")
    account = Account(found.objectives[0], found.windows_of(found.objectives[0]))
    rng, told = random.Random(1), 0
    for n in range(6000):  # two minutes without any rest
        account.take(n * S // 50, Request("vllm", 0, n, 0, ttft_ns=2 * S if rng.random() < 0.3 else 1))
        told += len(account.news(n * S // 50))
    assert 1 <= told <= 3


def step(ms: float, prefill: int, decode: int, runqueue_ns: int | None = None) -> Step:
    end = int(ms * 1e6)
    made = Step("x", 0, 0, 1, 0, end, None, 4, 1, 3, prefill, decode)
    return made._replace(runqueue_ns=runqueue_ns)


def test_effects_are_of_the_state_that_held() -> None:
    effect = Effect()
    for _ in range(10):
        effect.now.step(step(100.0, 512, 4, 50_000_000), 50.0)
        effect.now.request(True)
    effect.begin()
    for _ in range(10):
        effect.now.step(step(20.0, 64, 4), 20.0)
        effect.now.request(False)
    effect.end()
    before, after = effect.values()["before"], effect.values()["after"]
    assert (before["mixed_step_ms"], before["slowdown"], before["runqueue_share"]) == (100.0, 2.0, 0.5)
    assert (before["violating"], after["violating"]) == (1.0, 0.0)
    assert (after["mixed_step_ms"], after["prompt_tokens_per_s"]) == (20.0, 3200)
    assert after["runqueue_share"] is None  # not observed is not zero


@given(
    st.lists(
        st.tuples(
            st.floats(allow_nan=True, allow_infinity=True), st.integers(0, 4096),
            st.one_of(st.none(), st.floats(allow_nan=True, allow_infinity=True)),
        ),
        max_size=50,
    )
)  # fmt: skip
def test_a_tally_takes_anything(rows: list[tuple[float, int, float | None]]) -> None:
    tally = Tally()
    for ms, prefill, expected in rows:
        tally.step(step(ms if math.isfinite(ms) and abs(ms) < 1e12 else 0.0, prefill, 1), expected)
    for value in tally.values().values():
        assert value is None or math.isfinite(value)


def test_prices_of_prompts_are_found_in_noise() -> None:
    rng, cost = random.Random(3), PrefillCost()
    assert cost.ms(100, 0) is None and cost.ms(0, 0) == 0.0
    for _ in range(200):
        tokens = rng.choice([16, 16, 16, 40, 256, 1024])
        context = tokens if tokens == 16 else rng.randint(200, 1500)
        truth = 10.0 + 1.0 + 0.2 * tokens + 0.0001 * tokens * context
        cost.take(tokens, tokens * context, truth * rng.lognormvariate(0.0, 0.1), 10.0)
    for tokens, context in ((16, 16), (64, 700), (512, 700), (1024, 1500)):
        truth = 1.0 + 0.2 * tokens + 0.0001 * tokens * context
        found = cost.ms(tokens, tokens * context)
        assert found is not None and 0.75 * truth < found < 1.3 * truth


def test_the_first_large_chunk_is_believed() -> None:
    cost = PrefillCost()
    for _ in range(50):
        cost.take(16, 256, 13.0, 10.0)
    cost.take(1024, 1_000_000, 320.0, 10.0)
    found = cost.ms(1000, 900_000)
    assert found is not None and found > 100.0


def test_a_few_odd_steps_do_not_set_the_price() -> None:
    cost = PrefillCost()
    for n in range(60):
        cost.take(256, 256 * 300, 900.0 if n % 10 == 0 else 60.0, 10.0)
    found = cost.ms(256, 256 * 300)
    assert found is not None and 40.0 < found < 65.0


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(-10, 10**6), st.integers(-10, 10**12), st.floats(allow_nan=True, allow_infinity=True),
            st.floats(allow_nan=True, allow_infinity=True),
        ),
        max_size=40,
    ),
    st.integers(0, 10**5),
)  # fmt: skip
def test_prices_take_anything_and_are_never_below_zero(
    rows: list[tuple[int, int, float, float]], tokens: int
) -> None:
    cost = PrefillCost()
    for row in rows:
        cost.take(*row)
    found = cost.ms(tokens, float(tokens))
    assert found is None or (math.isfinite(found) and found >= 0.0)
