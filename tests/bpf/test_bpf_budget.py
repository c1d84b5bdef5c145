"""Prices are measured, their sum is a running estimate, and what is too dear goes, the dearest first."""

from __future__ import annotations

import os
import time

import pytest

from latencyprism.bench.bpf import StubTarget
from latencyprism.bpf.below import BelowProbe
from latencyprism.bpf.budget import BelowBudget, Budget, CallBudget
from latencyprism.bpf.calls import CallProbe, Function
from latencyprism.bpf.prices import Price, Prices, measure_calls, measure_tracepoints
from latencyprism.bpf.stubs import ENDBR64, OTHER, PUSH

live = [pytest.mark.bpf, pytest.mark.root]
S = 1_000_000_000


def test_the_estimate_is_rate_times_price_over_the_cores() -> None:
    budget = Budget(0.05, cores=2)
    assert budget.look(0, {"a": 0.0}) == [] and budget.share is None
    assert budget.look(S, {"a": 0.04 * S}) == []
    assert budget.share == pytest.approx(0.02) and budget.shares == {"a": pytest.approx(0.02)}


def test_the_dearest_goes_first_and_only_as_many_as_needed() -> None:
    budget = Budget(0.05)
    budget.look(0, {})
    spent = {"cheap": 0.01 * S, "dear": 0.2 * S, "dearest": 0.5 * S}
    assert budget.look(S, spent) == []  # once or twice may be a burst
    assert budget.look(2 * S, {name: 2 * ns for name, ns in spent.items()}) == []
    assert budget.look(3 * S, {name: 3 * ns for name, ns in spent.items()}) == ["dearest", "dear"]
    assert budget.given_up["dear"] == pytest.approx(0.2)


def test_a_burst_is_no_rate() -> None:
    budget = Budget(0.05)
    spent = 0.0
    for second in range(10):
        spent += 0.5 * S if second % 2 else 0.0
        assert budget.look(second * S, {"a": spent}) == []


def test_looks_too_close_together_say_nothing() -> None:
    budget = Budget(0.05)
    budget.look(0, {"a": 0.0})
    assert budget.look(1000, {"a": 1e9}) == [] and budget.share is None


def test_a_class_without_a_price_counts_as_the_dearest() -> None:
    prices = Prices({PUSH: Price(1.0, 2.0, 1.5), OTHER: Price(10.0, 20.0, None)}, {})
    assert prices.of_call(PUSH) == 2.0 and prices.of_call(PUSH, returns=False) == 1.0
    assert prices.of_call(ENDBR64) == 20.0
    assert Prices({}, {}).of_call(PUSH) == 0.0


class TestLive:
    pytestmark = live

    def test_prices_of_calls_by_class(self) -> None:
        found = measure_calls(hits=300, rounds=3)
        for price in found.values():
            assert price.entry_ns and price.pair_ns and price.empty_pair_ns
            assert 50 < price.entry_ns < 200_000 and price.pair_ns < 200_000
        if ENDBR64 in found:
            # Probed behind it, it is as cheap as what follows.
            assert (found[ENDBR64].entry_ns or 0) < 3 * (found[PUSH].entry_ns or 0)

    def test_prices_of_tracepoints(self) -> None:
        found = measure_tracepoints()
        assert 30 < found["switch"] < 20_000 and 30 < found["waking"] < 20_000
        assert 0 <= found["mine"] < 20_000

    def test_groups_within_their_budget_stay_and_others_go(self) -> None:
        with BelowProbe([os.getpid()]) as probe:
            modest = BelowBudget(probe, {"switch": 100.0, "mine": 100.0}, limit=0.5)
            strict = BelowBudget(probe, {"switch": 1e9, "interrupt": 0.0}, limit=0.002)
            gone, estimates = [], []
            for _ in range(5):
                now = time.monotonic_ns()
                assert modest.look(now) == []
                estimates.append(modest.budget.share)
                gone += strict.look(now)
                time.sleep(0.12)
            assert gone == ["scheduler"] and "scheduler" not in probe.attached
            assert "interrupts" in probe.attached and "more than its budget" in probe.missing[-1]
            assert estimates[0] is None and 0 < (estimates[1] or 0.0) < 0.5

    def test_the_hot_function_goes_and_the_cool_one_stays(self) -> None:
        target = StubTarget(clones=1)
        stub, clone = target.file.stubs[target.kind].offset, target.file.clones[0]
        functions = [Function("cool", offset=clone), Function("hot", offset=stub)]
        probe = CallProbe(target.pid, [target.file.descriptor], functions)
        try:
            budget = CallBudget(probe, Prices({PUSH: Price(500.0, 1000.0, 900.0)}, {}))
            target.order("rate 200000 1")
            gone: list[str] = []
            for _ in range(5):
                gone += budget.look(time.monotonic_ns())
                time.sleep(0.15)
            assert gone == ["hot"] and probe.attached == (0,)
            assert budget.budget.given_up["1"] == pytest.approx(0.2, rel=0.5)
            target.hear()
        finally:
            probe.close()
            target.close()
