"""Time that the hypervisor took, from readings of /proc/stat."""

from __future__ import annotations

import pytest

from latencyprism.host.stolen import Stolen, frequency_ratio, stolen, ticks_on

S = 1_000_000_000
TICK = 10_000_000


def reading(second: float, *cpus: tuple[int, int]) -> tuple[int, bytes]:
    """(busy, steal) ticks of each CPU."""
    lines = ["cpu  9 9 9 9 9 9 9 9 0 0"]
    lines += [f"cpu{n} {busy} 0 0 1000 7 0 0 {steal} 0 0" for n, (busy, steal) in enumerate(cpus)]
    return int(second * S), "\n".join([*lines, "intr 1 2 3"]).encode()


def usual(*, steal: int = 0) -> list[tuple[int, bytes]]:
    """Ten seconds in which the first of two CPUs works all the time, the other rests."""
    return [reading(n, (100 * n - steal * n, steal * n), (0, 0)) for n in range(11)]


def found(now: tuple[int, bytes], onset_s: float = 10.0, *, steal: int = 0) -> Stolen:
    got = stolen(usual(steal=steal), now, int(onset_s * S), {0, 1}, TICK)
    assert got is not None
    return got


def test_nothing_taken_is_nothing() -> None:
    got = found(reading(12, (1200, 0), (0, 0)))
    assert (got.share, got.usual_share, got.lost_ns) == (0.0, 0.0, 0.0)


def test_what_was_taken_from_a_busy_cpu_is_lost_to_who_runs_there() -> None:
    got = found(reading(12, (1140, 60), (0, 0)))
    assert got.share == pytest.approx(0.3)
    assert got.lost_ns == pytest.approx(0.6 * S)
    assert (got.since_ns, got.until_ns) == (10 * S, 12 * S)


def test_what_is_usual_explains_nothing() -> None:
    got = found(reading(12, (1080 - 20, 120 + 0 + 20), (0, 0)), steal=10)
    assert got.usual_share == pytest.approx(0.1)
    assert got.lost_ns == pytest.approx(0.2 * S, rel=0.01)


def test_two_busy_cpus_lose_their_own_share_each() -> None:
    history = [reading(n, (100 * n, 0), (100 * n, 0)) for n in range(11)]
    got = stolen(history, reading(12, (1100, 100), (1100, 100)), 10 * S, {0, 1}, TICK)
    assert got is not None and got.lost_ns == pytest.approx(1.0 * S)


def test_one_tick_is_within_the_resolution() -> None:
    assert found(reading(10.1, (1009, 1), (0, 0))).lost_ns == 0.0


def test_other_cpus_do_not_count() -> None:
    history = [reading(n, (100 * n, 0), (0, 50 * n)) for n in range(11)]
    got = stolen(history, reading(12, (1200, 0), (0, 900)), 10 * S, {0}, TICK)
    assert got is not None and got.lost_ns == 0.0


def test_null_where_nothing_was_read_before_the_onset_or_no_steal_is_counted() -> None:
    now = reading(12, (1200, 0), (0, 0))
    assert stolen([], now, 10 * S, {0}, TICK) is None
    assert stolen(usual(), now, -1, {0}, TICK) is None
    assert stolen(usual()[:1], now, 10 * S, {0}, TICK) is None
    assert stolen(usual(), reading(12, (5, 0)), 10 * S, {0}, TICK) is None  # counts went back
    old = [(n * S, b"cpu0 1 2 3 4\n") for n in range(11)]
    assert stolen(old, (12 * S, b"cpu0 1 2 3 4\n"), 10 * S, {0}, TICK) is None
    assert ticks_on(b"", {0}) is None


def test_clock_against_what_the_fastest_had() -> None:
    before = [{0: 800_000, 1: 3_000_000}, {0: 3_000_000, 1: 900_000}, {0: 2_900_000, 1: 800_000}]
    assert frequency_ratio(before, {1: 1_500_000}) == pytest.approx(0.5)
    assert frequency_ratio([], {1: 1_500_000}) is None
    assert frequency_ratio(before, {}) is None
