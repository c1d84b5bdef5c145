"""The localiser on synthetic windows: causes named, healthy windows left alone, missing sources survived."""

import json
import random

import numpy as np
import pytest
from diagnose_scenes import FAULTS, ROLES, Scene, window
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from latencyprism.diagnose import localise, where
from latencyprism.diagnose.evidence import t4_two_sided_p
from latencyprism.diagnose.signatures import builtin_table, parse_table
from latencyprism.diagnose.workline import WorkLine
from latencyprism.errors import BadInput
from latencyprism.records import CAUSES, Counter, Span, Step, Window

REFERENCE = window(seconds=30, seed=1)


def check(verdict):
    """What holds for every verdict."""
    total = sum(ranked.probability for ranked in verdict.ranking)
    assert total == pytest.approx(1.0)
    assert all(0 <= ranked.probability <= 1 for ranked in verdict.ranking)
    assert verdict.ranking[0].cause == verdict.cause
    assert verdict.ranking[0].probability == verdict.probability
    assert {ranked.cause for ranked in verdict.ranking} <= set(CAUSES)
    json.dumps(verdict.to_dict(), allow_nan=False)
    return verdict


@pytest.mark.parametrize("cause", sorted(FAULTS))
def test_each_cause_is_named_at_half_strength(cause):
    suspect = window(FAULTS[cause](0.5), seconds=4, seed=7, start_s=1100)
    verdict = check(localise(REFERENCE, suspect, roles=ROLES))
    assert verdict.cause == cause
    assert verdict.cycles == len(suspect.steps)
    assert verdict.seconds == pytest.approx(4.0, rel=0.2)


@pytest.mark.parametrize("strength, least", [(0.25, 0.85), (1.0, 0.9)])
def test_most_causes_are_named_at_other_strengths(strength, least):
    right = []
    for number, cause in enumerate(sorted(FAULTS)):
        suspect = window(FAULTS[cause](strength), seconds=4, seed=20 + number, start_s=1100)
        right.append(localise(REFERENCE, suspect, roles=ROLES).cause == cause)
    assert np.mean(right) >= least


def test_healthy_windows_name_no_fault():
    named = []
    for seed in range(12):
        reference = window(seconds=20, seed=1000 + seed)
        for other in range(5):
            suspect = window(seconds=4, seed=2000 + 10 * seed + other, start_s=1100)
            named.append(check(localise(reference, suspect, roles=ROLES)).cause not in ("none", "unknown"))
    assert sum(named) <= 1


def test_healthy_windows_without_counters_name_no_fault():
    for seed in range(10):
        reference, suspect = window(seconds=20, seed=seed), window(seconds=4, seed=50 + seed, start_s=1100)
        verdict = localise(Window(reference.steps), Window(suspect.steps), roles=ROLES)
        assert verdict.cause in ("none", "unknown")


def test_the_neighbour_is_named_with_pid_and_cpu():
    suspect = window(FAULTS["cpu.neighbour"](1.0), seconds=4, seed=3, start_s=1100)
    verdict = localise(REFERENCE, suspect, roles=ROLES)
    first = verdict.evidence[0]
    assert first.signal == "culprit"
    assert "process 4711 (busy, cgroup /other)" in first.text and "CPU 0" in first.text
    assert first.normal == 0 and first.now == pytest.approx(0.5, rel=0.2)


def test_evidence_gives_normal_and_present_values_of_the_key_signal():
    suspect = window(FAULTS["python.gc"](1.0), seconds=4, seed=3, start_s=1100)
    verdict = localise(REFERENCE, suspect, roles=ROLES)
    gc = next(each for each in verdict.evidence if each.signal == "gc")
    assert gc.normal == 0 and gc.now == pytest.approx(16, rel=0.3)
    assert "garbage collector" in gc.text and "ms" in gc.text


def test_an_effect_without_a_known_account_is_unknown():
    verdict = localise(REFERENCE, window(Scene(slow=1.0), seconds=4, seed=3, start_s=1100), roles=ROLES)
    assert verdict.cause == "unknown"


def test_a_slow_down_seen_in_steps_alone_is_unknown_and_says_what_was_missing():
    suspect = window(FAULTS["cpu.neighbour"](1.0), seconds=4, seed=3, start_s=1100)
    bare = Window(REFERENCE.steps), Window(suspect.steps)
    verdict = check(localise(*bare, roles=ROLES, not_available=["PSI"]))
    assert verdict.cause == "unknown"
    assert "PSI" in verdict.not_looked_at
    assert any("run-queue" in line for line in verdict.not_looked_at)


def test_drift_that_costs_nothing_is_no_fault():
    """Another process busy elsewhere, more writes, more io pressure: but steps take what they should."""
    suspect = window(Scene(elsewhere=1.0, writes=50, io=0.3), seconds=4, seed=3, start_s=1100)
    assert localise(REFERENCE, suspect, roles=ROLES).cause == "none"


def test_scheduler_spans_speak_where_counters_are_missing():
    unseen = ("runqueue_ns", "neighbours_looked_ns")

    def bare(full, waits):
        kept = Window(full.steps, [], [c for c in full.counters if c.name not in unseen])
        for step in full.steps:
            length = int(step.duration_ns * waits)
            track = ("Worker 200", "worker 200")
            who = (("preempted_by", 4711), ("preempted_by_comm", "busy"))
            end_ns = step.start_ns + length
            kept.spans.append(Span(track, "run-queue (after 4711 busy)", step.start_ns, end_ns, None, who))
        return kept

    suspect = window(FAULTS["cpu.neighbour"](1.0), seconds=4, seed=3, start_s=1100)
    verdict = localise(bare(REFERENCE, 0.01), bare(suspect, 0.5), roles=ROLES)
    assert verdict.cause == "cpu.neighbour"
    assert "process 4711 (busy)" in verdict.evidence[0].text


def test_a_stop_that_only_the_scheduler_saw_is_named():
    suspect = window(Scene(stop_every_s=0.5, stop_ms=100), seconds=4, seed=3, start_s=1100)
    unseen = [c for c in suspect.counters if c.name != "state"]
    for step in suspect.steps:
        if step.duration_ns > 90_000_000:
            end_ns = step.start_ns + 100_000_000
            suspect.spans.append(Span(("worker 200", "sched"), "off-CPU (stopped)", step.start_ns, end_ns))
    verdict = localise(REFERENCE, Window(suspect.steps, suspect.spans, unseen), roles=ROLES)
    assert verdict.cause == "peer.stalled"


def test_a_silent_engine_is_not_none():
    counters = window(seconds=4, seed=3, start_s=1100).counters
    verdict = check(localise(REFERENCE, Window(counters=counters), roles=ROLES))
    assert verdict.cause != "none"


@pytest.mark.parametrize(
    "reference, suspect", [(Window(), Window()), (REFERENCE, Window()), (Window(), REFERENCE)]
)
def test_empty_windows_give_unknown(reference, suspect):
    verdict = check(localise(reference, suspect, roles=ROLES))
    assert verdict.cause == "unknown" and verdict.not_looked_at


def test_where_names_the_worker_span_and_the_phase():
    slow = window(FAULTS["cpu.neighbour"](1.0), seconds=4, seed=3, start_s=1100)
    assert where(REFERENCE, slow) == "Worker 200 execute_model"
    collected = window(FAULTS["python.gc"](1.0), seconds=4, seed=3, start_s=1100)
    assert where(REFERENCE, collected) == "schedule phase"
    assert where(Window(), slow) == "not located"
    quick = Window([step._replace(end_ns=step.end_ns - step.duration_ns // 2) for step in slow.steps])
    assert where(slow, quick) == "no excess"


def met(step, waiter, culprit, waited_ns):
    start = step.start_ns + step.duration_ns // 4
    details = (("waited_ns", waited_ns), ("waited_for", culprit))
    return Span((waiter, "collectives"), "all_reduce", start, start + waited_ns + 1000, None, details)


def test_where_names_the_rank_that_others_waited_for():
    """Worker 1 is as late as the steps are long; what both lose in their own calls names neither. Waiting
    that calm steps have as well explains nothing."""
    suspect = window(FAULTS["peer.stalled"](0.3), seconds=4, seed=3, start_s=1100)
    usual_ns = np.median([step.duration_ns for step in REFERENCE.steps])
    lost = [max(0, int(0.7 * (step.duration_ns - usual_ns))) for step in suspect.steps]
    usual = [met(step, "Worker 200", "Worker 1 201", 8_000_000) for step in suspect.steps]
    late = [met(step, "Worker 200", "Worker 1 201", ns + 50_000) for step, ns in zip(suspect.steps, lost)]
    named = where(REFERENCE, Window(suspect.steps, late, suspect.counters))
    assert named == "Worker 1 201, for which the other ranks waited in collectives"
    both = [met(step, "Worker 1 201", "Worker 200", ns + 50_000) for step, ns in zip(suspect.steps, lost)]
    without_them = where(REFERENCE, Window(suspect.steps, [], suspect.counters))
    for spans in (usual, late + both):
        spans.sort(key=lambda span: span.start_ns)
        assert where(REFERENCE, Window(suspect.steps, spans, suspect.counters)) == without_them


NAMES = sorted({c.name for c in REFERENCE.counters})
OPTIONAL = [n for n in Step._fields if n not in ("engine", "replica", "rank", "step", "start_ns", "end_ns")]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(sorted(FAULTS)),
    st.sets(st.sampled_from(NAMES)),
    st.sets(st.sampled_from(OPTIONAL)),
    st.booleans(),
    st.integers(0, 100),
    st.integers(1, 400),
)
def test_missing_sources_never_break_a_verdict(cause, lost, blank, spans, seed, kept):
    suspect = window(FAULTS[cause](0.5), seconds=2, seed=seed, start_s=1100)

    def without(full, steps):
        blanks = dict.fromkeys(blank)
        cut = [step._replace(**blanks) for step in full.steps[:steps]]
        return Window(cut, full.spans if spans else [], [c for c in full.counters if c.name not in lost])

    check(localise(without(REFERENCE, None), without(suspect, kept), roles=ROLES))
    where(without(REFERENCE, None), without(suspect, kept))


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_nonsense_never_breaks_a_verdict(data):
    number = st.one_of(st.none(), st.integers(-(10**15), 10**15))
    steps = data.draw(
        st.lists(
            st.builds(
                lambda start, length, tokens, gc: Step(
                    "x", 0, 0, 1, start, start + length, "decode", decode_tokens=tokens, gc_ns=gc, gap_ns=gc
                ),
                st.integers(0, 10**15), st.integers(-(10**9), 10**12), number, number,
            ),
            max_size=30,
        )
    )  # fmt: skip
    track = st.sampled_from([(), ("machine",), ("Worker 200", "t 1"), ("neighbour x", "a"), ("neighbour 5",)])
    name = st.sampled_from(
        ["cpu_ns", "runqueue_ns", "state", "cpu", "cpu0_share", "neighbours_looked_ns", "cpux_share"]
    )
    values = st.floats(allow_nan=True, allow_infinity=True)
    counters = data.draw(
        st.lists(st.builds(Counter, track, name, st.integers(0, 10**15), values), max_size=40)
    )
    spans = data.draw(
        st.lists(st.builds(Span, track, st.text(max_size=5), number.filter(bool), number.filter(bool)))
    )
    random.shuffle(counters)
    mess = Window(steps, spans, counters)
    check(localise(mess, REFERENCE, roles=ROLES))
    check(localise(REFERENCE, mess, roles=ROLES))
    check(localise(mess, mess, roles=ROLES))
    where(REFERENCE, mess)


def test_the_table_holds_only_known_causes_and_says_so_otherwise():
    table = builtin_table()
    assert set(table.causes) <= set(CAUSES)
    signal = "[signals.a]\nkind = 'time'\nfloor = 1.0\ntext = ''\n"
    for text in (
        "nonsense [",
        signal + "[causes.'no.such']\nprior = 1\nkey = []\nsignals = {}",
        signal.replace("1.0", "0.0") + "[causes]",
        signal + "[causes.'python.gc']\nprior = 1\nkey = ['b']\nsignals = {}",
        "[signals]\n[causes.'python.gc']\nprior = 1\nkey = []\nsignals = 3",
    ):
        with pytest.raises(BadInput):
            parse_table(text)


def test_the_line_recovers_work_and_ignores_spikes():
    steps = REFERENCE.steps
    prefill = np.array([float(step.prefill_tokens) for step in steps])
    durations = 10e6 + 1e6 * prefill
    durations[::20] *= 5
    line = WorkLine(steps, durations)
    assert np.median(np.abs(line.predict(steps) / (10e6 + 1e6 * prefill) - 1)) < 0.05


def test_t4_agrees_with_the_table():
    assert t4_two_sided_p(2.776) == pytest.approx(0.05, abs=1e-3)
    assert t4_two_sided_p(-4.604) == pytest.approx(0.01, abs=1e-3)
