"""What is usual is learned, probe and watch agree on what is long, and steps that wait are handed on."""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latencyprism.agent.probe.lane import worth_waking
from latencyprism.attach.process import read_process
from latencyprism.engines.discovery import Member, Replica
from latencyprism.records import NULL, Step, Usual, Window, ring
from latencyprism.sentinel import replica_watch
from latencyprism.sentinel.habit import LONG_SHARE, NEVER, Habit
from latencyprism.sentinel.replica_watch import NAP_S, SHORT_NAP_S, VAGUE_NAP_S, WARY_NAP_S, ReplicaWatch
from latencyprism.sentinel.targets import Attachment

MS = 1_000_000


def step(
    number: int, ms: float, decode: int | None = 4, prefill: int | None = 0, gap: int | None = 0
) -> Step:
    start = number * 100 * MS
    return Step(
        "vllm", 0, 0, number, start, start + int(ms * MS), decode_tokens=decode, prefill_tokens=prefill,
        gap_ns=gap, running=decode,
    )  # fmt: skip


def learned(steps: list[Step]) -> Habit:
    habit = Habit()
    for one in steps:
        habit.take(one)
    habit.look(10**12)
    return habit


def test_prices_of_tokens_are_found_and_few_are_long() -> None:
    rng = np.random.default_rng(1)
    steps = []
    for number in range(256):
        decode, prefill = int(rng.integers(1, 9)), int(rng.integers(16, 257)) if rng.random() < 0.2 else 0
        ms = (3.0 + decode + 0.8 * prefill) * float(np.exp(rng.normal(0.0, 0.02)))
        steps.append(step(number, ms, decode, prefill))
    usual = learned(steps).usual
    assert usual is not None
    assert abs(usual.decode_ns / MS - 1.0) < 0.15 and abs(usual.prefill_ns / MS - 0.8) < 0.1
    long = sum(usual.long(one) for one in steps) / len(steps)
    assert 0.5 * LONG_SHARE < long < 1.5 * LONG_SHARE
    assert usual.long(step(1, 14.0, 8)) and not usual.long(step(1, 10.5, 8)) and usual.long(step(1, 10.5, 4))


def test_what_steps_without_prompts_last_is_told_apart() -> None:
    steps = [step(n, 5.0 + n % 10 * 0.01, gap=MS) for n in range(90)]
    steps += [step(n, 200.0, 4, 128) for n in range(90, 120)]
    usual = learned(steps).usual
    assert usual is not None and abs(usual.bare_ns - 6.08 * MS) < 0.05 * MS


def test_counts_that_were_not_observed_have_no_price() -> None:
    habit = learned([step(number, 5.0 + number % 7 * 0.01, None, None, None) for number in range(100)])
    assert habit.usual is not None
    assert habit.usual.prefill_ns == 0 and habit.usual.decode_ns == 0
    assert not habit.usual.long(step(1, 5.0, None, None, None))
    assert habit.usual.long(step(1, 6.0, None, None, None))


def test_too_few_steps_or_many_long_ones_make_it_wary() -> None:
    habit = learned([step(number, 5.0) for number in range(20)])
    assert habit.usual is None and habit.vague
    habit = learned([step(number, 5.0) for number in range(100)])
    assert habit.usual is not None and not habit.wary and not habit.vague
    for number in range(100, 112):
        habit.take(step(number, 6.0))
    assert habit.usual is not None and habit.wary
    for number in range(112, 150):
        habit.take(step(number, 5.0))
    assert not habit.wary


def test_durations_that_tell_little_are_not_slept_through() -> None:
    rng = np.random.default_rng(2)
    wild = [step(number, 5.0 * float(np.exp(rng.normal(0.0, 0.5)))) for number in range(256)]
    found = learned(wild)
    assert found.vague and found.usual is not None and found.usual.long(step(1, 60.0))
    calm = [step(number, 5.0 * float(np.exp(rng.normal(0.0, 0.15)))) for number in range(256)]
    assert not learned(calm).vague


def test_an_alert_about_a_step_that_was_not_long_makes_it_wary_for_a_while() -> None:
    habit = learned([step(number, 5.0 + number % 7 * 0.01) for number in range(100)])
    habit.alerted(step(100, 20.0))
    assert not habit.wary
    habit.alerted(step(101, 5.0))
    habit.take(step(102, 5.0))
    assert habit.wary
    habit.take(step(102 + 601, 5.0))  # a minute later
    assert not habit.wary


def test_durations_of_nothing_are_no_trouble() -> None:
    habit = learned([step(number, 0.0) for number in range(100)])
    assert habit.usual is not None and habit.usual.long(step(1, 1.0))


# Products stay below what a time in ns can be: the probe takes NULL, -2**63, into the sum.
COUNT = st.none() | st.integers(0, 1 << 20)
PRICE = st.integers(0, 1 << 40)


@given(
    took=st.integers(0, 1 << 50), decode=COUNT, prefill=COUNT, gap=st.none() | st.integers(0, 1 << 60),
    usual=st.builds(Usual, PRICE, PRICE, PRICE, st.integers(0, 1 << 62), PRICE),
)  # fmt: skip
def test_the_probe_wakes_for_what_the_watch_calls_long(
    took: int, decode: int | None, prefill: int | None, gap: int | None, usual: Usual
) -> None:
    seen = Step("e", 0, 0, 1, 1000, 1000 + took, decode_tokens=decode, prefill_tokens=prefill, gap_ns=gap)
    values = [0] * len(ring.STEP_WIRE)
    values[1], values[2] = seen.start_ns, seen.end_ns
    for at, value in ((ring.STEP_DECODE, decode), (ring.STEP_PREFILL, prefill), (ring.STEP_GAP, gap)):
        values[at] = NULL if value is None else value
    words = [0] * 64
    words[ring.H_WAITING] = ring.WAKE_LONG
    words[ring.H_WAKE_BASE_NS : ring.H_WAKE_GAP_NS + 1] = usual[:4]
    assert worth_waking(words, ring.KIND_STEP, values) == usual.long(seen)
    assert not worth_waking(words, ring.KIND_WORKER, values)
    if decode is not None and prefill == 0:
        short = [0] * ring.DECODE_WIRE_WORDS
        short[1:3], short[ring.DECODE_REQUESTS] = values[1:3], decode
        short[ring.DECODE_GAP] = values[ring.STEP_GAP]
        assert worth_waking(words, ring.KIND_DECODE, short) == usual.long(seen)
    words[ring.H_WAITING] = ring.WAKE_EACH
    assert worth_waking(words, ring.KIND_WORKER, values)


@given(
    took=st.lists(st.integers(0, 300), min_size=1, max_size=40), spare=st.integers(1, 500),
    typical=st.integers(0, 1024),
)  # fmt: skip
def test_the_probe_wakes_once_steps_are_late_by_the_spare_together(
    took: list[int], spare: int, typical: int
) -> None:
    words, base = [0] * 64, 400
    words[ring.H_WAITING] = ring.WAKE_LONG
    words[ring.H_WAKE_BASE_NS], words[ring.H_WAKE_GAP_NS] = base, 1 << 62
    words[ring.H_WAKE_TYPICAL], words[ring.H_WAKE_SPARE_NS] = typical, spare
    late = 0
    for ns in took:
        values = [0] * ring.DECODE_WIRE_WORDS
        values[1], values[2] = 1000, 1000 + ns
        late = max(0, late + ns - (base * typical >> 10))
        assert worth_waking(words, ring.KIND_DECODE, values) == (late >= spare)
        late = 0 if late >= spare else late
        assert words[ring.H_WAKE_LATE_NS] == late


def test_a_sum_that_no_word_can_hold_is_not_kept() -> None:
    words = memoryview(bytearray(8 * 64)).cast("q")
    words[ring.H_WAITING] = ring.WAKE_LONG
    words[ring.H_WAKE_BASE_NS] = words[ring.H_WAKE_GAP_NS] = words[ring.H_WAKE_SPARE_NS] = 2**63 - 1
    values = [0] * ring.DECODE_WIRE_WORDS
    values[2] = 2**63 - 1
    assert not worth_waking(words, ring.KIND_DECODE, [0] * ring.DECODE_WIRE_WORDS)
    assert worth_waking(words, ring.KIND_DECODE, values)
    assert words[ring.H_WAKE_LATE_NS] == 0


def test_no_step_is_long_that_is_not_longer_than_asked_for() -> None:
    habit = Habit()
    for number in range(100):
        habit.take(step(number, 5.0 + number % 7 * 0.01))
    habit.look(10**12, math.log(1.5))
    usual = habit.usual
    assert usual is not None and not usual.long(step(1, 7.4)) and usual.long(step(1, 7.7))
    assert usual.typical_1024 == pytest.approx(1024 / 1.5, abs=2)


def test_what_the_judge_expects_is_kept_while_a_fault_becomes_usual() -> None:
    habit = Habit()
    for number in range(256):
        habit.take(step(number, 5.0 + number % 7 * 0.01))
    habit.look(10**12)
    calm = habit.usual
    assert calm is not None and habit.expected_1024 == pytest.approx(calm.typical_1024, abs=1)
    for number in range(256, 512):
        slow = step(number, 10.0 + number % 7 * 0.01)
        habit.take(slow)
        habit.expect(slow, 5.03)
    habit.look(2 * 10**12)
    usual = habit.usual
    assert usual is not None and usual.typical_1024 > 1000
    assert habit.expected_1024 / 1024 * usual.limit_ns(4, 0) == pytest.approx(5.03 * MS, rel=0.01)


class Source:
    """Hands out steps that the test made, and keeps what it was told."""

    engine, lost = "vllm", 0

    def __init__(self) -> None:
        self.pids = (os.getpid(),)
        self.made: list[Step] = []
        self.told: list[Usual | None] = []
        self.adds_up = False
        self.spare: list[tuple[int, int]] = []

    def fileno(self) -> None:
        return None

    def poll(self) -> Window:
        steps, self.made = self.made, []
        return Window(steps)

    def settle(self) -> bool:
        return True

    def wake_beyond(self, usual: Usual | None) -> None:
        self.told.append(usual)

    def wake_late(self, typical_1024: int, spare_ns: int) -> bool:
        self.spare.append((typical_1024, spare_ns))
        return self.adds_up

    def renew(self) -> None: ...

    def arm_deep(self, seconds: float) -> None: ...

    def detached(self) -> None:
        return None

    def notices(self) -> list[str]:
        return []

    def close(self) -> None: ...


def watch_of(source: Source) -> ReplicaWatch:
    replica = Replica("vllm", 0, (Member(read_process(os.getpid()), "engine"),), "0.0")
    return ReplicaWatch(Attachment(replica, source, [], None))


def test_steps_are_judged_at_once_and_handed_on_later() -> None:
    source = Source()
    watch = watch_of(source)
    try:
        for number in range(5):
            source.made = [step(number, 5.0)]
            assert watch.look() == []
        assert watch.counts.steps == 5 and watch.recorder.latest_step() is None
        window, alerts = watch.hand_on(10**12)
        assert [one.step for one in window.steps] == [0, 1, 2, 3, 4] and alerts == []
        source.made = [step(5, 5.0)]
        watch.look()
        assert watch.hand_on(10**12 + replica_watch.HELD_NS - 1)[0].steps == []
        assert len(watch.hand_on(10**12 + replica_watch.HELD_NS)[0].steps) == 1
        watch.prompt = True
        source.made = [step(6, 5.0)]
        watch.look()
        assert len(watch.hand_on(10**12 + replica_watch.HELD_NS + 1)[0].steps) == 1
        assert watch.recorder.latest_step() == watch.last_step
    finally:
        watch.close()


def test_an_alert_comes_with_the_end_of_its_step_and_ends_the_wait() -> None:
    source = Source()
    watch = watch_of(source)
    try:
        source.made = [step(number, 5.0 + number % 5 * 0.01) for number in range(600)]
        assert watch.look() == []
        watch.hand_on(10**12)
        late = step(600, 80.0)
        source.made = [late]
        raised = watch.look()
        assert [(alert.step, end_ns) for alert, end_ns in raised] == [(600, late.end_ns)]
        window, alerts = watch.hand_on(10**12 + 1)
        assert [one.step for one in window.steps] == [600] and alerts == [raised[0][0]]
    finally:
        watch.close()


def test_the_source_is_told_what_is_usual_once_it_is_known() -> None:
    source = Source()
    watch = watch_of(source)
    try:
        source.made = [step(number, 5.0 + number % 5 * 0.01) for number in range(100)]
        watch.look()
        assert watch.settle() and source.told == [NEVER] and watch.nap_s == VAGUE_NAP_S
        watch.sample_host(10**13)
        watch.settle()
        watch.settle()
        assert len(source.told) == 2 and source.told[1] == watch._habit.usual
        assert watch.nap_s == NAP_S
        test = watch.detector._evidence
        test.fast = 0.6 * test.fast_limit
        assert watch.nap_s == WARY_NAP_S
        watch.detector.incident_open = True
        assert watch.nap_s == SHORT_NAP_S
        watch.detector.paging = True
        assert watch.nap_s == VAGUE_NAP_S
        watch.prompt = True
        assert watch.nap_s == SHORT_NAP_S
    finally:
        watch.close()


def test_where_the_source_adds_lateness_up_only_news_about_to_come_is_waited_for_awake() -> None:
    source = Source()
    source.adds_up = True
    watch = watch_of(source)
    try:
        source.made = [step(number, 5.0 + number % 5 * 0.01) for number in range(600)]
        watch.look()
        watch.settle()
        assert watch.nap_s == VAGUE_NAP_S and source.spare == [(1024, 0)]  # nothing is known yet
        watch.sample_host(10**13)
        watch.settle()
        usual, detector = watch._habit.usual, watch.detector
        assert usual is not None and watch.nap_s == NAP_S
        slack, room_ms = detector.room
        typical, spare_ns = source.spare[-1]
        assert typical == int(watch._habit.expected_1024 * math.exp(slack)) and 0 < spare_ns < room_ms * 1e6
        test = detector._evidence
        test.fast = 0.4 * test.fast_limit
        watch.settle()
        assert source.spare[-1][1] < spare_ns and watch.nap_s == NAP_S
        test.fast = 0.6 * test.fast_limit
        assert watch.nap_s == WARY_NAP_S
        detector.incident_open = True  # now a page is the next news
        watch.settle()
        assert source.spare[-1][1] > spare_ns and watch.nap_s == NAP_S
        detector._page.fast = 1.1 * detector._page.fast_limit
        assert detector.poised and watch.nap_s == SHORT_NAP_S
        detector.paging = True
        watch.settle()
        assert source.spare[-1] == (int(watch._habit.expected_1024), 17_500_000) and watch.nap_s == NAP_S
    finally:
        watch.close()
