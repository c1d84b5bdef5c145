"""Which of the watched functions is called once per iteration: made-up calls, known answers."""

from __future__ import annotations

import random

import pytest

from latencyprism.attach.stacks import Frame, Function, Stack
from latencyprism.timeline.anchor_candidates import Candidate, at_rest, loop_thread, to_hook
from latencyprism.timeline.anchor_judge import Call, Watched, judge

MS = 1_000_000
WINDOW_NS = 2_500 * MS
FUNCTIONS = {
    1: Function("<module>", "<module>", "/srv/engine.py", 1, 0),
    2: Function("serve", "Engine.serve", "/srv/engine.py", 10, 0),
    3: Function("step", "Engine.step", "/srv/engine.py", 20, 0),
    4: Function("forward", "Model.forward", "/srv/model.py", 30, 0),
    5: Function("get", "Queue.get", "/usr/lib/python3.11/queue.py", 40, 0),
    6: Function("wait", "Condition.wait", "/usr/lib/python3.11/threading.py", 50, 0),
    7: Function("result", "Future.result", "/usr/lib/python3.11/concurrent/futures/_base.py", 60, 0),
    8: Function("poll", "Inbox.poll", "/srv/engine.py", 70, 0),
}


def candidate(name: str, *, presence: float = 0.9, resting: float = 0.0, depth: float = 1.0) -> Candidate:
    return Candidate(hash(name), Function(name, name, "/srv/e.py", 1, 0), presence, resting, depth, False)


def calls(*spans: tuple[float, float]) -> tuple[Call, ...]:
    return tuple(Call(int(start * MS), int(end * MS)) for start, end in spans)


def steps(
    count: int, length_ms: float = 20.0, gap_ms: float = 0.5, seed: int = 0
) -> list[tuple[float, float]]:
    rng = random.Random(seed)
    at, found = 0.0, []
    for _ in range(count):
        took = length_ms * rng.uniform(0.9, 1.1)
        found.append((at, at + took))
        at += took + gap_ms
    return found


def parts(whole: list[tuple[float, float]], begin: float, end: float) -> tuple[Call, ...]:
    return calls(*((a + begin * (b - a), a + end * (b - a)) for a, b in whole))


def test_the_whole_step_is_chosen_and_not_its_parts() -> None:
    whole = steps(120)
    found = judge(
        [
            Watched(candidate("step"), calls(*whole)),
            Watched(candidate("schedule", presence=0.1), parts(whole, 0.0, 0.1)),
            Watched(candidate("forward", presence=0.75), parts(whole, 0.12, 0.9)),
            Watched(candidate("serve", presence=1.0)),
        ],
        WINDOW_NS,
        1.0,
    )
    assert found is not None
    assert found.anchor.function.name == "step"
    assert found.witness is not None and found.witness.function.name == "forward"
    assert found.confidence > 0.85
    assert found.typical_ms == pytest.approx(20.0, rel=0.05)
    assert any("once in each call" in reason for reason in found.reasons)


def test_layers_do_not_pass_for_iterations_and_iterations_of_a_request_do() -> None:
    whole = steps(100)
    layers = [part for k in range(4) for part in parts(whole, k / 4, (k + 0.99) / 4)]
    found = judge(
        [
            Watched(candidate("step"), calls(*whole)),
            Watched(candidate("layer"), tuple(sorted(layers, key=lambda call: call.start_ns))),
        ],
        WINDOW_NS,
        1.0,
    )
    assert found is not None and found.anchor.function.name == "step"

    inner = steps(120)
    requests, at = [], 0
    for length in (5, 20, 11, 33, 8, 17, 26):
        requests.append((inner[at][0] - 0.01, inner[at + length - 1][1] + 0.01))
        at += length
    found = judge(
        [
            Watched(candidate("generate"), calls(*requests)),
            Watched(candidate("one_token"), calls(*inner[:at])),
        ],
        WINDOW_NS,
        1.0,
    )
    assert found is not None and found.anchor.function.name == "one_token"
    assert any("times a call" in reason for reason in found.reasons)


def test_a_turn_that_waits_for_work_yields_to_the_work_in_it() -> None:
    turns = steps(60, length_ms=40.0)
    work = parts(turns, 0.5, 1.0)
    found = judge(
        [
            Watched(candidate("turn", resting=0.5), calls(*turns)),
            Watched(candidate("work", resting=0.0, presence=0.45), work),
        ],
        WINDOW_NS,
        0.5,
    )
    assert found is not None and found.anchor.function.name == "work"


def test_idle_turns_are_told_apart_by_a_witness() -> None:
    turns = steps(100)
    work = parts(turns[::2], 0.02, 0.98)
    found = judge(
        [
            Watched(candidate("turn", resting=0.4), calls(*turns)),
            Watched(candidate("work", presence=0.5), work),
        ],
        WINDOW_NS,
        0.5,
    )
    assert found is not None
    assert found.anchor.function.name == "turn" and found.witness is not None
    assert found.witness.function.name == "work"


def test_parts_of_work_among_idle_turns_are_still_parts() -> None:
    turns = steps(100)
    work = parts(turns[::2], 0.02, 0.98)
    halves = tuple(
        Call(one.start_ns + k * (one.end_ns - one.start_ns) // 2, one.end_ns - (1 - k) * 11 * MS)
        for one in work
        for k in (0, 1)
    )
    found = judge(
        [
            Watched(candidate("turn", resting=0.4), calls(*turns)),
            Watched(candidate("work", presence=0.5), work),
            Watched(candidate("half", presence=0.45), halves),
        ],
        WINDOW_NS,
        0.5,
    )
    assert found is not None and found.anchor.function.name == "turn"
    assert found.witness is not None and found.witness.function.name == "work"


def test_few_slow_iterations_are_not_passed_over_for_their_parts() -> None:
    whole = steps(4, length_ms=500.0)
    layers = [part for k in range(4) for part in parts(whole, k / 4, (k + 0.99) / 4)]
    found = judge(
        [
            Watched(candidate("step"), calls(*whole)),
            Watched(candidate("layer"), tuple(sorted(layers, key=lambda call: call.start_ns))),
        ],
        WINDOW_NS,
        1.0,
    )
    assert found is not None and found.anchor.function.name == "step" and found.confidence < 0.7


def test_what_overlaps_itself_is_hot_or_rare_is_never_chosen() -> None:
    whole = steps(60)
    overlapping = calls(*((a, b + 30) for a, b in whole))
    assert judge([Watched(candidate("handler"), overlapping)], WINDOW_NS, 1.0) is None
    assert judge([Watched(candidate("hot"), calls(*whole), hot=True)], WINDOW_NS, 1.0) is None
    assert judge([Watched(candidate("rare"), calls(*whole[:2]))], WINDOW_NS, 1.0) is None
    assert judge([], WINDOW_NS, 1.0) is None


def test_irregular_calls_without_company_are_unsure() -> None:
    rng = random.Random(5)
    at, spans = 0.0, []
    for _ in range(12):
        took = rng.expovariate(1 / 10)
        spans.append((at, at + took))
        at += took + rng.expovariate(1 / 150)
    found = judge([Watched(candidate("callback", presence=0.06), calls(*spans))], WINDOW_NS, 0.5)
    assert found is not None and found.confidence < 0.5


def stack(*codes: int, at: int = 0) -> Stack:
    return tuple(Frame(code, at) for code in codes)


def test_candidates_leave_out_shells_the_standard_library_and_what_recurs() -> None:
    samples = [stack(1, 2, 3, 4, at=n % 7) for n in range(80)] + [stack(1, 2, 8, 5, 6, at=2)] * 20
    thread = loop_thread(7, samples, 0.8, FUNCTIONS.__getitem__)
    assert thread is not None
    names = [one.function.name for one in thread.candidates]
    assert names == ["serve", "step", "poll", "forward"] or names == ["serve", "poll", "step", "forward"]
    by_name = {one.function.name: one for one in thread.candidates}
    assert by_name["poll"].resting == 1.0 and by_name["step"].resting == 0.0
    assert thread.resting == pytest.approx(0.2)
    chosen = [one.function.name for one in to_hook(thread, 2)]
    assert chosen == ["serve", "step"]
    recursive = [stack(1, 2, 3, 3, 4, at=n % 5) for n in range(50)]
    again = loop_thread(7, recursive, None, FUNCTIONS.__getitem__)
    assert again is not None and "step" not in [one.function.name for one in again.candidates]


def test_waiting_for_a_result_is_work_and_waiting_for_requests_is_not() -> None:
    assert at_rest(stack(1, 2, 8, 5, 6), FUNCTIONS.__getitem__)
    assert not at_rest(stack(1, 2, 3, 7, 6), FUNCTIONS.__getitem__)
    assert not at_rest(stack(1, 2, 3, 4), FUNCTIONS.__getitem__)
    assert not at_rest((), FUNCTIONS.__getitem__)
