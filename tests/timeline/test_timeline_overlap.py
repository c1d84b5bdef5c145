"""Streams of events as the loops of engines make them, and what of each step is host, device, and both."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from latencyprism.records import Span, Step
from latencyprism.timeline.breakdown import SpanIndex, break_down
from latencyprism.timeline.overlap import Overlap, overlaps

US = 1000
WORKER = ("Worker 815",)


@dataclass
class Stream:
    """Events in the order in which an engine makes them; times in us."""

    steps: list[Step] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)

    def step(
        self, start: int, scheduled: int, executed: tuple[int, int] | None, updating: int, end: int,
        sampled: tuple[int, int] | None = None, **columns: Any,
    ) -> None:  # fmt: skip
        self.steps.append(
            Step(
                "vllm", 0, 0, len(self.steps), start * US, end * US, schedule_ns=(scheduled - start) * US,
                update_ns=(end - updating) * US, execute_ns=(updating - scheduled) * US, **columns,
            )
        )  # fmt: skip
        for name, seen in (("execute_model", executed), ("sample_tokens", sampled)):
            if seen is not None:
                self.spans.append(Span(WORKER, name, seen[0] * US, seen[1] * US))

    def found(self) -> list[Overlap]:
        told = break_down(self.steps, SpanIndex.of(self.spans))
        assert all(sum(one.sums.values()) == one.step.duration_ns for one in told)
        return overlaps(told)


def us(found: list[Overlap]) -> list[tuple[float, float | None]]:
    """(host, overlap) of each step in us."""
    return [(one.host_ns / US, None if one.overlap_ns is None else one.overlap_ns / US) for one in found]


def test_a_normal_loop_does_one_after_the_other() -> None:
    stream = Stream()
    for n in range(3):
        at = n * 2000
        stream.step(at, at + 100, (at + 150, at + 1500), at + 1900, at + 1950, (at + 1520, at + 1880))
    found = stream.found()
    assert us(found) == [(150, 0)] * 3
    assert found[1].device == (2150 * US, 3880 * US)


def test_an_overlapped_loop_schedules_and_updates_while_the_device_executes() -> None:
    stream = Stream()
    stream.step(0, 100, (150, 1100), 1150, 1200)
    stream.step(300, 400, (1110, 2200), 2250, 2300)
    stream.step(1300, 1400, (2210, 3300), 3350, 3400)
    found = stream.found()
    # Of the first only its update lies in another's execution; of the last only its scheduling.
    assert us(found) == [(150, 50), (150, 150), (150, 100)]


def test_a_speculative_loop_drafts_within_the_device_interval() -> None:
    stream = Stream()
    for n in range(2):
        at = n * 3000
        stream.step(
            at, at + 120, (at + 150, at + 1800), at + 2800, at + 2900, (at + 1810, at + 2750),
            draft_tokens=12, accepted_tokens=7, decode_tokens=11,
        )  # fmt: skip
    found = stream.found()
    assert us(found) == [(220, 0)] * 2
    assert [one.device for one in found] == [(150 * US, 2750 * US), (3150 * US, 5750 * US)]


def test_a_chunk_of_a_prompt_samples_nothing_and_has_its_device_interval_all_the_same() -> None:
    stream = Stream()
    stream.step(0, 100, (150, 9000), 9050, 9100, prefill_tokens=256, prefill_requests=1)
    stream.step(9200, 9300, (9350, 10_500), 10_900, 10_950, (10_510, 10_880), decode_tokens=4)
    found = stream.found()
    assert us(found) == [(150, 0), (150, 0)]
    assert found[0].device == (150 * US, 9000 * US)


def test_a_step_that_only_preempts_or_frees_has_no_device_interval() -> None:
    stream = Stream()
    stream.step(0, 100, (150, 1500), 1550, 1600)
    stream.step(1700, 1900, None, 1950, 2000, preempted=2)
    stream.step(2100, 2200, (2250, 3500), 3550, 3600)
    found = stream.found()
    assert us(found) == [(150, 0), (250, None), (150, 0)]
    assert found[1].device is None


def test_a_decode_instance_that_waits_for_caches_of_a_prefill_instance() -> None:
    """Its loop turns while transfers are under way: steps without work, then one that decodes."""
    stream = Stream()
    for at in (0, 200, 400):
        stream.step(at, at + 60, None, at + 80, at + 100, waiting=1)
    stream.step(600, 700, (760, 1900), 1950, 2000, decode_tokens=1)
    assert us(stream.found()) == [(80, None)] * 3 + [(150, 0)]


@settings(deadline=None)
@given(
    st.lists(st.tuples(*[st.integers(1, 900)] * 5, st.booleans(), st.booleans()), max_size=12),
)
def test_an_overlap_is_never_more_than_the_host_work(
    raw: list[tuple[int, int, int, int, int, bool, bool]],
) -> None:
    stream, start = Stream(), 0
    for schedule, launch, execute, back, update, overlaps_next, seen in raw:
        scheduled = start + schedule
        executed = (scheduled + launch, scheduled + launch + execute)
        updating = executed[1] + back
        stream.step(start, scheduled, executed if seen else None, updating, updating + update)
        start = (start + updating) // 2 if overlaps_next else updating + update
    for one in stream.found():
        assert one.overlap_ns is None or 0 <= one.overlap_ns <= one.host_ns
        assert one.device is None or one.device[0] < one.device[1]
