"""What waits of prompts, from steps alone."""

from __future__ import annotations

from latencyprism.records import Step
from latencyprism.slo.prompts_seen import PromptsSeen


def step(prefill: int, decode: int, waiting: int, prompts: int = 1, reach: int = 100) -> Step:
    return Step("sglang", 0, 0, 1, 0, 10, None, prefill_requests=prompts if prefill else 0,
                prefill_tokens=prefill, decode_tokens=decode, attention_work=prefill * reach,
                waiting=waiting)  # fmt: skip


def test_a_full_step_leaves_something_over() -> None:
    seen = PromptsSeen()
    seen.saw(step(1000, 24, 0), 1024, 1024)
    assert seen.tokens == 1024 and seen.reach == 100
    seen.saw(step(200, 24, 0), 1024, 1024)
    assert seen.tokens == 0


def test_under_a_limit_a_full_step_is_one_of_that_size() -> None:
    seen = PromptsSeen()
    seen.saw(step(104, 24, 0), 128, 1024)
    assert seen.tokens == 1024


def test_those_that_wait_are_as_long_as_those_that_came() -> None:
    seen = PromptsSeen()
    seen.saw(step(0, 8, 3), 1024, 1024)
    assert seen.tokens == 0  # nothing is known of their length
    seen.saw(step(300, 8, 5, prompts=3), 1024, 1024)
    assert seen.tokens == 500
    seen.saw(step(0, 8, 0), 1024, 1024)
    assert seen.tokens == 0
