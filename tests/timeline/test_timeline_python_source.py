"""Joining engine and worker records into steps, without any process."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latencyprism.records import Window, ring
from latencyprism.records.step import NULL
from latencyprism.timeline.python_source import PythonSource, Totals, phase_of
from latencyprism.timeline.requests import RequestJoin

ENGINE, WORKER = 100, 200


def step_words(number: int, start: int, end: int, **fields: int) -> ring.RingRecord:
    values = dict.fromkeys(ring.STEP_WIRE, 0)
    values.update(step=number, start_ns=start, end_ns=end, gap_ns=NULL, sample_ns=NULL, kv_usage=250_000)
    values.update(schedule_ns=10, execute_ns=end - start - 20, update_ns=10, **fields)
    words = tuple(values[name] for name in ring.STEP_WIRE)
    return ring.RingRecord(ring.KIND_STEP, words + (0,) * (ring.MAX_PAYLOAD_WORDS - len(words)))


def run_words(start: int, end: int, sample: int) -> ring.RingRecord:
    words = (0, start, end, end + 5, end + 5 + sample, 7, 0, 0)
    return ring.RingRecord(ring.KIND_WORKER, words + (0,) * (ring.MAX_PAYLOAD_WORDS - len(words)))


@pytest.fixture
def source() -> PythonSource:
    """A source whose sessions are lists of records."""
    made = object.__new__(PythonSource)
    made.engine = "vllm"
    made.replica = SimpleNamespace(number=3)  # type: ignore[assignment]
    made.totals = Totals()
    made._runs = {}
    made._engine_pid = ENGINE
    made._names = {ENGINE: "EngineCore 100", WORKER: "Worker 200"}
    made._tracks = {pid: (name,) for pid, name in made._names.items()}
    made._deep_names = {ENGINE: [], WORKER: ["GPUModelRunner._sample"]}
    made._api, made._lost_before, made._step_rings = None, 0, {}
    made.requests = RequestJoin("vllm", 3)
    made._sessions = {
        pid: SimpleNamespace(read=lambda: (), ring=SimpleNamespace(lost=0, header=lambda at: 7))  # type: ignore[misc]
        for pid in (WORKER, ENGINE)
    }
    return made


def feed(source: PythonSource, engine: list[ring.RingRecord], worker: list[ring.RingRecord]) -> Window:
    source._sessions[ENGINE].read = lambda: iter(engine)  # type: ignore[method-assign]
    source._sessions[WORKER].read = lambda: iter(worker)  # type: ignore[method-assign]
    return source.poll()


def test_sampling_is_taken_out_of_execution(source: PythonSource) -> None:
    window = feed(source, [step_words(0, 1000, 2000, decode_tokens=4)], [run_words(1100, 1500, 300)])
    (step,) = window.steps
    assert (step.sample_ns, step.execute_ns) == (300, 980 - 300)
    assert (step.phase, step.kv_usage, step.replica, step.gap_ns) == ("decode", 0.25, 3, None)
    assert [(span.name, span.track) for span in window.spans] == [
        ("execute_model", ("Worker 200",)),
        ("sample_tokens", ("Worker 200",)),
    ]


def test_run_of_another_step_is_not_taken(source: PythonSource) -> None:
    early = run_words(100, 200, 50)  # its step began before the attach
    window = feed(
        source, [step_words(0, 1000, 2000), step_words(1, 2100, 3000)], [early, run_words(2200, 2500, 70)]
    )
    assert [step.sample_ns for step in window.steps] == [None, 70]


def test_worker_record_that_comes_a_poll_earlier_still_joins(source: PythonSource) -> None:
    assert feed(source, [], [run_words(1100, 1500, 300)]).steps == []
    assert feed(source, [step_words(0, 1000, 2000)], []).steps[0].sample_ns == 300


def test_hostile_span_name_is_ignored(source: PythonSource) -> None:
    bad = ring.RingRecord(ring.KIND_SPAN, (99, 5, 6) + (0,) * (ring.MAX_PAYLOAD_WORDS - 3))
    backwards = ring.RingRecord(ring.KIND_SPAN, (0, 9, 6) + (0,) * (ring.MAX_PAYLOAD_WORDS - 3))
    good = ring.RingRecord(ring.KIND_SPAN, (0, 5, 6) + (0,) * (ring.MAX_PAYLOAD_WORDS - 3))
    assert [s.name for s in feed(source, [], [bad, backwards, good]).spans] == ["GPUModelRunner._sample"]


@pytest.mark.parametrize(
    ("prefill", "decode", "phase"),
    [
        (5, 0, "prefill"),
        (0, 5, "decode"),
        (3, 3, "mixed"),
        (0, 0, None),
        (None, None, None),
        (None, 2, "decode"),
    ],
)
def test_phase(prefill: int | None, decode: int | None, phase: str | None) -> None:
    assert phase_of(prefill, decode) == phase


def test_the_thread_that_emits_steps_stays_known_when_the_ring_is_gone(source: PythonSource) -> None:
    assert source.step_threads == ()
    feed(source, [step_words(0, 1000, 2000)], [])
    source._sessions.clear()
    assert source.step_threads == ((ENGINE, 7),)


def test_a_run_whose_tokens_cannot_be_read_is_one_all_the_same(source: PythonSource) -> None:
    run = run_words(1100, 1500, 300)
    blind = run._replace(words=(*run.words[:5], NULL, *run.words[6:]))
    window = feed(source, [step_words(0, 1000, 2000)], [blind])
    assert [span.name for span in window.spans] == ["execute_model", "sample_tokens"]
    assert (source.totals.worker_records, source.totals.worker_tokens) == (1, 0)


def test_what_a_probe_dropped_is_named(source: PythonSource) -> None:
    for pid, session in source._sessions.items():
        session.pid = pid
        session.ring.readings_off = lambda off=pid == ENGINE: ["requests"] if off else []  # type: ignore[misc]
    assert source.not_available == ["EngineCore 100: requests, which its probe dropped to keep its budget"]


_MAY_BE_NULL = {"context_tokens", "running", "waiting", "kv_usage", "gap_ns", "gc_ns"}
_KNOWN = st.integers(0, 10**12)
_SHORT_RECORDS = st.tuples(*(
    _KNOWN | st.just(NULL) if name in _MAY_BE_NULL else _KNOWN for name in ring.DECODE_WIRE
))  # fmt: skip


@given(words=_SHORT_RECORDS)
def test_a_short_record_becomes_the_same_step_as_its_long_form(words: tuple[int, ...]) -> None:
    made = object.__new__(PythonSource)
    made.engine, made.totals, made._runs = "vllm", Totals(), {}
    made.replica = SimpleNamespace(number=3)  # type: ignore[assignment]
    assert made._decode_step(words) == made._step(ring.widened(words))
    assert made.totals.output_tokens == 2 * words[ring.DECODE_WIRE.index("output_tokens")]
