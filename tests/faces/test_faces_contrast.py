from __future__ import annotations

import pytest

from latencyprism.faces.contrast import contrast
from latencyprism.faces.readings import moved
from latencyprism.records import Alert, Counter, Step

MS = 1_000_000


def step(number: int, execute_ms: float, phase: str = "decode", replica: int = 0) -> Step:
    start = number * 100 * MS
    length = int((execute_ms + 2) * MS)
    return Step(
        "vllm", replica, 0, number, start, start + length, phase,
        schedule_ns=MS, execute_ns=int(execute_ms * MS), decode_tokens=8,
    )  # fmt: skip


def alert(onset: int, at: int) -> Alert:
    return Alert("a", "shift", "page", "vllm", 0, 0, at, onset, "", 22.0, 12.0, 0.8)


def test_the_part_that_grew_holds_the_excess() -> None:
    steps = [step(n, 10.0) for n in range(50)] + [step(n, 30.0) for n in range(50, 60)]
    found = contrast(steps, alert(50, 55))
    assert found is not None and found.holder is not None
    assert (found.before_steps, found.during_steps) == (50, 6)
    assert found.holder.name == "execute" and found.holder.share == pytest.approx(1.0)
    assert (found.before_ms, found.during_ms) == (12.0, 32.0)
    assert [part.name for part in found.parts] == ["schedule", "execute", "other"]
    assert found.parts[2].before == pytest.approx(1.0)
    assert [entry.name for entry in found.load] == ["decode_tokens"], "what was never seen has no row"


def test_like_is_compared_with_like() -> None:
    steps = [step(n, 10.0 if n % 2 else 200.0, "decode" if n % 2 else "prefill") for n in range(40)]
    steps += [step(n, 30.0, replica=1) for n in range(30)]
    steps += [step(40, 20.0)]
    found = contrast(steps, alert(40, 40))
    assert found is not None
    assert (found.before_steps, found.before_ms, found.during_ms) == (20, 12.0, 22.0)


def test_nothing_to_compare_with_is_said() -> None:
    assert contrast([], alert(1, 2)) is None
    assert contrast([step(5, 1.0)], alert(5, 5)) is None
    assert contrast([step(1, 1.0)], alert(5, 5)) is None


def test_counters_that_moved_come_first_and_sums_become_rates() -> None:
    readings = [Counter(("machine",), "still", n * 1000 * MS, 5.0 + n % 2) for n in range(20)]
    readings += [Counter(("machine",), "jumps", n * 1000 * MS, 1.0 if n < 10 else 9.0) for n in range(20)]
    readings += [Counter(("Worker 1",), "run_ns", n * 1000 * MS, 100.0 + 7.0 * n, "ns") for n in range(20)]
    found = moved(readings, 10_000 * MS, 15_000 * MS)
    assert found[0].name == "jumps"
    rate = next(entry for entry in found if entry.name == "run_ns")
    assert rate.rate and (rate.before, rate.during) == (7.0, 7.0)
    assert [entry.name for entry in moved(readings, None, None)] == ["run_ns", "jumps", "still"]


def test_a_slow_counter_speaks_with_its_first_reading_after_the_onset() -> None:
    readings = [Counter(("m",), "slow", n, float(v)) for n, v in ((0, 1), (5, 1), (20, 8))]
    assert moved(readings, 10, 12)[0].during == 8.0
    assert moved(readings, 30, 40)[0].during is None
