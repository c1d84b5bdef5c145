"""The load generator's reading of streams: exact on what servers send, calm on anything else."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latencyprism.lab.metrics import parse
from latencyprism.lab.wire import EventStream, completion_body, request_bytes, words

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"


def stream_of(engine: str, tokens: int) -> bytes:
    """What a server of ``engine`` answers for ``tokens`` tokens, one event each."""
    usage = f'"usage":{{"completion_tokens":{tokens},"prompt_tokens":7,"total_tokens":{7 + tokens}}}'
    events = []
    for number in range(tokens):
        last = number == tokens - 1
        reason = '"length"' if last and engine == "vllm" else "null"
        text = json.dumps('a "text": {')
        if engine == "transformers":
            events.append(f'{{"id":"x","choices":[{{"index":0,"text":{text}}}]}}')
        elif engine == "vllm":
            events.append(
                f'{{"choices":[{{"index":0,"text":{text},"finish_reason":{reason}}}],"usage":null}}'
            )
        else:
            events.append(f'{{"choices":[{{"text":{text},"index":0,"finish_reason":null}}]}}')
    closing = (
        '{"choices":[{"finish_reason":"length","index":0,"text":""}],'
        if engine != "vllm"
        else '{"choices":[],'
    )
    events.append(closing + usage + "}")
    if engine != "transformers":
        events.append("[DONE]")
    return HEAD + b"".join(f"data: {event}\r\n\r\n".encode() for event in events)


@pytest.mark.parametrize("engine", ["vllm", "transformers", "llama.cpp"])
@given(tokens=st.integers(1, 40), cuts=st.lists(st.integers(0, 4000), max_size=12))
def test_counts_do_not_depend_on_where_the_network_cuts(engine: str, tokens: int, cuts: list[int]) -> None:
    data = stream_of(engine, tokens)
    places = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    stream = EventStream(engine)
    events = sum(stream.feed(data[start:end]) for start, end in itertools.pairwise(places))
    assert (events, stream.status, stream.done) == (tokens, 200, True)
    assert stream.usage("completion_tokens") == tokens
    assert stream.usage("prompt_tokens") == 7
    assert stream.usage("cached_tokens") is None


@given(st.lists(st.binary(max_size=200), max_size=20))
def test_any_bytes_are_accepted(parts: list[bytes]) -> None:
    stream = EventStream("vllm")
    for part in parts:
        assert stream.feed(part) >= 0
    assert stream.status is None or 0 <= stream.status <= 999
    assert stream.usage("completion_tokens") is None or stream.status == 200


def test_an_endless_answer_is_not_kept() -> None:
    stream = EventStream("llama.cpp")
    stream.feed(HEAD)
    for _ in range(100):
        stream.feed(b"x" * 10_000)
    assert len(stream._tail) <= 4096


def test_error_status_is_reported() -> None:
    stream = EventStream("vllm")
    stream.feed(b"HTTP/1.1 503 Service Unavailable\r\n\r\nbusy")
    assert (stream.status, stream.done) == (503, False)


def test_lengths_are_asked_for_exactly() -> None:
    ids = list(range(300, 340))
    for engine in ("vllm", "llama.cpp"):
        body = json.loads(completion_body(engine, "tiny", ids, 9, stream=True))
        assert (body["prompt"], body["max_tokens"], body["ignore_eos"]) == (ids, 9, True)
        assert body["stream_options"] == {"include_usage": True}
    body = json.loads(completion_body("transformers", "tiny", ids, 9, stream=False))
    assert body["prompt"] == words(ids)
    assert len(words(ids).split()) == len(ids)


def test_request_says_its_length() -> None:
    head, _, body = request_bytes("127.0.0.1:1", b'{"a":1}').partition(b"\r\n\r\n")
    assert body == b'{"a":1}'
    assert b"Content-Length: 7" in head.split(b"\r\n")


def test_metrics_sum_over_labels_and_leave_buckets_out() -> None:
    text = (
        "# HELP a_total x\n# TYPE a_total counter\n"
        'a_total{engine="0"} 2\na_total{engine="1",x="}"} 3.5\n'
        'b_bucket{le="1"} 4\nb_sum 9 1700000000\nnonsense\nc not_a_number\n'
    )
    assert parse(text) == {"a_total": 5.5, "b_sum": 9.0}


@given(st.text())
def test_metrics_accept_any_text(text: str) -> None:
    assert all(isinstance(value, float) for value in parse(text).values())
