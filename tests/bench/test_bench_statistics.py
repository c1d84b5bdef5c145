"""The interval that the overhead figures stand on."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latencyprism.bench.statistics import ratio_interval, resolution


@given(st.lists(st.floats(0.5, 2.0), min_size=1, max_size=40))
def test_median_lies_in_its_interval(ratios: list[float]) -> None:
    median, low, high = ratio_interval(ratios)
    assert low <= median <= high and min(ratios) <= low and high <= max(ratios)


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(3)
    inside = 0
    for seed in range(120):
        _, low, high = ratio_interval(list(generator.lognormal(0.0, 0.1, 30)), seed=seed)
        inside += low <= 1.0 <= high
    assert inside >= 105


def test_resolution_shrinks_with_pairs() -> None:
    generator = np.random.default_rng(5)
    few, many = (resolution(ratio_interval(list(generator.lognormal(0, 0.1, n)))) for n in (8, 200))
    assert many < few


def test_nothing_to_compare_is_an_error() -> None:
    with pytest.raises(ValueError):
        ratio_interval([])
