"""Clocks placed on one timeline: bounds that hold, orders that are proved or unknown."""

from __future__ import annotations

import math
import random
import socket
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latencyprism.bench.clocks import trial
from latencyprism.errors import BadInput
from latencyprism.timeline.clock_bounds import SET_ONLY, STEERED, Limits
from latencyprism.timeline.clock_exchange import Answering, Asking
from latencyprism.timeline.clocks import ClockTrack, Moment, Order, Timeline, read_machine_clocks, wall_clock

S, MS, US = 10**9, 10**6, 10**3


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**32))
def test_no_event_is_ever_further_off_than_its_bound_says(seed: int) -> None:
    done = trial(random.Random(seed))
    assert done.beyond == 0 and done.orders["wrong"] == 0
    assert done.epochs <= 1 + done.sets


def exchanged(track: ClockTrack, at: int, ahead: int, there: int, back: int) -> None:
    track.exchange(at, at + there + ahead, at + there + ahead, at + there + back)


def test_one_exchange_bounds_the_offset_by_its_own_delays_and_nothing_else() -> None:
    track = ClockTrack(Limits(0, 0))
    assert track.offset(0) is None and track.place(5) is None and track.drift_ppm is None
    exchanged(track, 10 * S, 7 * S, there=300 * US, back=100 * US)
    assert track.offset(10 * S) == pytest.approx((7 * S - 100 * US, 7 * S + 300 * US), abs=10)
    place = track.place(17 * S)
    assert place is not None and place.earliest_ns <= 10 * S <= place.latest_ns
    assert place.error_ns == pytest.approx(200 * US, abs=10)


def test_drift_is_followed_and_the_bound_grows_away_from_the_readings() -> None:
    track = ClockTrack(Limits(600, 0.1))
    rate = 150e-6
    for second in range(60):
        at = second * S
        exchanged(track, at, 3 * S + int(at * rate), 20 * US, 20 * US)
    assert track.drift_ppm == pytest.approx(150, abs=2)
    widths = [bounds[1] - bounds[0] for at in (30, 59, 62, 70) if (bounds := track.offset(at * S))]
    assert widths == sorted(widths) and widths[0] < 45 * US < widths[3]
    lower, upper = track.offset(62 * S) or (0, 0)
    assert lower <= 3 * S + 62 * S * rate <= upper


def test_a_rate_that_may_jump_gives_wider_bounds_than_one_that_cannot() -> None:
    tracks = ClockTrack(Limits(600, 0.1)), ClockTrack(STEERED)
    for track in tracks:
        for second in range(20):
            exchanged(track, second * S, 0, 5 * US, 5 * US)
    widths = [bounds[1] - bounds[0] for track in tracks if (bounds := track.offset(10 * S + S // 2))]
    assert widths[0] < 20 * US and widths[1] == pytest.approx(2 * (600 * 500 + 5 * US), rel=0.05)


def test_collectives_tighten_what_exchanges_over_a_slow_network_leave_open() -> None:
    track = ClockTrack(Limits(50, 0.1))
    for second in range(10):
        exchanged(track, second * S, 5 * MS, 2 * MS, 3 * MS)
    before = track.offset(5 * S)
    for begun, other_begun in ((4 * S, 4 * S + 30 * US), (4 * S + 10 * US, 4 * S)):
        last = max(begun, other_begun)
        track.collective(begun, last + 20 * US, other_begun + 5 * MS, last + 25 * US + 5 * MS)
    after = track.offset(5 * S)
    assert before is not None and after is not None
    assert before[0] <= after[0] <= 5 * MS <= after[1] <= before[1]
    assert after[1] - after[0] < 0.1 * (before[1] - before[0])
    # What says the impossible is not taken.
    track.collective(4 * S, 4 * S + 1, 4 * S + 90 * MS, 4 * S + 95 * MS)
    assert track.refused == 1 and track.offset(5 * S) == after


@pytest.mark.parametrize("by", [-3 * S, 40 * MS])
def test_a_clock_that_is_set_begins_an_epoch_and_nothing_closer_is_claimed_between(by: int) -> None:
    track = ClockTrack(Limits(1, 0.1))
    for second in range(20):
        exchanged(track, second * S, 9 * S + (by if second >= 10 else 0), 10 * US, 10 * US)
    assert track.epochs == 2
    for at, ahead in ((5, 9 * S), (15, 9 * S + by)):
        lower, upper = track.offset(at * S) or (0, 0)
        assert lower <= ahead <= upper and upper - lower < 60 * US
    lower, upper = track.offset(9 * S + S // 2) or (0, 0)
    assert lower <= min(9 * S, 9 * S + by) and upper >= max(9 * S, 9 * S + by)


def test_an_exchange_that_took_far_too_long_is_left_out() -> None:
    track = ClockTrack()
    for second in range(20):
        exchanged(track, second * S, S, (50 * MS if second % 5 == 4 else 10 * US), 10 * US)
    assert track.slow == 4 and track.epochs == 1


def test_memory_stays_bounded_and_bounds_good_over_days() -> None:
    track = ClockTrack()
    for number in range(3000):
        exchanged(track, number * 30 * S, 0, 10 * US, 10 * US)
    assert all(len(facts.at) <= 97 for facts in (track._epochs[0].most, track._epochs[0].least))
    lower, upper = track.offset(2999 * 30 * S) or (0, 0)
    assert lower <= 0 <= upper and upper - lower < 30 * US


def test_what_cannot_be_ordered_is_unknown() -> None:
    timeline = Timeline("a")
    timeline.track("b", Limits(1, 0.1))
    assert timeline.order(("a", 1), ("b", 2)) is Order.UNKNOWN
    for source, ahead in (("b", 5 * S), ("c", -8 * S)):
        track = timeline.track(source, Limits(1, 0.1))
        for second in range(10):
            exchanged(track, second * S, ahead, 100 * US, 100 * US)
    at = 5 * S
    assert timeline.order(("a", at), ("b", at + 5 * S + MS)) is Order.BEFORE
    assert timeline.order(("b", at + 5 * S + MS), ("c", at - 8 * S)) is Order.AFTER
    assert timeline.order(("b", at + 5 * S), ("c", at - 8 * S + 50 * US)) is Order.UNKNOWN
    assert timeline.order(("c", 1), ("c", 2)) is Order.BEFORE
    assert timeline.order(("c", 2), ("c", 2)) is Order.UNKNOWN
    assert timeline.order(("a", 1), ("nobody", 2)) is Order.UNKNOWN
    with pytest.raises(BadInput, match="own clock"):
        timeline.track("a")


@given(*(st.integers(-(10**6), 10**6) for _ in range(4)))
def test_orders_of_moments_are_one_anothers_mirror(a: int, b: int, c: int, d: int) -> None:
    one, other = Moment(min(a, b), max(a, b)), Moment(min(c, d), max(c, d))
    mirror = {Order.BEFORE: Order.AFTER, Order.AFTER: Order.BEFORE, Order.UNKNOWN: Order.UNKNOWN}
    assert other.order(one) is mirror[one.order(other)]
    assert abs(one.ns - a) <= one.error_ns and abs(one.ns - b) <= one.error_ns


def test_impossible_readings_and_limits_are_refused_in_words() -> None:
    with pytest.raises(BadInput, match="ends before it begins"):
        ClockTrack().exchange(10, 5, 5, 9)
    with pytest.raises(BadInput, match="drift"):
        Limits(-1)
    with pytest.raises(BadInput, match="wander"):
        Limits(1, math.nan)


def test_clocks_of_this_machine_agree_with_themselves() -> None:
    timeline = Timeline("monotonic")
    for _ in range(5):
        read_machine_clocks(timeline)
        time.sleep(0.002)
    for number, name in ((time.CLOCK_REALTIME, "realtime"), (time.CLOCK_BOOTTIME, "boottime")):
        before = time.monotonic_ns()
        shown = time.clock_gettime_ns(number)
        after = time.monotonic_ns()
        place = timeline.place(name, shown)
        assert place is not None and place.earliest_ns <= after and place.latest_ns >= before
        assert timeline.tracks[name].limits == SET_ONLY and place.error_ns < 100 * US


def test_wall_time_is_told_with_its_error_and_how_often_it_was_set() -> None:
    timeline = Timeline("monotonic")
    assert wall_clock(timeline, 5) == {}
    track = timeline.track("realtime", SET_ONLY)
    for second in range(10):
        exchanged(track, second * S, 1_790_000_000 * S + (S if second > 6 else 0), 60, 40)
    told = wall_clock(timeline, 9 * S)
    assert abs(told["realtime_ns"] - 1_790_000_010 * S) <= told["error_ns"] < 100
    assert (told["monotonic_ns"], told["times_set"]) == (9 * S, 1)


def test_a_node_is_asked_over_udp_and_strangers_are_ignored() -> None:
    ahead = 123 * S
    answering = Answering(clock=lambda: time.monotonic_ns() + ahead)
    stop = threading.Event()

    def serve() -> None:
        while not stop.wait(0.001):
            answering.serve()

    server = threading.Thread(target=serve)
    server.start()
    track = ClockTrack()
    asking = Asking(*answering.address, track)
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
            for noise in (b"", b"hello", b"\xff" * 36, b"\0" * 4000):
                stranger.sendto(noise, answering.address)
        assert any(asking.ask() for _ in range(5))
        lower, upper = track.offset(time.monotonic_ns()) or (0, 0)
        assert lower <= ahead <= upper
    finally:
        stop.set()
        server.join()
        answering.close()
        assert asking.ask(0.05) is False
        asking.close()
