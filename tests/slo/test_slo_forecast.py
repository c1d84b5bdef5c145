"""The forecast knows what is coming, says how sure it is, and survives strange input."""

from __future__ import annotations

import random

from latencyprism.baseline import StepTime
from latencyprism.bench.forecast import simulate
from latencyprism.bench.forecasting import Scorer, auc, calibration
from latencyprism.bench.traces import Arrival
from latencyprism.records import Request, Step
from latencyprism.slo.forecast import Fate, Forecaster, Outlook, _Plan
from latencyprism.slo.pace import Pace
from latencyprism.slo.residuals import KEPT, KindsOfError, Residuals
from latencyprism.timeline.requests import UnderWay

S = 1_000_000_000


def bursts(count: int, rate: float, seed: int) -> list[Arrival]:
    rng, at, found = random.Random(seed), 0.0, []
    for _ in range(count):
        at += rng.expovariate(rate) * (0.2 if rng.random() < 0.5 else 1.8)
        prompt = int(min(max(rng.lognormvariate(5.0, 0.9), 8), 1200))
        found.append(Arrival(at, prompt, int(min(max(rng.lognormvariate(5.0, 0.6), 4), 400))))
    return found


def test_violations_are_known_a_second_ahead_on_a_simulated_engine() -> None:
    found = simulate(bursts(700, 3.1, 3), seed=3, base_ms=8.0)
    for metric in ("ttft", "tpot"):
        assert 0.02 < found[metric]["violated_share"] < 0.8
    assert found["ttft"]["one_second_ahead"]["auc"] >= 0.9
    assert found["tpot"]["running_one_second_ahead"]["auc"] >= 0.8
    assert found["ttft"]["any_time_before"]["calibration"]["mean_gap"] <= 8
    assert found["share"]["inside_interval"] >= 0.8


def flight(number: int, **values: object) -> UnderWay:
    given = {"arrival_ns": 0, "prompt_tokens": 100, "cached_tokens": None, "first_step": None,
             "first_token_ns": None, "tokens": 0, "whole": True, **values}  # fmt: skip
    return UnderWay(number, **given)  # type: ignore[arg-type]


def taught(step_ms: float = 20.0) -> Forecaster:
    model = StepTime()
    forecaster = Forecaster(model, S, 50_000_000)
    from latencyprism.baseline import work_of

    for n in range(200):
        mixed = n % 2
        start = int(n * step_ms * 1e6)
        step = Step("x", 0, 0, n, start, start + int(step_ms * 1e6), None, 5, mixed, 4, 100 * mixed, 4,
                    0, 1000, 5000 * mixed, running=5, waiting=2, gap_ns=0)  # fmt: skip
        work = work_of(step)
        assert work is not None
        model.learn(work, step_ms)
        forecaster.steps([step])
    return forecaster


def test_nothing_in_flight_and_nothing_known() -> None:
    fresh = Forecaster(StepTime(), S, S)
    empty = fresh.look(0, [])
    assert empty.share is None and empty.requests == 0
    unknown = fresh.look(0, [flight(1)])
    assert unknown.fates[0].ttft is None and unknown.fates[0].tpot is None


def test_a_long_queue_is_a_greater_danger_than_a_short_one() -> None:
    forecaster = taught()
    few = forecaster.look(0, [flight(n) for n in range(3)])
    many = forecaster.look(0, [flight(n, prompt_tokens=2000) for n in range(40)])
    assert few.share is not None and many.share is not None
    assert few.share < 0.2 < 0.6 < many.share
    chances = [fate.ttft or 0.0 for fate in many.fates]
    assert chances == sorted(chances)  # first come, first served
    assert many.low is not None and many.high is not None and many.low <= many.share <= many.high


def test_what_is_settled_is_certain() -> None:
    forecaster = taught()
    late = forecaster.look(3 * S, [flight(1)]).fates[0]
    in_time = forecaster.look(3 * S, [flight(2, first_token_ns=S // 2, first_step=3, tokens=20)]).fates[0]
    too_late = forecaster.look(3 * S, [flight(3, first_token_ns=2 * S, first_step=3, tokens=20)]).fates[0]
    assert (late.ttft, in_time.ttft, too_late.ttft) == (1.0, 0.0, 1.0)


def test_requests_whose_beginning_was_not_seen_are_left_out() -> None:
    found = taught().look(S, [flight(1, whole=False), flight(2, arrival_ns=None)])
    assert found.requests == 0 and found.share is None


def test_a_clock_that_jumps_and_odd_records_do_no_harm() -> None:
    forecaster = taught()
    for now in (S, -(10**18), 10**18):
        found = forecaster.look(now, [flight(1), flight(2, prompt_tokens=None), flight(3, tokens=-5)])
        assert all(0.0 <= fate.either <= 1.0 for fate in found.fates)
    forecaster.ended([Request("x", 0, 1, None), Request("x", 0, 99, 0), Request("x", 0, 2, 5, ttft_ns=-1)])
    forecaster.steps([Step("x", 0, 0, 1, 10, 5), Step("x", 0, 0, 1, 5, 5)])
    assert forecaster.look(S, [flight(1)]).requests == 1


def test_memory_stays_bounded() -> None:
    forecaster = taught()
    for n in range(6000):
        forecaster.look(n * S, [flight(n, arrival_ns=n * S)])
    assert len(forecaster._open) <= 4096


def test_errors_of_the_past_tell_what_is_probable() -> None:
    errors = KindsOfError((1.0,))
    rng = random.Random(1)
    for _ in range(2000):
        predicted = rng.uniform(0.1, 0.9)
        errors.add(0, predicted, predicted * rng.lognormvariate(0.5, 0.2))  # always far too hopeful
    assert 0.4 < errors.probability(0, 0.5, 0.5 * 1.65) < 0.6
    assert errors.probability(0, 0.5, 0.5) > 0.95
    assert abs(errors.probability(1, 0.5, 0.5) - 0.5) < 0.01  # of that kind nothing was seen


def test_residuals_keep_the_last_ones_alone() -> None:
    one = Residuals()
    for n in range(3 * KEPT):
        one.add(n % 7 - 3.0)
    assert len(one) == KEPT and one.beyond(-10.0) > 0.999 and one.beyond(10.0) < 0.001


def test_scores_are_what_they_are_called() -> None:
    assert auc([(0.9, True), (0.1, False)]) == 1.0
    assert auc([(0.1, True), (0.9, False)]) == 0.0
    assert auc([(0.5, True), (0.5, False)]) == 0.5
    assert auc([(0.5, True)]) is None and auc([]) is None
    found = calibration([(0.25, n % 4 == 0) for n in range(400)])
    assert found["mean_gap"] == 0.0 and found["worst_gap"] == 0.0
    assert calibration([])["mean_gap"] is None


def made(number: int, requests: int, running: int, waiting: int, prefill: int = 0) -> Step:
    start = number * 20_000_000
    return Step("x", 0, 0, number, start, start + 19_000_000, None, requests, bool(prefill),
                requests - bool(prefill), prefill, requests - bool(prefill), 0, 500, 0,
                running=running, waiting=waiting, gap_ns=0)  # fmt: skip


def test_slots_are_known_from_those_that_were_left_behind() -> None:
    pace = Pace(StepTime())
    pace.take(made(0, 3, 3, 1, prefill=200))
    pace.take(made(1, 4, 4, 1, prefill=10))  # the one that waited came in, another has just come
    assert pace.slots is None
    pace.take(made(2, 5, 5, 3, prefill=10))
    pace.take(made(3, 6, 5, 3))  # of three that waited two were left behind; one ended in this step
    assert pace.slots == 6
    pace.take(made(4, 6, 6, 2, prefill=200))  # here the chunk was used up: no sign of slots
    assert pace.slots == 6


def test_lengths_still_to_come_are_spread() -> None:
    pace = Pace(StepTime())
    few = pace.left_spread(10)
    assert few == sorted(few) and len(set(few)) > 4 and min(few) >= 1
    for n in range(200):
        pace.ended(Request("x", 0, n, 0, output_tokens=100 + n, finish_reason="stop"))
    assert pace.left_spread(0)[0] > 100 and pace.left_spread(0)[-1] < 300
    assert all(1 <= left <= 50 for left in pace.left_spread(250))
    assert min(pace.left_spread(10**6)) >= 1


def test_whoever_waits_for_a_slot_waits_for_the_first_that_ends_not_for_the_usual_end() -> None:
    forecaster = taught()
    rng = random.Random(1)
    ended = [
        Request("x", 0, -n, 0, output_tokens=int(rng.lognormvariate(4, 1)) + 1, finish_reason="stop")
        for n in range(300)
    ]
    forecaster.ended(ended)
    forecaster.pace.slots = 16
    running = [flight(n, first_step=1, first_token_ns=1, tokens=10) for n in range(16)]
    plan = _Plan(forecaster.pace, [*running, flight(99)])
    usual = plan.tokens_s(forecaster.pace.left_tokens(10), True)
    assert plan.first_token_s[99] < usual / 3


def test_what_is_settled_is_not_scored_and_what_is_certain_is() -> None:
    scorer = Scorer({"ttft": S, "tpot": S})
    for n in range(15):
        now = (n + 1) * S // 5
        fates = (Fate(1, 1.0, None, True), Fate(2, 0.0, None, now < S // 2))
        scorer.look(Outlook(now, fates, 0.5, 0.5, 0.5, 2))
    scorer.ended([Request("x", 0, 1, 0, ttft_ns=3 * S), Request("x", 0, 2, 0, ttft_ns=S // 2)])
    told = scorer.result()["ttft"]["any_time_before"]
    assert told["n"] == 4 + 2 and told["auc"] == 1.0


def test_a_long_queue_costs_a_bounded_time() -> None:
    forecaster = taught()
    forecaster.pace.slots = 8
    many = [flight(n, prompt_tokens=500) for n in range(3000)]
    waits = [_Plan(forecaster.pace, many).first_token_s[n] for n in (1, 50, 500, 2999)]
    assert waits == sorted(waits) and waits[-1] > 10 * waits[1]


def test_prompt_tokens_since_a_step() -> None:
    pace = Pace(StepTime())
    assert pace.prefilled_since(0) == 0
    for number in range(10, 20):
        pace.take(made(number, 2, 2, 0, prefill=number))
    assert pace.prefilled_since(19) == 19 and pace.prefilled_since(18) == 37
    assert pace.prefilled_since(0) == sum(range(10, 20)) and pace.prefilled_since(25) == 0
