"""What a load asks for is bounded, reproducible and fits the context."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latencyprism.errors import BadInput
from latencyprism.lab.profiles import PROFILES, Length, Profile, profile


@given(st.sampled_from(sorted(PROFILES)), st.integers(0, 2**32), st.integers(64, 4096))
def test_prompt_and_answer_fit_the_context(name: str, seed: int, context: int) -> None:
    wanted = profile(name).but(context=context, prefix=min(profile(name).prefix, context // 4))
    prompt, output = wanted.draw(random.Random(seed))
    assert len(prompt) >= 1 + wanted.prefix
    assert output >= 1
    assert len(prompt) + output <= context
    assert all(3 + 256 <= token < 2048 for token in prompt)


def test_same_seed_same_lengths() -> None:
    draws = [[profile("mixed").draw(rng) for _ in range(20)] for rng in (random.Random(4), random.Random(4))]
    assert draws[0] == draws[1]
    assert len({len(prompt) for prompt, _ in draws[0]}) > 5


def test_prefix_is_shared_and_the_rest_is_not() -> None:
    rng = random.Random(1)
    first, second = (profile("prefix").draw(rng)[0] for _ in range(2))
    assert first[:512] == second[:512]
    assert first[512:] != second[512:]


def test_length_is_clipped_and_fixed_without_sigma() -> None:
    rng = random.Random(0)
    assert {Length(16).draw(rng) for _ in range(10)} == {16}
    drawn = [Length(100, 2.0, 8, 300).draw(rng) for _ in range(500)]
    assert min(drawn) == 8
    assert max(drawn) == 300


def test_nonsense_is_refused() -> None:
    with pytest.raises(BadInput, match="no load profile"):
        profile("nothing")
    with pytest.raises(BadInput):
        profile("mixed").but(clients=0)
    with pytest.raises(BadInput):
        Profile("x", 1, Length(1), Length(1), rate=float("nan"))
