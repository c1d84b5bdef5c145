"""An alert's sentence says the work, the reasons of the expectation, and what it took; its numbers add up."""

from __future__ import annotations

import re

import pytest
from detect_streams import serving, steady
from hypothesis import given
from hypothesis import strategies as st

from latencyprism.detect import Detector, Firing
from latencyprism.detect.wording import plain_terms, sentence, work_in_words
from latencyprism.records.step import Step


def test_the_sentence_of_the_documentation() -> None:
    step = Step("vllm", 0, 0, 7, 0, 39_000_000, "mixed", 19, 1, 18, 512, 18, 0, 41_000)
    terms = {"base": 8.0, "cells": 1.0, "batch": 6.2, "context": 4.4, "prefill": 4.0, "attention": 0.5}
    firing = Firing(7, "page", "shift", 3, 39.0, 24.1, 0.62, 1, True, True, terms, 14.9)
    assert sentence(step, firing) == (
        "18 decode + 1 chunk of 512 tokens, 41k context: expected 24.1 ms "
        "(base 9.0, decode 6.2, context 4.4, prefill 4.5), took 39.0 ms"
    )


def test_words_for_work_that_is_told_in_part_or_not_at_all() -> None:
    assert work_in_words(Step("e", 0, 0, 0, 0, 1)) == "a step"
    drafted = Step(
        "e", 0, 0, 0, 0, 1, None, 4, 0, 4, 0, 16, draft_tokens=12, context_tokens=1500, preempted=2
    )
    assert work_in_words(drafted) == "4 decode of 16 tokens (12 drafted), 1.5k context, 2 preempted"
    chunks = Step("e", 0, 0, 0, 0, 1, None, 3, 3, 0, 700, 0)
    assert work_in_words(chunks) == "3 chunks of 700 tokens"


@given(st.dictionaries(
    st.sampled_from(["base", "cells", "batch", "context", "prefill", "attention", "machine"]),
    st.floats(-50, 500),
))  # fmt: skip
def test_plain_terms_keep_the_sum_and_none_but_the_machine_is_negative(terms: dict[str, float]) -> None:
    found = plain_terms(terms)
    work = sum(value for name, value in terms.items() if name != "machine")
    if work > 0:
        told = sum(value for name, value in found.items() if name != "machine")
        assert told == pytest.approx(work, abs=0.05 * sum(map(abs, terms.values())) + 0.25)


def test_every_firing_says_what_would_be_told_at_this_noise() -> None:
    seen = {}
    for sd in (0.005, 0.15):
        detector = Detector()
        found = [f for step in serving(((1200, 8, 100, 60),), sd=sd) if (f := detector.observe(step))]
        found += [f for step in steady(3, base_ms=900.0) if (f := detector.observe(step))]
        assert found
        seen[sd] = found[-1].detectable
        assert 0.0 < seen[sd]["evidence"] < seen[sd]["page"]
    assert seen[0.005]["evidence"] < 0.06 < seen[0.15]["evidence"]
    assert re.fullmatch(r"0\.\d+", str(seen[0.005]["page"]))
