"""What the detector says, and what it keeps quiet about, on streams of known truth."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Iterable

import pytest
from detect_streams import serving, steady
from hypothesis import given, settings
from hypothesis import strategies as st

from latencyprism.detect import Detector, Firing, Settings
from latencyprism.records.step import Step


def firings(steps: Iterable[Step], detector: Detector | None = None) -> list[Firing]:
    detector = detector or Detector()
    return [firing for step in steps if (firing := detector.observe(step)) is not None]


def pages(found: list[Firing]) -> list[Firing]:
    return [firing for firing in found if firing.level == "page"]


@pytest.mark.parametrize("rho", [0.0, 0.8])
@pytest.mark.parametrize("sd", [0.003, 0.05, 0.19])
def test_noise_alone_never_pages(sd: float, rho: float) -> None:
    assert not pages(firings(steady(3000, sd=sd, rho=rho, seed=7, batches=(1, 8, 40))))


def test_tension_rises_before_a_mild_shift_is_told_and_is_low_while_all_is_calm() -> None:
    detector, tensions = Detector(), []
    for step in steady(1600, sd=0.03, rho=0.3, seed=3, shift_at=1500, shift=0.06):
        firing = detector.observe(step)
        tensions.append(detector.tension)
        if firing is not None and step.step >= 1500 and firing.kind == "shift":
            break
    assert step.step > 1502 and tensions[-1] < tensions[-2] < 1.0  # it is told: a page is what comes next
    assert any(tension > 0.4 for tension in tensions[1500:-1])
    assert sum(tension < 0.4 for tension in tensions[300:1500]) > 0.8 * 1200


@pytest.mark.parametrize(("sd", "within"), [(0.003, 5), (0.01, 5), (0.03, 8), (0.06, 25)])
def test_a_shift_of_thirty_percent_pages(sd: float, within: int) -> None:
    found = pages(firings(steady(1600, sd=sd, rho=0.6, seed=3, shift_at=1500, shift=0.3)))
    assert found
    dwell_steps = Settings().page_dwell_ms / found[0].observed_ms
    assert 1500 <= found[0].step <= 1500 + within + 1.5 * dwell_steps
    assert found[0].kind == "shift"
    assert 1495 <= found[0].onset_step <= found[0].step
    assert found[0].excess == pytest.approx(0.3, abs=max(0.08, 4 * sd))


def test_a_mild_shift_is_evidence_before_it_is_a_page() -> None:
    found = firings(steady(2000, sd=0.009, rho=0.5, seed=5, shift_at=1500, shift=0.05))
    assert found
    assert 1500 <= found[0].step <= 1530
    assert found[0].level == "evidence"


@pytest.mark.parametrize("sd", [0.01, 0.07])
def test_single_stalls_of_fifty_ms_are_told(sd: float) -> None:
    stalls = dict.fromkeys(range(1000, 2000, 100), 50.0)
    told = {f.step: f for f in firings(steady(2000, base_ms=17.0, sd=sd, rho=0.5, seed=2, stalls=stalls))}
    assert set(stalls) <= set(told)
    assert all(told[number].kind == "stall" for number in stalls)


def test_an_idle_gap_while_requests_wait_is_a_stall() -> None:
    steps = list(steady(1500, sd=0.01))
    steps = [step._replace(gap_ns=400_000) for step in steps]
    steps[1200] = steps[1200]._replace(gap_ns=60_000_000)
    found = firings(steps)
    assert [f.step for f in found] == [1200]


def test_an_idle_gap_before_new_requests_is_none() -> None:
    steps = list(steady(1500, sd=0.01))
    steps[1200] = steps[1200]._replace(gap_ns=60_000_000, decode_requests=0, decode_tokens=0,
                                       prefill_requests=1, prefill_tokens=20)  # fmt: skip
    assert not firings(steps)


@pytest.mark.parametrize("tiny", [False, True])
@pytest.mark.parametrize(
    "phases",
    [
        ((800, 8, 100, 100), (500, 8, 1500, 100)),
        ((600, 4, 100, 100), (300, 16, 100, 100), (300, 64, 100, 100), (300, 160, 100, 60)),
        ((500, 2, 50, 100), (500, 32, 600, 50), (400, 128, 100, 100), (500, 1, 3000, 300)),
    ],
    ids=["longer prompts", "more clients", "everything"],
)
def test_workload_surges_do_not_page(phases: tuple[tuple[int, int, int, int], ...], tiny: bool) -> None:
    assert not pages(firings(serving(phases, tiny=tiny)))


@settings(max_examples=5, deadline=None)
@given(scale=st.sampled_from([0.1, 0.5, 10.0, 100.0]), seed=st.integers(0, 50))
def test_the_unit_of_time_does_not_matter(scale: float, seed: int) -> None:
    def told(factor: float) -> list[tuple[int, str, str, int]]:
        steps = steady(900, base_ms=200, sd=0.03, rho=0.7, seed=seed, shift_at=700, shift=0.25,
                       stalls={500: 300.0}, scale=factor)  # fmt: skip
        steps = (step._replace(gap_ns=None) for step in steps)
        # What a person would want to be called for is the one thing that is counted in milliseconds.
        detector = Detector(Settings(page_dwell_ms=0.0, page_hold_ms=0.0, page_stall_ms=0.0))
        return [(f.step, f.level, f.kind, f.onset_step) for f in firings(steps, detector)]

    assert told(1.0) == told(scale)


def test_a_wobble_that_is_over_soon_is_evidence_and_no_page() -> None:
    steps = list(steady(1500, base_ms=4.0, sd=0.01, seed=8))
    steps[1200:1230] = [s._replace(end_ns=s.end_ns + (s.end_ns - s.start_ns) // 2) for s in steps[1200:1230]]
    found = [f for f in firings(steps) if f.step >= 1200]
    assert found and not pages(found)
    steps[1200:1400] = [s._replace(end_ns=s.end_ns + (s.end_ns - s.start_ns) // 2) for s in steps[1200:1400]]
    assert pages(firings(steps))


def test_a_lone_stall_of_a_few_milliseconds_is_no_page() -> None:
    found = firings(steady(1500, base_ms=0.5, sd=0.01, seed=9, stalls={1200: 8.0, 1400: 60.0}))
    assert {(f.step, f.level) for f in found} == {(1200, "evidence"), (1400, "page")}


def test_a_lasting_fault_is_not_learned() -> None:
    detector = Detector()
    found = firings(steady(4000, sd=0.009, rho=0.5, seed=4, shift_at=1500, shift=0.15), detector)
    late = [f for f in found if f.step >= 3500]
    assert len(late) > 450
    assert detector.incident_open
    assert late[-1].excess == pytest.approx(0.15, abs=0.06)
    assert late[-1].incident == next(f for f in found if f.step >= 1500).incident


def test_an_incident_ends_after_its_cause() -> None:
    steps = list(steady(1500, sd=0.01, seed=8))
    steps[1200:1300] = [s._replace(end_ns=s.end_ns + (s.end_ns - s.start_ns) // 3) for s in steps[1200:1300]]
    detector = Detector()
    opened, open_at = [], []
    for step in steps:
        firing = detector.observe(step)
        if firing is not None and firing.opened:
            opened.append(firing.step)
        if detector.incident_open:
            open_at.append(step.step)
    assert opened == [opened[0]]
    assert 1200 <= opened[0] <= 1205
    assert open_at[-1] < 1350


def test_faster_is_the_new_normal() -> None:
    detector = Detector()
    found = firings(steady(3000, sd=0.01, seed=1, shift_at=1500, shift=-0.3), detector)
    assert not found
    assert detector.last is not None
    assert detector.last.ms == pytest.approx(20.0 * 0.7 * 1.13, rel=0.06)


def test_acknowledged_is_the_new_normal() -> None:
    detector = Detector()
    steps = list(steady(2500, sd=0.01, seed=1, shift_at=1500, shift=0.4))
    before = firings(steps[:1700], detector)
    assert before
    assert detector.incident_open
    detector.ack()
    assert not detector.incident_open
    assert not firings(steps[1700:], detector)


def test_terms_add_up_to_the_expectation() -> None:
    detector = Detector()
    for step in serving(((400, 8, 200, 50),), sd=0.15):
        firing = detector.observe(step)
        if firing is not None:
            assert sum(firing.terms.values()) == pytest.approx(firing.expected_ms)
        if detector.last is not None:
            assert sum(detector.last.terms.values()) == pytest.approx(detector.last.ms)


def test_zero_steps_one_step_and_constant_steps() -> None:
    assert Detector().last is None
    assert not firings(steady(1))
    assert not firings(steady(1000, batches=(1,)))


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_whatever_a_probe_writes_it_does_not_crash(data: st.DataObject) -> None:
    counts = st.one_of(st.none(), st.integers(0, 5), st.integers(0, 2**40))
    detector, now = Detector(), 0
    for number in range(data.draw(st.integers(1, 40))):
        took = data.draw(st.one_of(st.integers(0, 10**8), st.integers(-(10**6), 2**50)))
        names = ("requests", "prefill_requests", "decode_requests", "prefill_tokens", "decode_tokens",
                 "context_tokens", "attention_work", "gap_ns", "running")  # fmt: skip
        step = Step("e", 0, 0, number, now, now + took, **{name: data.draw(counts) for name in names})
        firing = detector.observe(step)
        if detector.last is not None:
            assert math.isfinite(detector.last.ms)
            assert detector.last.ms > 0
        if firing is not None:
            assert math.isfinite(firing.excess)
        now += max(took, 0)


def test_state_stays_small() -> None:
    detector = Detector()
    for batch in range(1, 300):
        for step in steady(6, sd=0.05, seed=batch, batches=(batch,)):
            detector.observe(
                step._replace(context_tokens=batch * 37 % 5003 * batch, prefill_tokens=batch % 3 * 50)
            )
    assert _size(detector) < 200_000


def _size(thing: object, seen: set[int] | None = None) -> int:
    seen = set() if seen is None else seen
    if id(thing) in seen:
        return 0
    seen.add(id(thing))
    size = sys.getsizeof(thing)
    if isinstance(thing, dict):
        return size + sum(_size(k, seen) + _size(v, seen) for k, v in thing.items())
    if isinstance(thing, (str, bytes, int, float)):
        return size
    parts: list[object] = list(thing) if isinstance(thing, Iterable) else []
    parts += [getattr(thing, name) for name in getattr(type(thing), "__slots__", ()) if hasattr(thing, name)]
    parts += [vars(thing)] if hasattr(thing, "__dict__") else []
    return size + sum(_size(part, seen) for part in parts)


def test_a_stall_in_a_long_step_is_told_though_short_ones_have_wild_tails() -> None:
    """Outliers cost milliseconds: x8 is usual for steps of 1.5 ms here, and not for a prefill of 40 ms."""
    rng = random.Random(5)
    start, steps = 0, []
    for number in range(3000):
        prefill = 200 if number % 40 == 39 else 0
        ms = (40.0 if prefill else 1.5) * math.exp(rng.gauss(0.0, 0.05))
        if not prefill and rng.random() < 0.01:
            ms += rng.uniform(3.0, 11.0)
        if number == 2799:
            ms += 300.0
        end = start + int(ms * 1e6)
        steps.append(
            Step("e", 0, 0, number, start, end, "mixed" if prefill else "decode", 3, int(bool(prefill)), 2,
                 prefill, 2, None, 600 + prefill, prefill * 200)
        )  # fmt: skip
        start = end + 10_000
    told = {f.step: f for f in firings(steps) if f.step > 1000}
    assert 2799 in told and told[2799].level == "page" and told[2799].kind == "stall"
    assert not [f for f in told.values() if f.level == "page" and f.step != 2799]


def slower(steps: list[Step], shift: float) -> list[Step]:
    return [s._replace(end_ns=s.end_ns + int((s.end_ns - s.start_ns) * shift)) for s in steps]


def in_a_dive(
    shift: float, *, excuse: float = 0.14, seed: int = 4
) -> tuple[Detector, list[Firing], list[Firing]]:
    """After 1,500 calm steps 250 that are slower by ``shift`` while we look deep, then 250 as before: the
    detector, what it said in the dive and what after it."""
    steps = list(steady(2000, sd=0.02, rho=0.5, seed=seed))
    detector = Detector()
    assert not pages(firings(steps[:1500], detector))
    slow = slower(steps[1500:1750], shift)
    during = [firing for step in slow if (firing := detector.observe(step, excuse)) is not None]
    return detector, during, firings(steps[1750:], detector)


@pytest.mark.parametrize("shift", [0.05, 0.12])
def test_what_our_own_deep_probes_cost_is_no_news(shift: float) -> None:
    detector, during, after = in_a_dive(shift)
    assert not during and not after and not detector.incident_open
    blind = Detector()
    steps = list(steady(2000, sd=0.02, rho=0.5, seed=4))
    assert not pages(firings(steps[:1500], blind))
    assert firings(slower(steps[1500:1750], shift), blind)  # it would have been


def test_a_clear_shift_is_told_in_a_dive_too() -> None:
    _, during, _ = in_a_dive(0.5)
    found = pages(during)
    assert found and found[0].step < 1500 + 20
    assert found[0].excess == pytest.approx(0.5, abs=0.1)


def test_a_dive_teaches_nothing() -> None:
    detector, _, _ = in_a_dive(0.12)
    other = Detector()
    steps = list(steady(2000, sd=0.02, rho=0.5, seed=4))
    for step in [*steps[:1500], *steps[1750:]]:
        other.observe(step)
    assert detector.last is not None and other.last is not None
    assert detector.last.ms == pytest.approx(other.last.ms, rel=0.01)
    assert detector.noise.wander == pytest.approx(other.noise.wander, rel=0.2)


def test_an_incident_is_not_over_because_we_look_into_it() -> None:
    steps = list(steady(2400, sd=0.01, rho=0.5, seed=5, shift_at=1500, shift=0.10))
    detector = Detector()
    assert firings(steps[:1600], detector) and detector.incident_open
    for step in steps[1600:2000]:
        detector.observe(step, 0.14)
        assert detector.incident_open
    calm = [s._replace(end_ns=s.start_ns + int((s.end_ns - s.start_ns) / 1.1)) for s in steps[2000:]]
    firings(calm, detector)
    assert not detector.incident_open


def test_a_stutter_is_told_in_a_dive_too() -> None:
    """However often such steps come: 3.2 times as long as expected, of which a seventh might be ours."""
    steps = list(steady(2200, sd=0.02, rho=0.5, seed=4, stalls=dict.fromkeys(range(500, 1500, 12), 120.0)))
    detector = Detector()
    firings(steps[:1600], detector)
    expected_ms = detector.last.ms if detector.last else 0.0
    late = steps[1600]._replace(end_ns=steps[1600].start_ns + int(3.2 * expected_ms * 1e6))
    firing = detector.observe(late, 0.14)
    assert firing is not None and firing.kind == "stall" and firing.level == "evidence"


def test_a_stutter_at_a_prompt_is_told_however_ragged_prompts_are() -> None:
    """Every fourth step has a prompt, whose time is far less even than the others'; one step in thirteen
    takes eight times as long, so that it is not rare for one to be late."""
    rng, at_ns = random.Random(3), 10**12
    detector = Detector()
    for number in range(3000):
        prompt = 100 if number % 4 == 0 else 0
        took_ms = (11.0 if prompt else 8.0) * rng.lognormvariate(0.0, 0.35 if prompt else 0.02)
        took_ms *= 8.0 if number % 13 == 5 else 1.0
        if number == 2900:
            took_ms = 60.0
        end_ns = at_ns + int(took_ms * 1e6)
        step = Step(
            "vllm", 0, 0, number, at_ns, end_ns, "mixed" if prompt else "decode", requests=6,
            prefill_requests=1 if prompt else 0, decode_requests=5, prefill_tokens=prompt, decode_tokens=5,
            cached_tokens=0, context_tokens=900 + prompt, running=6, waiting=0,
        )  # fmt: skip
        at_ns = end_ns + 50_000
        firing = detector.observe(step)
        if number == 2900:
            assert firing is not None and firing.kind == "stall"


@pytest.mark.parametrize(("sd", "rho", "seconds", "paged"), [
    (0.01, 0.0, 0.6, True), (0.19, 0.78, 0.6, False), (0.19, 0.78, 4.0, True),
])  # fmt: skip
def test_a_restless_machine_is_given_longer_before_anybody_is_called(
    sd: float, rho: float, seconds: float, paged: bool
) -> None:
    """Steps four times as long for a while, on a calm stream and on one as restless as a small virtual
    machine's: there half a second of that is no news worth a page."""
    for seed in range(3):
        detector, slow_ms, levels = Detector(), 0.0, set()
        for step in steady(3000, base_ms=8.0, sd=sd, rho=rho, seed=seed):
            if step.step >= 2000 and slow_ms < seconds * 1e3:
                slow = step._replace(end_ns=step.start_ns + 4 * (step.end_ns - step.start_ns))
                slow_ms += slow.duration_ms
                firing = detector.observe(slow)
            else:
                firing = detector.observe(step)
            if firing is not None and firing.kind == "shift":
                levels.add((firing.level, step.step >= 2000))
        assert (("page", True) in levels) == paged, (seed, levels)
        assert ("page", False) not in levels
        assert ("evidence", True) in levels
