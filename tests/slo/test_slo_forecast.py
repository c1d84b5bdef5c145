"""The forecast knows what is coming, says how sure it is, and survives strange input."""

from __future__ import annotations

import random

from latencyprism.baseline import StepTime
from latencyprism.bench.forecast import simulate
from latencyprism.bench.forecasting import auc, calibration
from latencyprism.bench.traces import Arrival
from latencyprism.records import Request, Step
from latencyprism.slo.forecast import Forecaster
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
