"""Figures of ``bench breakdown`` and ``bench clocks`` from what is known beforehand."""

from __future__ import annotations

import random

import pytest

from latencyprism.bench import breakdown, clocks
from latencyprism.bench.simulated_clocks import HALF_DRIFT, HALF_WANDER, SimulatedClock
from latencyprism.errors import PrismError
from latencyprism.recorder import Capture
from latencyprism.records import Span, Step

MS = 1_000_000


def captured(blind: int) -> Capture:
    """100 steps of 10 ms; the last ``blind`` without a record of the worker."""
    steps, spans = [], []
    for number in range(100):
        at = number * 11 * MS
        steps.append(
            Step("vllm", 0, 0, number, at, at + 10 * MS, "decode", schedule_ns=MS, execute_ns=8 * MS,
                 update_ns=MS, gap_ns=MS if number else None, running=1, gc_ns=MS // 10)
        )  # fmt: skip
        if number < 100 - blind:
            spans.append(Span(("Worker 9",), "execute_model", at + 2 * MS, at + 8 * MS))
    return Capture(steps=[*steps, Step("vllm", 0, 0, 100, 2000 * MS, 2001 * MS)], spans=spans)


def test_shares_of_parts_and_of_what_stays_unexplained() -> None:
    told = breakdown.told(captured(0))
    assert told["steps"] == 100, "a step without work does not count"
    assert told["shares"] == {"schedule": 0.1, "launch": 0.1, "execute": 0.6, "return": 0.1, "update": 0.1}
    assert (told["unexplained_p95"], told["largest_sum_error_ns"]) == (0.0, 0)
    assert (told["gap_share"], told["idle_share"], told["gc_share"]) == (0.099, 0.0, 0.01)
    assert told["states"] is None and told["major_faults"] is None


def test_the_worse_capture_decides_and_a_missed_target_is_said() -> None:
    found = breakdown.result(
        "vllm", {"always": breakdown.told(captured(0)), "deep": breakdown.told(captured(8))}
    )
    assert found["unexplained_median"] == 0.0 and found["unexplained_p95"] == pytest.approx(0.8)
    assert found["met"] is False and found["target"] == {"unexplained_median": 0.05, "unexplained_p95": 0.10}
    with pytest.raises(PrismError, match="nothing to break down"):
        breakdown.told(Capture())


def test_simulated_clocks_stay_within_what_they_promise() -> None:
    for seed in range(20):
        clock = SimulatedClock.drawn(random.Random(seed), 30)
        shown = [clock.read(at * MS) for at in range(0, 30_000, 10)]
        rates = [(b - a) / (10 * MS) - 1 for a, b in zip(shown, shown[1:])]  # noqa: RUF007 - one look
        assert max(map(abs, rates)) <= HALF_DRIFT + 1e-6
        assert max(abs(b - a) for a, b in zip(rates, rates[100:])) <= HALF_WANDER * 1.01e9 + 1e-6


def test_a_bound_that_is_too_small_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    good = clocks.run(6, 3, 0, lambda text: None)
    assert good["violations"] == 0 and good["orders"]["wrong"] == 0 and good["checks"] > 100
    assert good["namespaces"] == "not asked for"
    monkeypatch.setattr(clocks, "LIMITS", type(clocks.LIMITS)(drift_ppm=1.0, wander_ppm_per_s=0.0))
    assert clocks.run(6, 3, 0, lambda text: None)["violations"] > 0
