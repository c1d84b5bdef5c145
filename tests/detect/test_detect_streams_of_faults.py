"""Streams that once misled: what was learned during a fault, drafts, preemption, clocks that jump."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator

import pytest
from detect_streams import steady

from latencyprism.detect import Detector, Firing
from latencyprism.detect.faster import Faster
from latencyprism.records.step import Step


def firings(steps: Iterable[Step], detector: Detector) -> list[Firing]:
    return [firing for step in steps if (firing := detector.observe(step)) is not None]


def one_batch(count: int, batch: int, ms: float, first: int, seed: int = 0) -> Iterator[Step]:
    rng = random.Random(seed + first)
    for number in range(first, first + count):
        start = 10**9 + number * 60_000_000
        took = ms * math.exp(rng.gauss(0.0, 0.01))
        yield Step("e", 0, 0, number, start, start + int(took * 1e6), None, batch, 0, batch, 0, batch)


def test_a_batch_size_learned_during_a_fault_does_not_spoil_the_others() -> None:
    """Its clean steps are much faster than expected: that is its own affair, not a faster engine."""
    detector = Detector()
    firings(one_batch(300, 4, 20.0, 0), detector)
    firings(one_batch(200, 16, 2 * 24.0, 300), detector)  # a fault from its very first step on
    firings(one_batch(900, 16, 24.0, 500), detector)
    found = firings(one_batch(600, 4, 20.0, 1400), detector)
    assert not found
    assert detector.moved == 0.0
    assert detector.last is not None and detector.last.ms == pytest.approx(20.0, rel=0.05)
    assert firings(one_batch(60, 16, 24.0, 2000), detector) == []
    assert detector.last.ms == pytest.approx(24.0, rel=0.1)


def test_an_engine_that_is_faster_at_everything_is_taken_at_its_word() -> None:
    detector = Detector()
    for turn in range(12):
        firings(one_batch(60, 4 + turn % 4, 20.0 + turn % 4, 60 * turn), detector)
    found = []
    for turn in range(12, 30):
        found += firings(one_batch(60, 4 + turn % 4, 0.7 * (20.0 + turn % 4), 60 * turn), detector)
    assert not found
    assert detector.moved == pytest.approx(math.log(0.7), abs=0.05)


def test_faster_needs_several_kinds_that_say_the_same() -> None:
    faster = Faster()
    for _ in range(40):
        for key in (1, 2, 3):
            faster.take(key, -0.3)
    assert faster.verdict()[0] == pytest.approx(-0.3)
    for _ in range(40):
        faster.take(4, -0.9)
    assert faster.verdict()[0] is None and faster.verdict()[1][4] == pytest.approx(-0.9)
    for _ in range(100):
        faster.ease()
    assert faster.verdict() == (None, {})


def speculative(count: int, seed: int) -> Iterator[Step]:
    """Each of eight requests brings up to four drafts; how many are accepted changes no step's time."""
    rng, now = random.Random(seed), 10**9
    for number in range(count):
        drafts = sum(rng.randint(0, 4) for _ in range(8))
        width = 8 + drafts
        took = (12.0 + 0.25 * ((width + 7) // 8 * 8)) * math.exp(rng.gauss(0.0, 0.01))
        end = now + int(took * 1e6)
        yield Step("e", 0, 0, number, now, end, "decode", 8, 0, 8, 0, width, 0, 4000 + number % 50, 0,
                   draft_tokens=drafts, accepted_tokens=rng.randint(0, drafts))  # fmt: skip
        now = end + 50_000


def test_drafts_are_work_and_a_slow_down_beneath_them_is_seen() -> None:
    detector = Detector()
    assert not firings(speculative(1500, 1), detector)
    slow = [step._replace(end_ns=step.end_ns + step.duration_ns // 10) for step in speculative(200, 2)]
    assert firings(slow, detector)


def test_a_preemption_and_its_recomputation_are_work() -> None:
    """A request that is put off comes back with all its context as prefill tokens."""
    rng, detector, now, found = random.Random(4), Detector(), 10**9, []
    for number in range(2500):
        again = 400 if number % 50 == 0 else 0
        took = (15.0 + again * 0.1) * math.exp(rng.gauss(0.0, 0.01))
        end = now + int(took * 1e6)
        phase = "mixed" if again else "decode"
        step = Step("e", 0, 0, number, now, end, phase, 8, int(bool(again)), 7, again, 7, 0, 3000,
                    again * 400, preempted=int(number % 50 == 45))  # fmt: skip
        firing = detector.observe(step)
        found += [firing] if firing and number > 300 else []
        now = end + 50_000
    assert not found


@pytest.mark.parametrize("jump_ns", [-(10**12), -1, 10**15, 3_600_000_000_000])
def test_a_clock_that_jumps_is_no_incident(jump_ns: int) -> None:
    steps = list(steady(1500, sd=0.01, seed=6))
    steps = [
        step._replace(start_ns=step.start_ns + jump_ns, end_ns=step.end_ns + jump_ns, gap_ns=None)
        if step.step >= 1000 else step
        for step in steps
    ]  # fmt: skip
    assert not firings(steps, Detector())


def test_one_request_ever_and_steps_that_never_vary() -> None:
    detector = Detector()
    assert not firings(one_batch(1, 1, 20.0, 0), detector)
    constant = [
        Step("e", 0, 0, number, number * 30_000_000, number * 30_000_000 + 20_000_000, None, 1, 0, 1, 0, 1)
        for number in range(1, 2000)
    ]
    assert not firings(constant, detector)
    slower = [step._replace(end_ns=step.end_ns + 3_000_000) for step in constant[:100]]
    assert firings(slower, detector)


def test_a_drift_of_hours_is_followed() -> None:
    """10 % over 20,000 steps, as a machine that warms up; a tenth in one go at its end is not drift."""
    detector, slow = Detector(), list(steady(20_000, sd=0.01, seed=9))
    slow = [s._replace(end_ns=s.end_ns + int(s.duration_ns * 0.1 * s.step / 20_000)) for s in slow]
    assert not [f for f in firings(slow, detector) if f.level == "page"]
    more = [s._replace(step=s.step + 20_000, end_ns=s.end_ns + int(s.duration_ns * 0.21))
            for s in steady(200, sd=0.01, seed=10)]  # fmt: skip
    assert [f for f in firings(more, detector) if f.level == "page"]
