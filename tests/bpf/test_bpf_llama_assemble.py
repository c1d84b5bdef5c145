"""From hits to steps, without an engine: order, intervals, prefill told from decode, nothing invented."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latencyprism.engines.llama_cpp.assemble import Assembler, Event, Role, SeenRun, believable
from latencyprism.engines.llama_cpp.pack import load_pack, parse_pack
from latencyprism.errors import BadInput
from latencyprism.records import Step, Window

CTX, DRAFT, TID = 0x1000, 0x2000, 42


def feed(events: list[Event], with_loop: bool = True) -> tuple[list[Step], Assembler, Window]:
    assembler, window = Assembler(7, with_loop), Window()
    for event in events:
        assembler.add(event, window)
    return window.steps, assembler, window


def ubatch(time_ns: int, *runs: SeenRun, context: int = CTX, tokens: int | None = None) -> Event:
    total = sum(run.tokens for run in runs) if tokens is None else tokens
    return Event(Role.UBATCH, time_ns, TID, context, tokens=total, runs=runs)


def iteration(start_ns: int, *runs: SeenRun, sampled: bool = True) -> list[Event]:
    events = [
        Event(Role.ITERATION, start_ns, TID),
        Event(Role.DECODE, start_ns + 10, TID, CTX),
        ubatch(start_ns + 20, *runs),
    ]
    if sampled:
        events.append(Event(Role.SAMPLE, start_ns + 80, TID))
    return [*events, Event(Role.TASK, start_ns + 100, TID)]


def test_a_request_from_its_prompt_to_its_tokens() -> None:
    steps, _, window = feed(
        [
            Event(Role.LAUNCH, 0, TID, sequence=3),
            *iteration(1000, SeenRun(3, 0, 256, False), sampled=False),
            *iteration(1100, SeenRun(3, 256, 44, True)),
            *iteration(1250, SeenRun(3, 300, 1, True)),
        ]
    )
    assert [step.phase for step in steps] == ["prefill", "prefill", "decode"]
    assert [step.prefill_tokens for step in steps] == [256, 44, 0]
    assert [step.decode_tokens for step in steps] == [0, 0, 1]
    assert [step.context_tokens for step in steps] == [256, 300, 301]
    assert [step.attention_work for step in steps] == [256 * 256, 44 * 300, 0]
    assert [(step.start_ns, step.end_ns) for step in steps] == [(1000, 1100), (1100, 1200), (1250, 1350)]
    assert [step.gap_ns for step in steps] == [None, 0, 50]
    assert [step.execute_ns for step in steps] == [90, 70, 70]
    assert [(step.schedule_ns, step.update_ns) for step in steps] == [(10, 0), (10, 20), (10, 20)]
    assert [step.step for step in steps] == [0, 1, 2]
    assert [(span.name, span.step) for span in window.spans] == [
        ("ubatch of 256", 0), ("ubatch of 44", 1), ("ubatch of 1", 2),
    ]  # fmt: skip


def test_a_last_chunk_of_one_token_is_still_prefill() -> None:
    steps, _, _ = feed(
        [
            Event(Role.LAUNCH, 0, TID, sequence=0),
            *iteration(1000, SeenRun(0, 0, 256, False), sampled=False),
            *iteration(2000, SeenRun(0, 256, 1, True)),
        ]
    )
    assert [(step.prefill_tokens, step.decode_tokens) for step in steps] == [(256, 0), (1, 0)]


def test_two_decode_calls_in_one_iteration_are_two_steps_that_share_its_time() -> None:
    steps, _, _ = feed(
        [
            Event(Role.LAUNCH, 0, TID, sequence=0),
            Event(Role.ITERATION, 100, TID),
            Event(Role.DECODE, 110, TID, CTX),
            ubatch(115, SeenRun(0, 0, 8, False)),
            Event(Role.DECODE, 150, TID, CTX),
            ubatch(155, SeenRun(0, 8, 8, True)),
            Event(Role.SAMPLE, 190, TID),
            Event(Role.TASK, 200, TID),
        ]
    )
    assert [(step.start_ns, step.end_ns) for step in steps] == [(100, 150), (150, 200)]
    assert [step.prefill_tokens for step in steps] == [8, 8]


def test_tasks_of_another_thread_do_not_end_a_step() -> None:
    events = iteration(1000, SeenRun(0, 5, 1, True))
    events.insert(3, Event(Role.TASK, 1050, TID + 1))
    steps, _, _ = feed(events)
    assert [(step.start_ns, step.end_ns, step.replica) for step in steps] == [(1000, 1100, 0)]


def test_an_iteration_half_seen_and_an_idle_one_give_nothing() -> None:
    half = iteration(1000, SeenRun(0, 5, 1, True))[1:]
    idle = [Event(Role.ITERATION, 2000, TID), Event(Role.TASK, 2001, TID)]
    empty = [
        Event(Role.ITERATION, 3000, TID),
        Event(Role.DECODE, 3001, TID, CTX),
        Event(Role.TASK, 3002, TID),
    ]
    assert feed([*half, *idle, *empty])[0] == []


def test_what_cannot_be_read_is_null_and_counted() -> None:
    for runs, tokens in (((SeenRun(0, 5, 1, True),), 9), ((SeenRun(-1, 5, 1, True),), 1)):
        events = iteration(1000)
        events[2] = ubatch(1020, *runs, tokens=tokens)
        steps, assembler, _ = feed(events)
        assert assembler.unreadable == 1
        assert steps[0].duration_ns == 100 and steps[0].execute_ns == 70
        assert {
            getattr(steps[0], name) for name in ("phase", "requests", "prefill_tokens", "context_tokens")
        } == {None}


def test_arguments_one_place_further_are_noticed() -> None:
    events = iteration(1000)
    events[2] = Event(Role.UBATCH, 1020, TID, 0x7FFF0000, CTX, tokens=4711, runs=())
    steps, assembler, window = feed(events)
    assert len(steps) == 1 and steps[0].prefill_tokens is None and assembler.unreadable == 1
    assert window.spans[0].name == "ubatch"


def test_a_draft_model_is_not_counted_but_its_tokens_are_told() -> None:
    def draft(time_ns: int) -> list[Event]:
        return [
            Event(Role.DECODE, time_ns, TID, DRAFT),
            ubatch(time_ns + 1, SeenRun(0, 10, 1, True), context=DRAFT),
        ]

    verify = iteration(2000, SeenRun(0, 10, 5, True))
    steps, _, _ = feed(
        [
            Event(Role.LAUNCH, 0, TID, sequence=0),
            *iteration(1000, SeenRun(0, 0, 10, True)),
            verify[0], *draft(2001), *draft(2004), *verify[1:],
        ]
    )  # fmt: skip
    assert [(step.prefill_tokens, step.decode_tokens, step.draft_tokens) for step in steps] == [
        (10, 0, None), (0, 5, 4),
    ]  # fmt: skip


def test_without_the_servers_loop_a_step_is_the_call_until_its_result() -> None:
    def call(at: int, *runs: SeenRun) -> list[Event]:
        return [
            Event(Role.DECODE, at, TID, CTX),
            Event(Role.SYNCHRONIZE, at + 1, TID, CTX),
            ubatch(at + 5, *runs),
            Event(Role.SYNCHRONIZE, at + 50, TID, CTX),
        ]

    steps, _, _ = feed(
        [
            *call(100, SeenRun(0, 0, 30, True)),
            *call(200, SeenRun(0, 30, 1, True)),
            *call(300, SeenRun(0, 0, 12, True)),
        ],
        with_loop=False,
    )
    assert [step.phase for step in steps] == ["prefill", "decode", "prefill"]
    assert [(step.start_ns, step.end_ns, step.gap_ns) for step in steps] == [
        (100, 150, None), (200, 250, 50), (300, 350, 50),
    ]  # fmt: skip
    assert steps[0].schedule_ns is None and steps[0].update_ns is None


@given(
    st.lists(
        st.builds(
            Event,
            st.sampled_from(Role),
            st.just(0),
            st.sampled_from([TID, TID + 1]),
            st.sampled_from([CTX, DRAFT]),
            st.sampled_from([0, CTX]),
            st.sampled_from([None, 0, 1]),
            st.sampled_from([None, 0, 1, 2, 5]),
            st.none()
            | st.lists(
                st.builds(SeenRun, st.integers(-1, 3), st.integers(-1, 9), st.integers(0, 4), st.booleans()),
                max_size=3,
            ).map(tuple),
        ),
        max_size=60,
    ),
    st.booleans(),
)
def test_any_order_of_hits_gives_ordered_and_consistent_steps(events: list[Event], with_loop: bool) -> None:
    timed = [event._replace(time_ns=1000 + 10 * index) for index, event in enumerate(events)]
    steps, _, window = feed(timed, with_loop)
    assert len(steps) <= sum(event.role is Role.DECODE for event in events)
    for replica in {step.replica for step in steps}:
        mine = [step for step in steps if step.replica == replica]
        assert [step.step for step in mine] == list(range(len(mine)))
        for step in mine:
            assert step.start_ns <= step.end_ns and (step.execute_ns or 0) >= 0
            if step.requests is not None:
                assert step.prefill_tokens is not None and step.decode_tokens is not None
                assert step.prefill_tokens + step.decode_tokens >= step.requests >= 1
        for before, after in pairwise(mine):
            assert before.end_ns <= after.start_ns and after.gap_ns == after.start_ns - before.end_ns
    assert all(span.start_ns <= span.end_ns for span in window.spans)


def test_runs_must_add_up() -> None:
    assert believable([SeenRun(0, 0, 3, True), SeenRun(1, 7, 1, True)], 4)
    assert not believable([SeenRun(0, 0, 3, True)], 4)
    assert not believable([SeenRun(0, 1 << 30, 4, True)], 4)


def test_the_pack_chooses_by_what_the_target_has() -> None:
    pack = load_pack()
    everything = pack.symbols()
    layout, roles = pack.choose(everything.__contains__)
    assert layout is not None and layout.name == "batch_ext"
    assert set(roles) == {"iteration", "task", "launch", "sample", "synchronize"}
    assert pack.choose(lambda name: False) == (None, {})
    older, _ = pack.choose(lambda name: "batch_ext" not in name)
    assert older is not None and older.name == "batch"


@pytest.mark.parametrize(
    "text", ["", "points = 3", "[points]\n[[layout]]\nname='x'", "[points", "layout = 1\n[points]"]
)
def test_a_broken_pack_is_refused(text: str) -> None:
    with pytest.raises(BadInput):
        parse_pack(text)
