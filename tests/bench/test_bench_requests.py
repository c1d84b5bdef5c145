"""Request records against a client's figures, without any engine."""

from __future__ import annotations

import zlib

import pytest

from latencyprism.bench.requests import RoundTrip, compare, run
from latencyprism.cli.bench import _counts
from latencyprism.lab.generate import Request as Sent
from latencyprism.records import Request

MS = 1_000_000


def hashed(name: str) -> int:
    return zlib.crc32(name.encode())


def sent(number: int, *, output: int = 5, outcome: str = "ok") -> Sent:
    return Sent(
        number, 0, 100 * MS, 10, output, first_ns=150 * MS, end_ns=300 * MS, prompt_tokens=10,
        output_tokens=output, outcome=outcome, name=f"mixed-1-{number}",
    )  # fmt: skip


def seen(number: int, *, ttft_ms: float = 49, e2e_ms: float | None = 199, output: int = 5) -> Request:
    return Request(
        "vllm", 0, number, arrival_ns=101 * MS, ttft_ns=int(ttft_ms * MS), prompt_tokens=10,
        e2e_ns=None if e2e_ms is None else int(e2e_ms * MS), output_tokens=output, token_steps=output,
        finish_reason="length", client_request=hashed(f"cmpl-mixed-1-{number}-0"),
    )  # fmt: skip


def test_differences_are_the_clients_figure_less_the_records() -> None:
    found = compare("vllm", [sent(0), sent(1)], [seen(1, ttft_ms=45), seen(0)], hashed)
    assert (found["requests_true"], found["requests_seen"], found["unknown"]) == (2, 2, 0)
    assert found["ttft_difference_ms"] == {"p50": 3.0, "p99": 4.96, "max": 5.0, "within_2_ms": 0.5, "n": 2}
    assert found["e2e_difference_ms"]["max"] == 1.0
    assert found["arrival_after_send_ms"]["p50"] == 1.0
    assert (found["output_tokens_equal"], found["output_tokens_differ"], found["whole_stories"]) == (2, 0, 2)


def test_the_way_is_half_the_round_trip_at_sending_and_half_of_that_at_the_token() -> None:
    trips = [RoundTrip(at * MS, ms) for at, ms in ((60, 30.0), (99, 0.6), (140, 4.4), (149, 9.0))]
    found = compare("vllm", [sent(0), sent(1)], [seen(1, ttft_ms=44), seen(0, ttft_ms=43)], hashed, trips)
    # Sent at 100: that of 99. First token at 150: that of 149, still under way. 2 + (0.6 + 9) / 2 = 6.8 ms.
    assert found["ttft_difference_ms"]["within_2_ms"] == 0
    assert found["ttft_difference_ms"]["within_2_ms_and_way"] == 0.5
    assert "within_2_ms_and_way" not in found["arrival_after_send_ms"]


def test_what_is_missing_wrong_or_not_asked_for_is_counted() -> None:
    records = [seen(0, output=4), seen(7), seen(8, e2e_ms=None)]
    found = compare("vllm", [sent(0), sent(1), sent(8), sent(9, outcome="failed")], records, hashed)
    assert (found["requests_true"], found["requests_seen"], found["unknown"], found["failed"]) == (3, 2, 1, 1)
    assert (found["output_tokens_equal"], found["output_tokens_differ"]) == (1, 1)
    assert found["e2e_difference_ms"]["n"] == 1 and found["cached_tokens_differ"] is None


def test_nothing_seen_gives_no_figures() -> None:
    found = compare("vllm", [sent(0)], [], hashed)
    assert (found["requests_seen"], found["ttft_difference_ms"], found["ttft_ms_p50"]) == (0, None, None)


def test_an_engine_whose_requests_are_not_observed_says_so() -> None:
    found = run("llama.cpp", 10, 1, 0, lambda _: None)
    assert found["requests_seen"] is None and "not observed" in found["why"]


@pytest.mark.parametrize("text", ["", "a", "8,,64", "0,8", "8,5000", "-1"])
def test_numbers_of_running_requests_that_are_none(text: str) -> None:
    with pytest.raises(Exception, match="from 1 to 1024"):
        _counts(text)


def test_numbers_of_running_requests() -> None:
    assert _counts("64,8,8") == [8, 64]


@pytest.mark.engine
@pytest.mark.root
@pytest.mark.attach_safety
@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_every_request_of_a_real_engine_is_seen_with_the_right_tokens(engine: str) -> None:
    found = run(engine, 24, 3, 0, lambda _: None)
    assert (found["requests_true"], found["requests_seen"], found["failed"]) == (24, 24, 0)
    assert found["output_tokens_differ"] == found["prompt_tokens_differ"] == found["unknown"] == 0
    assert found["whole_stories"] == 24 and found["finish_reasons"] == ["length"]
    assert found["from"] == ("api" if engine == "vllm" else "engine")
    # What the client sees it sees later than the engine, by no more than a loaded test machine explains.
    assert -1.0 < found["ttft_difference_ms"]["p50"] < 250.0
    assert all(probe["errors"] == 0 for probe in found["probes"].values())
