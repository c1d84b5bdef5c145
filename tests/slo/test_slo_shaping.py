"""The shaper keeps answers going while long prompts come in, asks little of them, and does not oscillate."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latencyprism.bench.guarding import arrivals, turns
from latencyprism.bench.simulated_engine import SimulatedEngine
from latencyprism.bench.traces import Arrival
from latencyprism.detect import Detector
from latencyprism.records import Request, Step
from latencyprism.slo.forecast import Forecaster
from latencyprism.slo.pace import Pace
from latencyprism.slo.shaping import CALM_NS, CHANGE, LEAST_CHUNK, RAISE_NS, SLOWEST_PROMPTS, Shaper

S = 1_000_000_000
WHOLE = 1024
LIMIT_S = 0.03


class MadeUp:
    """A pace by a formula: 10 ms, 0.1 ms a decode, ``token_ms`` a prompt token."""

    def __init__(self, decodes: int = 8, token_ms: float = 0.2) -> None:
        self.last = SimpleNamespace(decode_tokens=decodes)
        self.decodes = float(decodes)
        self.token_ms = token_ms

    def step_s(self, decodes: int, prefill: int, reach: float = 0.0) -> float:
        return (10.0 + 0.1 * decodes + self.token_ms * prefill) / 1e3


def decide(shaper: Shaper, pace: Any, prompts: int, now_s: float) -> int | None:
    return shaper.decide(cast(Pace, pace), prompts, 100.0, WHOLE, int(now_s * S))


def test_nothing_is_done_without_need() -> None:
    assert decide(Shaper(LIMIT_S), MadeUp(), 0, 5) is None  # no prompt
    assert decide(Shaper(LIMIT_S), MadeUp(0), 5000, 5) is None  # nobody is decoding
    assert decide(Shaper(LIMIT_S), MadeUp(), 20, 5) is None  # a short prompt
    assert decide(Shaper(LIMIT_S), MadeUp(token_ms=0.001), 5000, 5) is None  # fast enough as it is


def test_a_long_prompt_gets_chunks_that_fit_the_limit() -> None:
    shaper, pace = Shaper(LIMIT_S), MadeUp()
    tokens = decide(shaper, pace, 5000, 5)
    assert tokens is not None and 8 + LEAST_CHUNK <= tokens < WHOLE
    assert pace.step_s(8, tokens - 8) <= LIMIT_S
    told = shaper.estimate
    assert told is not None and told.step_ms <= LIMIT_S * 1e3 < told.step_ms_before
    assert told.chunk == tokens - 8
    assert told.prompt_tokens_per_s >= SLOWEST_PROMPTS * told.prompt_tokens_per_s_before


def test_no_knob_is_turned_where_that_would_change_nothing() -> None:
    """Steps too long for what they decode, not for their prompts."""

    class Slow(MadeUp):
        def step_s(self, decodes: int, prefill: int, reach: float = 0.0) -> float:
            return 0.040 + 0.000001 * prefill

    shaper = Shaper(LIMIT_S)
    assert decide(shaper, Slow(), 5000, 5) is None and shaper.estimate is None and shaper.changes == 0


def mixed(decodes: int, prefill: int, took_s: float) -> Step:
    took_ns = int(took_s * S)
    return Step(
        "vllm", 0, 0, 1, S, S + took_ns, None, decodes + 1, 1, decodes, prefill, decodes, 0, 0, prefill * 100
    )


def test_chunks_shrink_until_steps_really_are_short_enough() -> None:
    """An engine whose small chunks take 1.4 times what larger ones promised."""

    class Quick(MadeUp):
        def step_s(self, decodes: int, prefill: int, reach: float = 0.0) -> float:
            return (4.0 + 0.1 * decodes + 0.2 * prefill) / 1e3

    shaper, pace = Shaper(LIMIT_S), Quick()
    first = decide(shaper, pace, 5000, 5)
    assert first is not None
    tokens, now_s = first, 5.0
    for _ in range(200):
        now_s += 0.05
        took_s = 1.4 * pace.step_s(8, tokens - 8)
        shaper.saw(cast(Pace, pace), mixed(8, tokens - 8, took_s))
        tokens = decide(shaper, pace, 5000, now_s) or tokens
    assert tokens < first and 1.4 * pace.step_s(8, tokens - 8) <= LIMIT_S
    assert shaper.changes <= 4
    told = shaper.estimate
    assert told is not None and told.step_ms == pytest.approx(1.4e3 * pace.step_s(8, told.chunk), rel=0.1)


def test_steps_of_no_limit_or_beyond_it_teach_the_shaper_nothing() -> None:
    shaper, pace = Shaper(LIMIT_S), MadeUp()
    for _ in range(50):
        shaper.saw(cast(Pace, pace), mixed(8, 64, 1.0))
    assert shaper.late == 0.0
    tokens = decide(shaper, pace, 5000, 5)
    assert tokens is not None
    for step in (mixed(8, tokens, 1.0), mixed(0, 16, 1.0), mixed(8, 0, 1.0)):
        shaper.saw(cast(Pace, pace), step)
    assert shaper.late == 0.0


def test_where_prompts_would_starve_it_gives_way() -> None:
    """Where small chunks are hopelessly dear, prompts keep their share, though the limit is then missed."""

    class Dear(MadeUp):
        def step_s(self, decodes: int, prefill: int, reach: float = 0.0) -> float:
            return 0.028 + 0.00002 * prefill

    shaper = Shaper(LIMIT_S)
    tokens = decide(shaper, Dear(), 5000, 5)
    told = shaper.estimate
    if tokens is not None:
        assert told is not None
        assert told.prompt_tokens_per_s >= SLOWEST_PROMPTS * told.prompt_tokens_per_s_before


def test_it_is_lifted_when_not_needed_for_long_and_not_before() -> None:
    shaper, pace = Shaper(LIMIT_S), MadeUp()
    tokens = decide(shaper, pace, 5000, 5)
    assert decide(shaper, pace, 0, 5 + CALM_NS / S - 0.1) == tokens
    assert decide(shaper, pace, 0, 5 + CALM_NS / S) is None
    assert shaper.changes == 2


def test_small_changes_are_not_made_and_none_too_soon() -> None:
    shaper = Shaper(LIMIT_S)
    tokens = decide(shaper, MadeUp(token_ms=0.2), 5000, 5)
    assert decide(shaper, MadeUp(token_ms=0.22), 5000, 10) == tokens
    assert decide(shaper, MadeUp(token_ms=0.02), 5000, 5 + RAISE_NS / S / 2) == tokens
    assert decide(shaper, MadeUp(token_ms=0.05), 5000, 5 + 2 * RAISE_NS / S) not in (None, tokens)


def test_what_is_wanted_now_and_then_raises_nothing() -> None:
    shaper = Shaper(LIMIT_S)
    tokens = decide(shaper, MadeUp(token_ms=0.2), 5000, 5)
    for second in range(6, 40):
        dear = 0.2 if second % 4 == 0 else 0.05
        assert decide(shaper, MadeUp(token_ms=dear), 5000, second) == tokens
    for second in range(40, 41 + RAISE_NS // S):
        raised = decide(shaper, MadeUp(token_ms=0.05), 5000, second)
    assert tokens is not None and raised is not None and raised > tokens


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 64), st.integers(0, 50_000), st.floats(0.0, 5.0), st.integers(-(10**10), 10**10)
        ),
        max_size=60,
    )
)
def test_whatever_comes_it_stays_in_bounds(moments: list[tuple[int, int, float, int]]) -> None:
    """Any load, any clock: within the engine's own limit, a chunk for prompts, calm."""
    shaper, seen = Shaper(LIMIT_S), []
    for decodes, prompts, token_ms, now in moments:
        tokens = shaper.decide(cast(Pace, MadeUp(decodes, token_ms)), prompts, 100.0, WHOLE, now)
        assert tokens is None or LEAST_CHUNK <= tokens <= WHOLE + decodes
        seen.append(tokens)
    for before, after in pairwise(seen):
        if before and after and before != after:
            assert abs(after - before) >= CHANGE * before


class Outcome:
    """Simulated seconds with or without a shaper."""

    def __init__(self, plan: Sequence[Arrival], limit_s: float, guarded: bool, seed: int) -> None:
        run = SimulatedEngine(plan, slots=16, room=WHOLE, seed=seed, base_ms=8.0, token_ms=0.3)
        detector, shaper = Detector(), Shaper(limit_s)
        forecaster = Forecaster(detector.model, None, int(limit_s * S))
        self.ended: list[Request] = []
        self.tokens: list[int | None] = [None]
        while not run.over:
            step, ended = run.step()
            if step is None:
                continue
            detector.observe(step)
            forecaster.steps([step])
            forecaster.ended(ended)
            self.ended += ended
            if guarded:
                outlook = forecaster.look(run.now_ns, run.under_way())
                tokens = shaper.decide(
                    forecaster.pace, outlook.prompt_tokens, outlook.prompt_reach, WHOLE, run.now_ns
                )
                run.room = WHOLE if tokens is None else tokens
                if tokens != self.tokens[-1]:
                    self.tokens.append(tokens)
        self.seconds = (run.now_ns - S) / S
        tpot = np.array([r.tpot_ns for r in self.ended if r.tpot_ns is not None], dtype=float) / 1e9
        self.violated = float(np.mean(tpot > limit_s))


@pytest.mark.parametrize("seed", [1, 2])
def test_bursts_of_long_prompts_on_a_simulated_engine(seed: int) -> None:
    plan = arrivals(90.0, seed)
    without, shaped = (Outcome(plan, LIMIT_S, guarded, seed) for guarded in (False, True))
    assert without.violated > 0.15
    assert shaped.violated < 0.5 * without.violated
    assert len(shaped.ended) == len(without.ended) and shaped.seconds < 1.1 * without.seconds
    assert turns(shaped.tokens) <= len(shaped.tokens) <= 25


def test_turns_are_counted() -> None:
    assert turns([]) == turns([100]) == turns([None, 100, 50, 20]) == turns([20, 50, None]) == 0
    assert turns([None, 100, None]) == 1 and turns([100, 50, 100, 50, 100]) == 3
    assert turns([100, 100, 100]) == 0
