"""Parts of a step: they add up, each lies where something was seen, and the rest is called unexplained."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from latencyprism.records import Span, Step
from latencyprism.timeline.breakdown import PARTS, Breakdown, SpanIndex, break_down

US = 1000
WORKER = ("Worker 815",)


def at(number: int, start: int, end: int, schedule: int = 100, update: int = 50, **rest: int) -> Step:
    """A step of vLLM; times in us."""
    return Step(
        "vllm", 0, 0, number, start * US, end * US, "decode",
        schedule_ns=schedule * US, update_ns=update * US,
        execute_ns=(end - start - schedule - update) * US, **rest,
    )  # fmt: skip


def span(name: str, start: int, end: int, track: tuple[str, ...] = WORKER) -> Span:
    return Span(track, name, start * US, end * US)


def only(step: Step, *spans: Span, thread: int | None = None) -> Breakdown:
    (found,) = break_down([step], SpanIndex.of(spans, thread))
    return found


def us(found: Breakdown) -> dict[str, float]:
    return {name: ns / US for name, ns in found.sums.items()}


def test_a_step_of_engine_and_worker_is_covered_by_what_was_seen() -> None:
    found = only(at(7, 0, 2000), span("execute_model", 180, 1500), span("sample_tokens", 1580, 1900))
    assert us(found) == {
        "schedule": 100, "launch": 80, "execute": 1320, "handover": 80, "sample": 320,
        "return": 50, "update": 50,
    }  # fmt: skip
    assert found.unexplained_share == 0 and found.states is None
    assert [part.name for part in found.parts] == [
        "schedule", "launch", "execute", "handover", "sample", "return", "update",
    ]  # fmt: skip


def test_without_the_workers_record_its_time_is_unexplained() -> None:
    found = only(at(0, 0, 2000))
    assert us(found) == {"schedule": 100, "update": 50, "unexplained": 1850}
    assert found.unexplained_share == 0.925


def test_a_deep_dive_divides_the_execution_and_leaves_unexplained_what_is_in_none_of_its_calls() -> None:
    deep = [
        span("GPUModelRunner._prepare_inputs", 200, 400),
        span("GPUModelRunner._model_forward", 420, 1400),
        span("GPUModelRunner._bookkeeping_sync", 1800, 1880),
    ]
    found = only(at(0, 0, 2000), span("execute_model", 180, 1500), span("sample_tokens", 1580, 1900), *deep)
    assert us(found) == {
        "schedule": 100, "input": 240, "launch": 80, "execute": 980, "handover": 80, "sample": 240,
        "copy": 80, "return": 50, "update": 50, "unexplained": 100,
    }  # fmt: skip


def test_calls_that_do_not_compute_leave_the_execution_whole() -> None:
    found = only(at(0, 0, 2000), span("execute_model", 180, 1900), span("X._prepare_inputs", 200, 400))
    assert us(found)["execute"] == 1720 - 200 and us(found)["input"] == 200
    assert "unexplained" not in found.sums


def test_overlapped_steps_wait_behind_the_one_before_and_each_execution_is_used_once() -> None:
    steps = [at(0, 0, 1200), at(1, 300, 2300), at(2, 1300, 3400)]
    spans = [span("execute_model", a, b) for a, b in ((150, 1100), (1110, 2200), (2210, 3300))]
    found = break_down(steps, SpanIndex.of(spans))
    assert us(found[1]) == {"schedule": 100, "launch": 10, "behind_previous": 700, "execute": 1090,
                            "return": 50, "update": 50}  # fmt: skip
    assert us(found[2])["behind_previous"] == 800 and us(found[2])["execute"] == 1090
    assert all(one.unexplained_share == 0 for one in found)


def test_of_several_workers_the_last_to_end_counts() -> None:
    spans = [span("execute_model", 150, 900), span("execute_model", 160, 1700, ("Worker_TP1 816",))]
    found = only(at(0, 0, 2000), *spans)
    assert us(found)["execute"] == 1540
    assert {part.lanes for part in found.parts if part.name == "execute"} == {("Worker_TP1 816",)}


def collective(start: int, end: int, rank: int = 0, **told: int) -> Span:
    track = ("Worker 1 816" if rank else "Worker 815", "collectives")
    details = tuple((name, ns * US) for name, ns in told.items())
    return Span(track, "all_reduce", start * US, end * US, None, details)


def test_collectives_of_the_rank_that_ended_last_are_waiting_and_the_operation_itself() -> None:
    runs = [span("execute_model", 150, 1700), span("execute_model", 160, 1600, ("Worker 1 816",))]
    forward = span("GPUModelRunner._model_forward", 200, 1650)
    met = [
        collective(400, 500, waited_ns=80), collective(470, 500, rank=1, waited_ns=0),
        collective(900, 1000),  # joined to none: not divided
    ]  # fmt: skip
    found = only(at(0, 0, 2000), *runs, forward, *met)
    assert us(found) == {
        "schedule": 100, "input": 50, "launch": 50, "execute": 1450 - 200, "collective": 120,
        "collective_wait": 80, "return": 250, "update": 50, "unexplained": 50,
    }  # fmt: skip
    lanes = {part.lanes for part in found.parts if part.name.startswith("collective")}
    assert lanes == {("Worker 815",)}
    other_last = only(at(0, 0, 2000), span("execute_model", 150, 1500), runs[1], *met)
    assert us(other_last)["collective"] == 30 and "collective_wait" not in other_last.sums


def test_a_lost_worker_record_costs_its_own_step_only() -> None:
    steps = [at(number, number * 2000, number * 2000 + 1900) for number in range(4)]
    spans = [span("execute_model", n * 2000 + 150, n * 2000 + 1800) for n in (0, 1, 3)]
    found = break_down(steps, SpanIndex.of(spans))
    assert [one.unexplained_share > 0.9 for one in found] == [False, False, True, False]


def test_one_process_engines_by_their_phases_and_calls() -> None:
    step = Step("transformers", 0, 0, 1, 0, 1000 * US, "decode", schedule_ns=100 * US, execute_ns=800 * US,
                update_ns=60 * US)  # fmt: skip
    assert us(only(step)) == {"schedule": 100, "execute": 800, "update": 60, "unexplained": 40}
    track = ("engine 900",)
    deep = [span("ContinuousBatchingIOs.prepare_batch_tensors", 20, 90, track),
            span("ModelRunner.compute_batch", 110, 850, track),
            span("ContinuousBatchingIOs.prepare_batch_update", 945, 980, track)]  # fmt: skip
    assert us(only(step, *deep)) == {"schedule": 30, "input": 70, "execute": 740, "copy": 35, "update": 25,
                                     "unexplained": 10 + 50 + 40}  # fmt: skip
    native = Step("llama.cpp", 0, 0, 1, 0, 1000 * US, "decode", schedule_ns=30 * US, execute_ns=900 * US,
                  update_ns=70 * US)  # fmt: skip
    ubatches = [span("ubatch of 512", 60, 500, ("llama.cpp 9", "ubatch")),
                span("ubatch of 20", 500, 930, ("llama.cpp 9", "ubatch"))]  # fmt: skip
    assert us(only(native, *ubatches)) == {"schedule": 30, "input": 30, "execute": 870, "update": 70}
    unknown = Step("something", 0, 0, 1, 0, 1000, "decode")
    assert only(unknown).unexplained_share == 1.0


def test_what_the_threads_did_meanwhile() -> None:
    loop, worker = ("python 812", "sched"), ("VLLM::Worker 815", "sched")
    waits = [
        span("run-queue (after 9 stress)", 10, 40, loop),
        span("off-CPU (futex)", 110, 1940, loop),  # it sleeps while the worker works
        span("run-queue (throttled)", 300, 500, worker),
        span("off-CPU (major fault)", 600, 650, worker),
        span("off-CPU (futex)", 1900, 5000, worker),
    ]
    step = at(0, 0, 2000)
    found = only(
        step, span("execute_model", 180, 1500), span("sample_tokens", 1500, 1900), *waits, thread=812
    )
    assert found.states is not None
    told = {name: ns / US for name, ns in found.states.items() if ns}
    assert told == {"on_cpu": 2000 - 30 - 200 - 50 - 40, "run_queue": 30, "throttled": 200,
                    "off_cpu (major fault)": 50, "off_cpu (futex)": 40}  # fmt: skip


def test_time_before_a_step_is_a_gap_with_work_at_hand_and_idle_without() -> None:
    steps = [at(0, 0, 900, running=2), at(1, 1000, 1900, running=0, waiting=0, gap_ns=100 * US),
             at(2, 5000, 5900, gap_ns=3100 * US)]  # fmt: skip
    found = break_down(steps, SpanIndex())
    assert [(one.gap_ns, one.idle_ns) for one in found] == [(None, None), (100 * US, None), (None, 3100 * US)]


@settings(deadline=None)
@given(
    st.lists(st.tuples(*[st.integers(0, 400)] * 4, st.booleans()), max_size=12),
    st.lists(
        st.tuples(
            st.sampled_from(
                ["execute_model", "sample_tokens", "X._sample", "X.compute_batch", "ubatch of 3"]
            ),
            st.integers(-50, 4000),
            st.integers(0, 900),
        ),
        max_size=20,
    ),
    st.sampled_from(["vllm", "transformers", "llama.cpp"]),
)
def test_parts_always_touch_and_add_up(
    raw: list[tuple[int, int, int, int, bool]], calls: list[tuple[str, int, int]], engine: str
) -> None:
    steps, start = [], 0
    for number, (schedule, execute, update, rest, overlaps) in enumerate(raw):
        end = start + schedule + execute + update + rest
        steps.append(
            Step(engine, 0, 0, number, start, end, schedule_ns=schedule, execute_ns=execute, update_ns=update)
        )
        start = (start + end) // 2 if overlaps else end + 7
    spans = [Span(WORKER, name, begun, begun + length) for name, begun, length in calls]
    for one in break_down(steps, SpanIndex.of(spans)):
        assert sum(one.sums.values()) == one.step.duration_ns
        assert set(one.sums) <= set(PARTS) and 0 <= one.unexplained_share <= 1
        edges = [edge for part in one.parts for edge in (part.start_ns, part.end_ns)]
        assert edges == sorted(edges) and edges[1:-1:2] == edges[2::2]
        if edges:
            assert (edges[0], edges[-1]) == (one.step.start_ns, one.step.end_ns)
