"""Time lost over whole seconds: bursts that single steps hide."""

from __future__ import annotations

import random

from latencyprism.detect.lost_time import LostTime


def feed(test: LostTime, steps: int, slow: float, first: int = 0) -> list[int]:
    """Steps of 2 ms, a share ``slow`` of which take 8 ms; the numbers at which the test stands."""
    rng = random.Random(4)
    return [
        number
        for number in range(first, first + steps)
        if test.feed(8.0 if rng.random() < slow else rng.gauss(2.0, 0.1), 2.0, number)
    ]


def test_bursts_are_told_after_two_seconds_and_not_before() -> None:
    test = LostTime()
    assert feed(test, 3000, 0.0) == []
    stands = feed(test, 1500, 0.25, first=3000)
    assert stands and 3300 <= stands[0] <= 3900
    assert 2500 <= test.onset <= 3600


def test_it_lets_go_when_they_are_over() -> None:
    test = LostTime()
    feed(test, 1500, 0.25)
    assert test.fired
    stands = feed(test, 3000, 0.0, first=1500)
    assert stands == [] or stands[-1] < 1500 + 1200


def test_one_slow_second_is_not_enough() -> None:
    test = LostTime()
    feed(test, 2000, 0.0)
    assert feed(test, 120, 1.0, first=2000) == []
    assert feed(test, 2000, 0.0, first=2120) == []


def test_a_restless_stream_needs_more() -> None:
    calm, restless = LostTime(), LostTime()
    for second in range(40):
        factor = 1.25 if second % 2 else 0.8
        for number in range(500):
            calm.feed(2.0, 2.0, number)
            restless.feed(2.0 * factor, 2.0, number)
    for number in range(3000):
        calm.feed(3.0, 2.0, number)
        restless.feed(3.0, 2.0, number)
    assert calm.fired and not restless.fired
