"""Where a request's time went: parts that add up, and the right one named."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latencyprism.records import Request, Step
from latencyprism.timeline.request_story import Story, Teller, price, request_hash

MS = 1_000_000
BASE, TOKEN, DECODE = 5 * MS, 20_000, 300_000


class Engine:
    """Runs steps whose cost is known."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.now = 1000 * MS

    def run(self, *prompts: int, decodes: int = 0, stall: int = 0) -> Step:
        took = BASE + TOKEN * sum(prompts) + DECODE * decodes + stall
        step = Step(
            "vllm", 0, 0, len(self.steps), self.now, self.now + took,
            requests=len(prompts) + decodes, prefill_requests=len(prompts), decode_requests=decodes,
            prefill_tokens=sum(prompts), decode_tokens=decodes,
        )  # fmt: skip
        self.steps.append(step)
        self.now = step.end_ns + 100_000
        return step

    def warm(self) -> None:
        for number in range(60):
            self.run(*([64 + number * 8] if number % 3 == 0 else []), decodes=number % 7 + 1)

    def request(
        self, number: int, arrival: int, first: Step, token: Step, last: Step, **rest: int
    ) -> Request:
        return Request(
            "vllm", 0, number, arrival,
            queue_ns=first.start_ns - arrival, prefill_ns=token.end_ns - first.start_ns,
            ttft_ns=token.end_ns - arrival + MS, e2e_ns=last.end_ns - arrival + 2 * MS, first_step=first.step,
            first_token_step=token.step, last_step=last.step, **rest,
        )  # fmt: skip


def parts_ms(story: Story, name: str) -> dict[str, float]:
    stretch = story.stretch(name)
    assert stretch is not None and sum(stretch.parts.values()) == stretch.ns
    return {part: ns / MS for part, ns in stretch.parts.items()}


def test_the_price_of_work_is_found_and_stalls_are_kept_out_of_it() -> None:
    engine = Engine()
    engine.warm()
    for _ in range(8):
        engine.run(decodes=3, stall=80 * MS)
    found = price(engine.steps)
    assert found is not None
    assert found.base_ns == pytest.approx(BASE, rel=0.05)
    assert found.prefill_token_ns == pytest.approx(TOKEN, rel=0.05)
    assert found.decode_ns == pytest.approx(DECODE, rel=0.2)
    assert price(engine.steps[:10]) is None


def test_a_request_that_waits_behind_a_long_prompt() -> None:
    engine = Engine()
    engine.warm()
    arrival = engine.now
    first = engine.run(8000, decodes=2)
    second = engine.run(4000, decodes=2)
    own = engine.run(200, decodes=3)
    last = engine.run(decodes=4)
    long = engine.request(1, arrival - MS, first, second, last, prompt_tokens=12_000)
    short = engine.request(
        2, arrival + 3 * MS, own, own, last, prompt_tokens=200, cached_tokens=0, output_tokens=2
    )
    story = Teller(engine.steps, [long, short]).tell(short)
    queue = story.stretch("queue")
    assert queue is not None and queue.worst is long and queue.others_prefill_tokens == 12_000
    told = parts_ms(story, "queue")
    assert told["others_prefill"] > 0.95 * queue.ns / MS
    assert parts_ms(story, "prefill")["own"] == pytest.approx((BASE + 200 * TOKEN) / MS, rel=0.05)
    assert parts_ms(story, "output") == {"own": 2.0}
    assert [one.name for one in story.stretches] == ["queue", "prefill", "decode", "output"]
    whole = sum(one.ns for one in story.stretches)
    assert whole == short.e2e_ns


def test_own_chunks_are_told_from_prompts_that_share_their_steps() -> None:
    engine = Engine()
    engine.warm()
    arrival = engine.now - 100_000
    first = engine.run(500)
    engine.run(300, 700)
    token = engine.run(200, 100)
    mine = engine.request(5, arrival, first, token, token, prompt_tokens=1100, cached_tokens=100)
    story = Teller(engine.steps, [mine]).tell(mine)
    prefill = story.stretch("prefill")
    assert story.own_tokens == 1000 and prefill is not None
    assert prefill.others_prefill_tokens == pytest.approx(800, abs=2)
    told = parts_ms(story, "prefill")
    assert told["others_prefill"] == pytest.approx(800 * TOKEN / MS, rel=0.1)
    assert told["own"] == pytest.approx((1000 * TOKEN + 3 * BASE) / MS, rel=0.1)


def test_decoding_is_divided_into_own_work_mates_prompts_and_stalls() -> None:
    engine = Engine()
    engine.warm()
    arrival = engine.now
    first = engine.run(50)
    for number in range(20):
        engine.run(*([1000] if number == 4 else []), decodes=5, stall=60 * MS if number == 9 else 0)
    last = engine.steps[-1]
    slow = first.step + 10
    engine.steps[slow] = engine.steps[slow]._replace(runqueue_ns=55 * MS)
    mine = engine.request(6, arrival, first, first, last, prompt_tokens=50)._replace(
        slowest_step=first.step + 10, max_itl_ns=engine.steps[first.step + 10].end_ns
        - engine.steps[first.step + 9].end_ns,
    )  # fmt: skip
    story = Teller(engine.steps, [mine]).tell(mine)
    told = parts_ms(story, "decode")
    assert told["stall"] == pytest.approx(60, rel=0.1)
    assert told["others_prefill"] == pytest.approx(20, rel=0.1)
    assert told["own"] == pytest.approx(20 * (BASE + DECODE) / MS, rel=0.1)
    assert told["between_steps"] == pytest.approx(2.0, rel=0.01)
    decode = story.stretch("decode")
    assert decode is not None and decode.meanwhile == {"runqueue_ns": 55 * MS}
    assert story.largest_pause is not None and story.largest_pause[0].step == first.step + 10
    assert story.largest_pause[1].parts["stall"] == pytest.approx(60 * MS, rel=0.1)


def test_what_the_capture_does_not_hold_is_said_to_be_unseen() -> None:
    engine = Engine()
    engine.warm()
    first = engine.steps[2]
    early = engine.request(7, first.start_ns - 500 * MS, first, first, engine.steps[8], prompt_tokens=10)
    told = parts_ms(Teller(engine.steps, [early]).tell(early), "queue")
    assert told["unseen"] == pytest.approx(500 - (first.start_ns - engine.steps[0].start_ns) / MS)
    none = Teller([], [early]).tell(early)
    assert parts_ms(none, "queue") == {"unseen": 500.0}
    unknown = Request("vllm", 0, 8, None)
    assert Teller(engine.steps, []).tell(unknown).stretches == []


numbers = st.none() | st.integers(-(2**62), 2**62)


@given(
    st.lists(st.tuples(*[st.integers(-(2**62), 2**62)] * 3, numbers, numbers, numbers), max_size=40),
    st.tuples(numbers, numbers, numbers, numbers, numbers),
    st.tuples(numbers, numbers, numbers),
)
def test_nothing_in_a_file_breaks_it(
    rows: list[tuple[int, ...]], times: tuple[int | None, ...], steps: tuple[int | None, ...]
) -> None:
    held = [
        Step("x", 0, 0, a, b, c, prefill_tokens=d, decode_tokens=e, prefill_requests=f)
        for a, b, c, d, e, f in rows
    ]
    request = Request("x", 0, 1, times[0], times[1], times[2], times[3], e2e_ns=times[4],
                      first_step=steps[0], first_token_step=steps[1], last_step=steps[2],
                      slowest_step=steps[1], max_itl_ns=times[2])  # fmt: skip
    Teller(held, [request]).tell(request)


def test_an_id_is_hashed_as_the_watch_hashes_it() -> None:
    from latencyprism.timeline.python_source import PythonSource

    source = object.__new__(PythonSource)
    source.request_key = b"k" * 16
    assert source.hashed("cmpl-abc-0") == request_hash("cmpl-abc-0", b"k" * 16)
