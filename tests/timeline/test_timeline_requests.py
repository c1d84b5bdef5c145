"""Requests joined from events and steps, without any process."""

from __future__ import annotations

from latencyprism.records import Request, ring
from latencyprism.records.step import NULL
from latencyprism.timeline.requests import DELIVERY_WAIT_NS, RequestJoin

MS = 1_000_000
A, B = 11, 12


def told(join: RequestJoin, *events: tuple[int, ...]) -> None:
    for event in events:
        words = (1, *event, *[NULL] * (ring.REQUEST_EVENT_WORDS - len(event)))
        join.events(words + (0,) * (ring.MAX_PAYLOAD_WORDS - len(words)))


def ran(join: RequestJoin, *ends_ms: int, first: int) -> None:
    """Steps numbered from ``first``; each begins 1 ms after the end of the one before."""
    for number, end in enumerate(ends_ms, first):
        join.step(number, (end - 9) * MS, end * MS)


def only(requests: list[Request]) -> Request:
    (request,) = requests
    return request


def test_a_whole_life() -> None:
    join = RequestJoin("vllm", 2)
    told(join, (ring.REQUEST_ADDED, A, 80 * MS, 85 * MS, 300, 0), (ring.REQUEST_SCHEDULED, A, 1, 16))
    ran(join, 100, 110, first=0)
    told(join, (ring.REQUEST_TOKENS, A, 2))
    ran(join, 120, 130, 175, 185, first=2)
    told(join, (ring.REQUEST_ENDED, A, 5, 186 * MS, 4, 1))
    assert join.in_flight == 0
    request = only(join.ready(200 * MS, api=False))
    assert (request.engine, request.replica, request.request) == ("vllm", 2, A)
    assert request.queue_ns == (110 - 9 - 80) * MS
    assert request.prefill_ns == (120 - 101) * MS
    assert (request.ttft_ns, request.e2e_ns) == (40 * MS, 105 * MS)
    assert request.tpot_ns == 65 * MS // 3
    assert (request.max_itl_ns, request.slowest_step) == (45 * MS, 4)
    assert (request.first_step, request.first_token_step, request.last_step, request.token_steps) == (
        1,
        2,
        5,
        4,
    )
    assert (request.prompt_tokens, request.cached_tokens, request.output_tokens) == (300, 16, 4)
    assert (request.finish_reason, request.preempted, request.client_request) == ("length", 0, None)


def test_preemption_makes_one_long_interval() -> None:
    join = RequestJoin("vllm", 0)
    told(
        join,
        (ring.REQUEST_ADDED, A, 0, 0, 9, 0),
        (ring.REQUEST_SCHEDULED, A, 0, 0),
        (ring.REQUEST_TOKENS, A, 0),
    )
    ran(join, 10, 20, first=0)
    told(join, (ring.REQUEST_PAUSED, A, 2, 1))
    ran(join, 30, 40, first=2)
    told(join, (ring.REQUEST_TOKENS, A, 4))
    ran(join, 50, 60, first=4)
    told(join, (ring.REQUEST_ENDED, A, 5, 61 * MS, 4, 0))
    request = only(join.ready(70 * MS, api=False))
    assert (request.max_itl_ns, request.slowest_step, request.token_steps) == (30 * MS, 4, 4)
    assert (request.preempted, request.finish_reason) == (1, "stop")


def test_the_api_process_tells_arrival_and_delivery() -> None:
    join = RequestJoin("vllm", 0)
    told(join, (ring.REQUEST_RECEIVED, A, 3 * MS, 777, 4 * MS, 1))
    told(join, (ring.REQUEST_ADDED, A, 5 * MS, 6 * MS, 9, 0), (ring.REQUEST_SCHEDULED, A, 0, 0))
    told(join, (ring.REQUEST_TOKENS, A, 0))
    ran(join, 20, 30, first=0)
    told(join, (ring.REQUEST_DELIVERED, 0, 21 * MS, 22 * MS, 20 * MS - 7, 1))
    told(join, (ring.REQUEST_ENDED, A, 1, 31 * MS, 2, 1))
    assert join.ready(32 * MS, api=True) == []
    told(join, (ring.REQUEST_DELIVERED, 0, 33 * MS, 35 * MS, 30 * MS - 7, 1))
    request = only(join.ready(36 * MS, api=True))
    assert (request.arrival_ns, request.client_request) == (3 * MS, 777)
    assert request.route == "/v1/completions"
    assert (request.ttft_ns, request.e2e_ns) == (19 * MS, 32 * MS)


def test_word_from_the_api_process_is_not_waited_for_for_ever() -> None:
    join = RequestJoin("vllm", 0)
    told(
        join,
        (ring.REQUEST_ADDED, A, 0, 0, 9, 0),
        (ring.REQUEST_SCHEDULED, A, 0, 0),
        (ring.REQUEST_TOKENS, A, 0),
    )
    ran(join, 10, first=0)
    told(join, (ring.REQUEST_ENDED, A, 0, 11 * MS, 1, 0))
    assert join.ready(12 * MS, api=True) == []
    request = only(join.ready(11 * MS + DELIVERY_WAIT_NS, api=True))
    assert request.e2e_ns == 10 * MS and request.tpot_ns is None and request.max_itl_ns is None


def test_what_was_there_before_the_probe_has_no_first_token() -> None:
    join = RequestJoin("vllm", 0)
    told(join, (ring.REQUEST_ADDED, A, 2 * MS, NULL, 9, 40))
    ran(join, 10, 20, first=0)
    told(join, (ring.REQUEST_ENDED, A, 1, 21 * MS, 42, 0))
    request = only(join.ready(30 * MS, api=False))
    assert (request.ttft_ns, request.max_itl_ns, request.first_step, request.tpot_ns) == (
        None,
        None,
        None,
        None,
    )
    assert (request.output_tokens, request.e2e_ns) == (42, 18 * MS)


def test_aborted_before_its_first_token_and_while_it_waited() -> None:
    join = RequestJoin("vllm", 0)
    told(join, (ring.REQUEST_ADDED, A, 0, 0, 9, 0), (ring.REQUEST_SCHEDULED, A, 0, 0))
    told(join, (ring.REQUEST_ADDED, B, 1 * MS, 0, 9, 0))
    ran(join, 10, first=0)
    told(join, (ring.REQUEST_ENDED, A, 0, 11 * MS, 0, 2), (ring.REQUEST_ENDED, B, NULL, 11 * MS, 0, 2))
    first, second = join.ready(12 * MS, api=True)
    assert (first.finish_reason, first.ttft_ns, first.e2e_ns) == ("abort", None, 11 * MS)
    assert (second.queue_ns, second.last_step, second.e2e_ns) == (None, None, 10 * MS)


def test_after_lost_records_nothing_is_made_up() -> None:
    join = RequestJoin("vllm", 0)
    told(
        join,
        (ring.REQUEST_ADDED, A, 0, 0, 9, 0),
        (ring.REQUEST_SCHEDULED, A, 0, 0),
        (ring.REQUEST_TOKENS, A, 0),
    )
    ran(join, 10, first=0)
    ran(join, 90, 100, first=7)
    told(join, (ring.REQUEST_ENDED, A, 8, 101 * MS, 9, 1))
    told(join, (ring.REQUEST_ENDED, B, 8, 101 * MS, 5, 1))
    known, unheard = join.ready(102 * MS, api=False)
    assert (known.max_itl_ns, known.ttft_ns, known.output_tokens, known.e2e_ns) == (None, None, 9, 100 * MS)
    assert (unheard.arrival_ns, unheard.e2e_ns, unheard.output_tokens) == (None, None, 5)


def test_story_that_contradicts_the_count_gives_no_interval() -> None:
    join = RequestJoin("vllm", 0)
    told(
        join,
        (ring.REQUEST_ADDED, A, 0, 0, 9, 0),
        (ring.REQUEST_SCHEDULED, A, 0, 0),
        (ring.REQUEST_TOKENS, A, 0),
    )
    ran(join, 10, 20, 30, first=0)
    told(join, (ring.REQUEST_ENDED, A, 2, 31 * MS, 2, 1))
    assert only(join.ready(40 * MS, api=False)).max_itl_ns is None


def test_requests_that_take_turns_have_no_intervals() -> None:
    join = RequestJoin("vllm", 0)
    told(
        join,
        (ring.REQUEST_ADDED, A, 0, 0, 9, 0),
        (ring.REQUEST_SCHEDULED, A, 0, 0),
        (ring.REQUEST_TOKENS, A, 0),
    )
    ran(join, 10, 20, first=0)
    told(join, (ring.REQUEST_UNEVEN, 0), (ring.REQUEST_ENDED, A, 1, 21 * MS, 2, 1))
    request = only(join.ready(30 * MS, api=False))
    assert (request.max_itl_ns, request.token_steps, request.ttft_ns) == (None, None, 10 * MS)


def test_hostile_words_are_harmless() -> None:
    join = RequestJoin("vllm", 0)
    told(join, (ring.REQUEST_TOKENS, A, 3), (99, A, 1), (ring.REQUEST_ENDED, A, 2**62, -5, -3, 77))
    join.events((2**60, *[0] * (ring.MAX_PAYLOAD_WORDS - 1)))
    join.step(2**61, 5, 4)
    join.step(0, 5, 6)
    assert only(join.ready(10, api=False)).finish_reason is None
