"""Where the time of a step went: parts that follow one another and add up to it exactly.

A part begins and ends where something was seen to begin or end: a phase of the loop, a call in a worker
process, a function that a deep dive wrapped. Where nothing was seen the part is called ``unexplained``; no
part is made from what is usual.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from latencyprism.records import Span, Step
from latencyprism.records.device_spans import from_a_window
from latencyprism.timeline.collective_feed import LANE as COLLECTIVES

SCHEDULE, INPUT, LAUNCH, BEHIND = "schedule", "input", "launch", "behind_previous"
EXECUTE, HANDOVER, SAMPLE, COPY = "execute", "handover", "sample", "copy"
RETURN, UPDATE, UNEXPLAINED = "return", "update", "unexplained"
COLLECTIVE, COLLECTIVE_WAIT = "collective", "collective_wait"
PARTS = (
    SCHEDULE, INPUT, LAUNCH, BEHIND, EXECUTE, COLLECTIVE, COLLECTIVE_WAIT, HANDOVER, SAMPLE, COPY, RETURN,
    UPDATE, UNEXPLAINED,
)  # fmt: skip
"""``launch``: from the end of scheduling until a worker begins, ``return``: from the end of its last call
until the loop goes on; ``handover``: between its two calls; ``behind_previous``: the worker was still busy
with the step before; ``collective_wait``: within a collective, until the last rank came."""

LOOP = "loop"
ON_CPU, RUN_QUEUE, THROTTLED, OFF_CPU = "on_cpu", "run_queue", "throttled", "off_cpu"

# Functions that a deep dive wraps, by their last name or with their class: the part that a call of theirs is.
_FUNCTIONS = {
    "_update_states": INPUT,
    "_prepare_inputs": INPUT,
    "_build_attention_metadata": INPUT,
    "_preprocess": INPUT,
    "prepare_inputs": INPUT,
    "prepare_batch_tensors": INPUT,
    "_model_forward": EXECUTE,
    "LogitsProcessor.forward": EXECUTE,
    "compute_batch": EXECUTE,
    "_sample": SAMPLE,
    "sample": SAMPLE,
    "_bookkeeping_sync": COPY,
    "retrieve_device_outputs": COPY,
    "prepare_batch_update": COPY,
}
# Of these a step has one at least when they are wrapped: without one nothing within the call was seen.
_COMPUTES = frozenset({"_model_forward", "compute_batch"})
_IN_WORKERS = frozenset({"vllm"})
"""Engines whose model runs in worker processes: without a record of these nothing is known of the middle of
a step."""


class Part(NamedTuple):
    """``lanes``: whose time it is; of two the second's where the first sleeps."""

    name: str
    start_ns: int
    end_ns: int
    lanes: tuple[str, ...] = (LOOP,)

    @property
    def ns(self) -> int:
        return self.end_ns - self.start_ns


@dataclass(frozen=True, slots=True)
class Breakdown:
    """``parts`` are in order, touch each other and reach from the start of ``step`` to its end. ``states``:
    ns by what the threads were doing in them (``on_cpu``, ``run_queue``, ``throttled``, ``off_cpu (REASON)``;
    waits too short for a span of their own count as ``on_cpu``), None where the scheduler was not seen.
    ``gap_ns`` lies before the step: with work at hand; ``idle_ns``: without."""

    step: Step
    parts: tuple[Part, ...]
    states: Mapping[str, int] | None = None
    gap_ns: int | None = None
    idle_ns: int | None = None

    @property
    def sums(self) -> dict[str, int]:
        """ns by name of part, in the order of ``PARTS``; only those it has."""
        found: dict[str, int] = defaultdict(int)
        for part in self.parts:
            found[part.name] += part.ns
        return {name: found[name] for name in PARTS if name in found}

    @property
    def unexplained_share(self) -> float:
        """Of the step's duration, in 0..1."""
        return self.sums.get(UNEXPLAINED, 0) / self.step.duration_ns if self.step.duration_ns else 0.0


class _Run(NamedTuple):
    """One model execution in a worker."""

    lane: str
    start_ns: int
    end_ns: int
    sample_start_ns: int | None
    sample_end_ns: int | None

    @property
    def over_ns(self) -> int:
        return self.end_ns if self.sample_end_ns is None else self.sample_end_ns


class _Waits(NamedTuple):
    """Waits of one thread, in order of time, and what each is."""

    starts: list[int]
    ends: list[int]
    states: list[str]


@dataclass
class SpanIndex:
    """Spans of a stretch of time, sorted by what they say of steps. ``threads``: thread id by lane."""

    threads: Mapping[str, int] = field(default_factory=dict)
    runs: dict[str, list[_Run]] = field(default_factory=dict)
    calls: list[Span] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    waits: dict[int, _Waits] = field(default_factory=dict)
    collectives: dict[str, list[Span]] = field(default_factory=dict)
    longest_ns: int = 0

    @classmethod
    def of(cls, spans: Iterable[Span], loop_thread: int | None = None) -> SpanIndex:
        """``loop_thread``: of the loop whose steps these are."""
        found = cls({} if loop_thread is None else {LOOP: loop_thread})
        executes: dict[str, list[Span]] = defaultdict(list)
        samples: dict[str, list[Span]] = defaultdict(list)
        waits: dict[int, list[Span]] = defaultdict(list)
        for span in spans:
            if len(span.track) == 2 and span.track[1] == COLLECTIVES:
                found.collectives.setdefault(span.track[0], []).append(span)
            elif len(span.track) == 2 and span.track[1] == "sched":
                waits[_number(span.track[0])].append(span)
            elif span.name == "execute_model" and len(span.track) == 1:
                executes[span.track[0]].append(span)
            elif span.name == "sample_tokens" and len(span.track) == 1:
                samples[span.track[0]].append(span)
            elif _part_of(span) is not None and not from_a_window(span):
                found.calls.append(span)
        for sorted_later in (found.calls, *found.collectives.values()):
            sorted_later.sort(key=lambda span: span.start_ns)
        found.starts = [span.start_ns for span in found.calls]
        found.longest_ns = max((span.end_ns - span.start_ns for span in found.calls), default=0)
        for lane, own in executes.items():
            found.runs[lane] = _runs(lane, own, samples[lane])
        found.threads = {**{lane: _number(lane) for lane in executes}, **found.threads}
        for tid, own in waits.items():
            own.sort(key=lambda span: span.start_ns)
            found.waits[tid] = _Waits(
                [w.start_ns for w in own], [w.end_ns for w in own], [_state(w.name) for w in own]
            )
        return found

    def within(self, start_ns: int, end_ns: int) -> Iterator[Span]:
        """Calls of known functions that lie in that time."""
        for at in range(bisect_left(self.starts, start_ns), len(self.calls)):
            span = self.calls[at]
            if span.start_ns >= end_ns:
                break
            if span.end_ns <= end_ns:
                yield span


def break_down(steps: Sequence[Step], index: SpanIndex) -> list[Breakdown]:
    """One for each step, in order of their starts. Steps of one replica and rank."""
    ordered = sorted(steps, key=lambda step: step.start_ns)
    taken = dict.fromkeys(index.runs, 0)
    found = []
    before: Step | None = None
    busy_until_ns: dict[str, int] = {}
    for step in ordered:
        run = _critical_run(step, index, taken)
        claims = [*_claims(step, run, busy_until_ns), *_called(step, index)]
        if run is not None:
            busy_until_ns[run.lane] = run.over_ns
            claims += _met(step, run.lane, index.collectives.get(run.lane, ()))
        parts = tuple(_partition(step, claims))
        gap = step.gap_ns
        at_work = before is not None and bool(before.running or before.waiting)
        found.append(
            Breakdown(step, parts, _states(parts, index), gap if at_work else None, None if at_work else gap)
        )
        before = step
    return found


# -- parts ------------------------------------------------------------------------------------------


def _critical_run(step: Step, index: SpanIndex, taken: dict[str, int]) -> _Run | None:
    """Of the workers' executions of this step the one that ended last. Each is some step's once."""
    begun_ns = step.start_ns + (step.schedule_ns or 0)
    over_ns = step.end_ns - (step.update_ns or 0)
    last: _Run | None = None
    for lane, runs in index.runs.items():
        at = taken[lane]
        while at < len(runs) and runs[at].start_ns < begun_ns:
            at += 1
        if at < len(runs) and runs[at].over_ns <= over_ns:
            if last is None or runs[at].over_ns > last.over_ns:
                last = runs[at]
            at += 1
        taken[lane] = at
    return last


class _Claim(NamedTuple):
    """A part as far as nothing deeper lies over it."""

    depth: int
    part: Part


def _claims(step: Step, run: _Run | None, busy_until_ns: Mapping[str, int]) -> Iterator[_Claim]:
    """What the step record and the worker's say."""
    begun_ns = step.start_ns + (step.schedule_ns or 0)
    over_ns = step.end_ns - (step.update_ns or 0)
    if step.schedule_ns is not None:
        yield _Claim(1, Part(SCHEDULE, step.start_ns, begun_ns))
    if step.update_ns is not None:
        yield _Claim(1, Part(UPDATE, over_ns, step.end_ns))
    if run is not None:
        both = (LOOP, run.lane)
        yield _Claim(0, Part(LAUNCH, begun_ns, run.start_ns, both))
        yield _Claim(1, Part(BEHIND, begun_ns, busy_until_ns.get(run.lane, begun_ns), (run.lane,)))
        yield _Claim(1, Part(EXECUTE, run.start_ns, run.end_ns, (run.lane,)))
        if run.sample_start_ns is not None and run.sample_end_ns is not None:
            yield _Claim(0, Part(HANDOVER, run.end_ns, run.sample_start_ns, both))
            yield _Claim(1, Part(SAMPLE, run.sample_start_ns, run.sample_end_ns, (run.lane,)))
        yield _Claim(0, Part(RETURN, run.over_ns, over_ns, both))
    elif step.engine not in _IN_WORKERS and step.execute_ns is not None:
        computed_ns = begun_ns + step.execute_ns
        yield _Claim(1, Part(EXECUTE, begun_ns, computed_ns))
        if step.sample_ns is not None:
            yield _Claim(1, Part(SAMPLE, computed_ns, computed_ns + step.sample_ns))


def _called(step: Step, index: SpanIndex) -> Iterator[_Claim]:
    """What calls of known functions say. Where the one that computes was among them, a worker prepares its
    inputs until then, and the rest of the model's execution is known to be none of them."""
    calls = list(index.within(step.start_ns, step.end_ns))
    names = {_function(span) for span in calls}
    lanes = {span.track[0] for span in calls if len(span.track) == 1 and span.track[0] in index.runs}
    if names & _COMPUTES and step.engine in _IN_WORKERS:
        for lane in lanes:
            for run in _overlapping(index.runs[lane], step):
                computes = [s.start_ns for s in calls if s.track[0] == lane and _function(s) in _COMPUTES]
                ready_ns = min((at for at in computes if at >= run.start_ns), default=run.start_ns)
                yield _Claim(2, Part(INPUT, run.start_ns, min(ready_ns, run.end_ns), (lane,)))
                yield _Claim(2, Part(UNEXPLAINED, ready_ns, run.end_ns, (lane,)))
    elif "ubatch" in names:
        # From the call that decodes to its first micro-batch the batch is prepared.
        begun_ns = step.start_ns + (step.schedule_ns or 0)
        yield _Claim(2, Part(INPUT, begun_ns, min(s.start_ns for s in calls if _function(s) == "ubatch")))
    elif names & _COMPUTES:
        begun_ns = step.start_ns + (step.schedule_ns or 0)
        yield _Claim(2, Part(UNEXPLAINED, begun_ns, begun_ns + (step.execute_ns or 0)))
    for span in calls:
        name = _part_of(span) or UNEXPLAINED
        yield _Claim(3, Part(name, span.start_ns, span.end_ns, (span.track[0],) if lanes else (LOOP,)))


def _met(step: Step, lane: str, spans: Sequence[Span]) -> Iterator[_Claim]:
    """Collectives of the rank that the step follows: waiting for the last rank, then the operation itself.
    What was not joined across the ranks is not divided."""
    for at in range(bisect_left(spans, step.start_ns, key=lambda span: span.start_ns), len(spans)):
        span = spans[at]
        if span.start_ns >= step.end_ns:
            break
        told = next((value for name, value in span.details if name == "waited_ns"), 0)
        came_ns = span.start_ns + (told if isinstance(told, int) else 0)
        yield _Claim(4, Part(COLLECTIVE, span.start_ns, span.end_ns, (lane,)))
        yield _Claim(5, Part(COLLECTIVE_WAIT, span.start_ns, min(came_ns, span.end_ns), (lane,)))


def _overlapping(runs: Sequence[_Run], step: Step) -> Iterator[_Run]:
    at = bisect_left(runs, step.start_ns, key=lambda run: run.start_ns)
    while at < len(runs) and runs[at].end_ns <= step.end_ns:
        yield runs[at]
        at += 1


def _partition(step: Step, claims: Iterable[_Claim]) -> Iterator[Part]:
    """The deepest claim at each moment of the step, joined where the same goes on."""
    cut = []
    for depth, part in claims:
        start, end = max(part.start_ns, step.start_ns), min(part.end_ns, step.end_ns)
        if start < end:
            cut.append(_Claim(depth, part._replace(start_ns=start, end_ns=end)))
    edges = sorted({step.start_ns, step.end_ns, *(e for c in cut for e in (c.part.start_ns, c.part.end_ns))})
    open_part: Part | None = None
    for start, end in pairwise(edges):
        over = [claim for claim in cut if claim.part.start_ns <= start and claim.part.end_ns >= end]
        if over:
            deepest = max(over, key=lambda claim: claim.depth).part
            piece = deepest._replace(start_ns=start, end_ns=end)
        else:
            piece = Part(UNEXPLAINED, start, end)
        if open_part is not None and (open_part.name, open_part.lanes) == (piece.name, piece.lanes):
            open_part = open_part._replace(end_ns=end)
            continue
        if open_part is not None:
            yield open_part
        open_part = piece
    if open_part is not None:
        yield open_part


# -- what the threads were doing --------------------------------------------------------------------


def _states(parts: Sequence[Part], index: SpanIndex) -> dict[str, int] | None:
    if not index.waits or LOOP not in index.threads:
        return None
    found: dict[str, int] = defaultdict(int)
    for part in parts:
        _add_states(part.start_ns, part.end_ns, part.lanes, index, found)
    return dict(found)


def _add_states(
    start_ns: int, end_ns: int, lanes: tuple[str, ...], index: SpanIndex, found: dict[str, int]
) -> None:
    waits = index.waits.get(index.threads.get(lanes[0], -1))
    at_ns = start_ns
    if waits is not None:
        # Waits of one thread do not overlap: the first that may reach into the part is the one before.
        for at in range(max(bisect_left(waits.starts, start_ns) - 1, 0), len(waits.starts)):
            begun, ended = max(waits.starts[at], at_ns), min(waits.ends[at], end_ns)
            if waits.starts[at] >= end_ns:
                break
            if ended <= begun:
                continue
            found[ON_CPU] += begun - at_ns
            if waits.states[at].startswith(OFF_CPU) and len(lanes) > 1:
                _add_states(begun, ended, lanes[1:], index, found)
            else:
                found[waits.states[at]] += ended - begun
            at_ns = ended
    found[ON_CPU] += end_ns - at_ns


def _state(name: str) -> str:
    """From the name of a wait as it is drawn."""
    if name.startswith("run-queue"):
        return THROTTLED if name == "run-queue (throttled)" else RUN_QUEUE
    return OFF_CPU + name.removeprefix("off-CPU")


def _runs(lane: str, executes: list[Span], samples: list[Span]) -> list[_Run]:
    """Each execution with the sampling that follows it before the next one."""
    executes.sort(key=lambda span: span.start_ns)
    samples.sort(key=lambda span: span.start_ns)
    starts = [span.start_ns for span in samples]
    runs = []
    for at, span in enumerate(executes):
        place = bisect_left(starts, span.end_ns)
        until_ns = executes[at + 1].start_ns if at + 1 < len(executes) else None
        sample = samples[place] if place < len(samples) else None
        if sample is not None and until_ns is not None and sample.start_ns >= until_ns:
            sample = None
        told = (None, None) if sample is None else (sample.start_ns, sample.end_ns)
        runs.append(_Run(lane, span.start_ns, span.end_ns, *told))
    return runs


def _function(span: Span) -> str:
    return "ubatch" if span.name.startswith("ubatch") else span.name.rpartition(".")[2]


def _part_of(span: Span) -> str | None:
    name = _function(span)
    return EXECUTE if name == "ubatch" else _FUNCTIONS.get(name) or _FUNCTIONS.get(span.name)


def _number(track: str) -> int:
    """The process or thread that a track names last; -1 for none."""
    last = track.rpartition(" ")[2]
    return int(last) if last.isascii() and last.isdigit() and len(last) < 12 else -1
