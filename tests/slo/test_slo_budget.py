"""Budgets burn, windows fire, and oddities of clocks and streams do no harm."""

from __future__ import annotations

from latencyprism.records import Request
from latencyprism.slo.budget import Account
from latencyprism.slo.objectives import parse_objectives
from latencyprism.slo.windows import SlidingCount, standard_windows
from latencyprism.slo.words import burn_words

S = 1_000_000_000


def account(text: str = "period = '1h'\nttft_p99 = '< 1 s'") -> Account:
    found = parse_objectives(text)
    objective = found.objectives[0]
    return Account(objective, found.windows_of(objective))


def request(ttft_s: float | None) -> Request:
    return Request("vllm", 0, 1, 0, ttft_ns=None if ttft_s is None else int(ttft_s * S))


def feed(
    one: Account, since_s: float, seconds: float, per_s: int, share_bad: float
) -> list[tuple[float, str]]:
    """(time, level) of what was told."""
    told, owed = [], 0.0
    for n in range(int(seconds * per_s)):
        now = since_s + n / per_s
        owed += share_bad
        violated = owed >= 1.0
        owed -= violated
        one.take(int(now * S), request(2.0 if violated else 0.1))
        told += [(now, burn.window.level) for burn in one.news(int(now * S))]
    return told


def test_nothing_is_told_within_the_budget() -> None:
    assert feed(account(), 0, 600, 50, 0.005) == []


def test_a_fast_burn_pages_soon_and_once() -> None:
    one = account()
    assert feed(one, 0, 60, 50, 0.0) == []
    told = feed(one, 60, 60, 50, 0.5)
    levels = [level for _, level in told]
    assert levels[0] in ("page", "evidence") and "page" in levels
    first_page = next(at for at, level in told if level == "page")
    assert first_page - 60 < 1.6 and len(told) <= 3


def test_a_slow_burn_is_evidence_alone() -> None:
    one = account()
    told = feed(one, 0, 900, 20, 0.03)
    assert told and {level for _, level in told} == {"evidence"}


def test_rest_after_a_burn_and_a_second_burn() -> None:
    one = account()
    feed(one, 0, 30, 50, 0.5)
    assert one.burning(30 * S) and not one.calm(30 * S)
    feed(one, 30, 60, 50, 0.0)
    assert not one.burning(90 * S) and one.calm(90 * S)
    assert any(level == "page" for _, level in feed(one, 90, 30, 50, 0.5))
    left = one.left(120 * S)
    assert left is not None and left < 0


def test_one_request_ever_says_nothing() -> None:
    one = account()
    assert one.take(0, request(5.0)) is True
    assert one.news(0) == [] and not one.burning(0) and one.value_ns() == 5 * S
    assert one.news(10**18) == []


def test_no_request_ever_says_nothing() -> None:
    one = account()
    assert one.news(0) == [] and one.left(0) is None and one.value_ns() is None and one.calm(0)


def test_unobserved_requests_are_counted_apart() -> None:
    one = account()
    assert one.take(0, request(None)) is None
    assert (one.total, one.unjudged) == (0, 1) and one.left(0) is None


def test_constant_durations_are_all_right_or_all_wrong() -> None:
    fine, wrong = account(), account()
    for n in range(1000):
        fine.take(n * S // 50, request(1.0))
        wrong.take(n * S // 50, request(1.0000001))
    assert fine.violations == 0 and wrong.violations == 1000
    burn = wrong.news(20 * S)[0]
    assert "1" in burn_words(wrong, burn, 20 * S) and "budget" in burn_words(wrong, burn, 20 * S)


def test_a_clock_that_jumps_back_keeps_counting() -> None:
    count = SlidingCount(10.0)
    count.add(1000 * S, True)
    count.add(5 * S, True)
    assert count.counts(3 * S) == (2, 2)
    assert count.counts(1011 * S) == (0, 0)


def test_a_clock_that_jumps_ahead_empties_the_window() -> None:
    count = SlidingCount(10.0)
    for n in range(100):
        count.add(n * S // 10, n % 2 == 0)
    assert count.counts(10 * S)[0] > 90
    assert count.counts(10**30) == (0, 0)
    count.add(10**30, True)
    assert count.counts(10**30) == (1, 1)


def test_windows_slide() -> None:
    count = SlidingCount(60.0)
    for second in range(600):
        count.add(second * S, second % 10 == 0)
        total, bad = count.counts(second * S)
        assert total <= 61 and bad <= 7
    assert count.counts(599 * S)[0] >= 59


def test_standard_windows_fire_when_their_share_is_gone() -> None:
    for window, gone in zip(standard_windows(30 * 86400.0), (0.02, 0.05, 0.10)):
        assert abs(window.burn * window.long_s / (30 * 86400.0) - gone) < 1e-9
