"""Which of the functions whose calls were seen marks exactly one iteration, and how sure that is."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median, mode

from latencyprism.attach.stacks import COROUTINE
from latencyprism.timeline.anchor_candidates import Candidate

FEWEST_CALLS, FEW_CALLS = 3, 10
"""Below the second a judgement is less sure; one made without an iteration that was slow would be wrong."""
FASTEST_PER_S = 1000.0
OVERLAPPING = 0.02
WITHIN = 0.95
WHOLE = 0.99
"""A child that fills this much of its parent marks the same iteration. What fills less leaves out a part of
it (its scheduling, say) that belongs to a step."""
SEVERAL = 1.5
MOST_OF = 0.6
LONGEST_STEP_NS = 1_000_000_000
SHORTEST_STEP_NS = 200_000
"""No engine's iteration takes less: what does is a part of one, or passes its result on."""
EVEN = 0.9
RESTS = 0.05
ENOUGH_CALLS = 50
ENOUGH_COVER = 0.7


@dataclass(frozen=True, slots=True)
class Call:
    """One call, CLOCK_MONOTONIC nanoseconds."""

    start_ns: int
    end_ns: int


@dataclass(frozen=True, slots=True)
class Watched:
    """A candidate after its calls were watched, oldest first. ``hot``: it was called too often to go on;
    ``unseen``: why it could not be watched."""

    candidate: Candidate
    calls: tuple[Call, ...] = ()
    hot: bool = False
    unseen: str | None = None

    @property
    def typical_ns(self) -> float:
        return median(call.end_ns - call.start_ns for call in self.calls)

    @property
    def total_ns(self) -> int:
        return sum(call.end_ns - call.start_ns for call in self.calls)

    @property
    def spread(self) -> float:
        """Robust spread of the durations relative to their median."""
        typical = self.typical_ns
        return 1.4826 * median(abs(c.end_ns - c.start_ns - typical) for c in self.calls) / max(typical, 1.0)


@dataclass(frozen=True, slots=True)
class Judgement:
    """``anchor`` marks an iteration; ``witness`` works in each and in no idle turn (None where nothing was
    found); ``confidence`` in 0..1 with its ``reasons`` in words; ``per_s`` calls a second, ``typical_ms``
    their median."""

    anchor: Candidate
    witness: Candidate | None
    confidence: float
    reasons: tuple[str, ...]
    per_s: float
    typical_ms: float


@dataclass(frozen=True, slots=True)
class _Inside:
    """Calls of a child within those of a parent that were seen whole: ``per_call`` how many in each;
    ``share`` of the parent's time, in the calls that had any, that the child took; ``of_total`` of all the
    parent's time."""

    per_call: tuple[int, ...]
    share: float
    of_total: float

    @property
    def where_any(self) -> list[int]:
        """How many in each of the parent's calls that had any: an idle turn of a loop has none."""
        return [count for count in self.per_call if count]

    @property
    def even(self) -> bool:
        """Nearly always the same number, as of the parts of one thing."""
        counts = self.where_any
        return counts.count(mode(counts)) >= EVEN * len(counts)

    @property
    def one_each(self) -> float:
        return sum(count == 1 for count in self.per_call) / len(self.per_call)

    @property
    def never_more(self) -> bool:
        return sum(count > 1 for count in self.per_call) <= 0.01 * len(self.per_call)


def judge(watched: Sequence[Watched], window_ns: int, busy: float | None) -> Judgement | None:
    """The best anchor among functions watched over the same ``window_ns``; None when none will do.

    ``busy``: share of the loop thread's time in which it did not wait for whatever comes next, by the
    samples.
    """
    fit = [one for one in watched if _fit(one, window_ns)]
    if not fit:
        return None
    outer = [one for one in fit if not any(_contained(one, other) for other in fit if other is not one)]
    best = max(outer or fit, key=lambda one: _worth(one, window_ns))
    notes: list[str] = []
    sure = 1.0
    for _ in range(len(fit)):
        step = _inwards(best, fit, notes)
        if step is None:
            break
        best, factor = step
        sure *= factor
    return _judgement(best, fit, watched, window_ns, busy, notes, sure)


def _fit(one: Watched, window_ns: int) -> bool:
    calls = one.calls
    if one.hot or one.unseen or len(calls) < FEWEST_CALLS:
        return False
    if len(calls) / (window_ns / 1e9) > FASTEST_PER_S:
        return False
    overlaps = sum(later.start_ns < earlier.end_ns for earlier, later in pairwise(calls))
    return overlaps <= OVERLAPPING * len(calls)


def _worth(one: Watched, window_ns: int) -> float:
    """Time it takes up, less where it rests; evenness counts a little."""
    working = one.total_ns / window_ns * (1.0 - one.candidate.resting)
    return working * (0.7 + 0.3 / (1.0 + one.spread))


def _inside(child: Watched, parent: Watched) -> _Inside | None:
    """None when the child's calls do not lie within the parent's."""
    starts = [call.start_ns for call in parent.calls]
    first, last = starts[0], parent.calls[-1].end_ns
    counts = [0] * len(starts)
    filled = [0] * len(starts)
    seen = within = 0
    for call in child.calls:
        if call.start_ns < first or call.end_ns > last:
            continue
        seen += 1
        at = bisect_right(starts, call.start_ns) - 1
        if call.end_ns <= parent.calls[at].end_ns:
            within += 1
            counts[at] += 1
            filled[at] += call.end_ns - call.start_ns
    if not seen or within < WITHIN * seen:
        return None
    lengths = [call.end_ns - call.start_ns for call in parent.calls]
    with_any = sum(length for length, count in zip(lengths, counts) if count)
    return _Inside(tuple(counts), sum(filled) / max(with_any, 1), sum(filled) / max(sum(lengths), 1))


def _contained(one: Watched, other: Watched) -> bool:
    inside = _inside(one, other)
    return inside is not None and _inside(other, one) is None


def _inwards(parent: Watched, fit: Sequence[Watched], notes: list[str]) -> tuple[Watched, float] | None:
    """A function within ``parent`` that marks iterations better, with the factor by which that is less
    sure."""
    children = []
    for one in fit:
        inside = _inside(one, parent) if one is not parent else None
        if inside is not None and _inside(parent, one) is None:
            children.append((one, inside))
    children.sort(key=lambda pair: -pair[1].of_total)
    for child, inside in children:
        name, above = child.candidate.function.name, parent.candidate.function.name
        if inside.one_each >= WITHIN and inside.share >= WHOLE:
            return child, 1.0
        if _loops_over(parent, child, inside):
            notes.append(f"{above} runs {name} {fmean(inside.where_any):.0f} times a call")
            return child, 0.7 if inside.even else 0.9
        resting = parent.candidate.resting
        if resting > RESTS and child.candidate.resting < resting / 3 and inside.never_more:
            working = 1.0 - resting
            if inside.share < 0.8 and inside.of_total >= 0.8 * working:
                notes.append(f"{above} also waits for work, {name} does not")
                return child, 0.95
    return None


def _loops_over(parent: Watched, child: Watched, inside: _Inside) -> bool:
    """Is the parent a loop over iterations? Parts of a step (layers) come in a fixed number; iterations of a
    request do not, or they make calls that are longer than any step."""
    if child.typical_ns < SHORTEST_STEP_NS or inside.of_total < MOST_OF:
        return False
    if median(inside.where_any) <= SEVERAL:
        return False
    return not inside.even or parent.typical_ns > LONGEST_STEP_NS


def _witness(anchor: Watched, fit: Sequence[Watched]) -> Candidate | None:
    """The child that takes most of the anchor's time and is called once where it is called at all."""
    best, most = None, 0.3
    for one in fit:
        inside = _inside(one, anchor) if one is not anchor else None
        if inside is None or _inside(anchor, one) is not None or not inside.never_more:
            continue
        if inside.of_total > most and inside.share >= 0.3:
            best, most = one.candidate, inside.of_total
    return best


def _judgement(
    anchor: Watched,
    fit: Sequence[Watched],
    watched: Sequence[Watched],
    window_ns: int,
    busy: float | None,
    notes: list[str],
    sure: float,
) -> Judgement:
    calls, typical = len(anchor.calls), anchor.typical_ns
    cover = min(1.0, anchor.total_ns / window_ns)
    span = anchor.calls[-1].end_ns - anchor.calls[0].start_ns
    per_s = (calls - 1) / max(span / 1e9, 1e-9)
    reasons = [
        f"{calls} calls, {per_s:.1f} a second, {typical / 1e6:.1f} ms each (spread {anchor.spread:.0%})"
    ]
    score = 0.25 * min(1.0, calls / ENOUGH_CALLS)
    if busy is not None and busy > 0.01:
        # A coroutine is on no stack while it awaits, but what it awaits belongs to it.
        waits = anchor.candidate.function.flags & COROUTINE
        present = cover if waits else anchor.candidate.presence * (1.0 - anchor.candidate.resting)
        working = min(1.0, present / busy)
        reasons.append(f"{working:.0%} of what the thread does happens in it")
    else:
        working = cover
        reasons.append(f"{working:.0%} of the time passes in it")
    score += 0.35 * min(1.0, working / ENOUGH_COVER)
    score += 0.2 / (1.0 + anchor.spread)
    partners = [
        one.candidate.function.name
        for one in fit
        if one is not anchor and (inside := _inside(one, anchor)) is not None and inside.one_each >= WITHIN
    ]
    if partners:
        score += 0.2
        reasons.append(f"once in each call: {', '.join(sorted(set(partners))[:3])}")
    else:
        score += 0.08
        reasons.append("no other function was seen that is called just as often")
    unseen = [one for one in watched if not one.hot and not one.calls and one.candidate.presence > 0.3]
    reasons += [
        f"{one.candidate.function.name} runs, but no call of it was seen"
        for one in unseen[:2]
        if one.unseen is None and not one.candidate.still
    ]
    for one in fit:
        inside = _inside(one, anchor) if one is not anchor else None
        if inside is not None and inside.of_total >= MOST_OF and median(inside.where_any) > SEVERAL:
            reasons.append(
                f"it runs {one.candidate.function.name} {fmean(inside.where_any):.0f} times, as its parts"
            )
            sure *= 0.9
            break
    if calls < FEW_CALLS:
        sure *= 0.5 + 0.5 * calls / FEW_CALLS
        reasons.append("few calls were seen")
    if typical < SHORTEST_STEP_NS:
        sure *= 0.4
        reasons.append("its calls are shorter than any engine's iteration")
    if anchor.candidate.resting > RESTS:
        reasons.append(f"it waits for work {anchor.candidate.resting:.0%} of its time")
    return Judgement(
        anchor.candidate,
        _witness(anchor, fit),
        round(max(0.0, min(1.0, score * sure)), 2),
        (*reasons, *notes),
        round(per_s, 2),
        round(typical / 1e6, 3),
    )
