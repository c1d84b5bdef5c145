"""Collectives into a capture: spans of every rank, the steps' time in them, and what they say together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from latencyprism.recorder.capture import Capture
from latencyprism.records import Span, Step
from latencyprism.records.operators import Operators
from latencyprism.timeline.breakdown import COLLECTIVE, COLLECTIVE_WAIT, SpanIndex, break_down
from latencyprism.timeline.collective_feed import feed_of, summary

MOST_DRAWN = 100_000
"""Parts of ranks in one file; all are counted."""


def add_collectives(capture: Capture, calls: Sequence[Operators]) -> None:
    """``calls``: the operators of the replica's workers, with none left out; ``roles`` in ``meta`` names all
    workers. Sets ``collectives`` in ``meta``."""
    roles = capture.meta.get("roles")
    workers = [f"{role} {pid}" for pid, role in (roles if isinstance(roles, dict) else {}).items()]
    feed = feed_of(calls, workers, capture.steps)
    if not feed.spans:
        return
    capture.meta["collectives"] = summary(feed)
    operators = capture.meta.get("operators")
    if isinstance(operators, dict) and operators.get("lost") == 0:
        capture.steps = list(filled(capture.steps, capture.spans, feed.spans))
    if len(feed.spans) > MOST_DRAWN:
        left = f"collectives: all are counted, the first {MOST_DRAWN} of {len(feed.spans)} are drawn"
        capture.meta["not_available"] = [*capture.meta.get("not_available", ()), left]
    drawn = feed.spans[:MOST_DRAWN]
    capture.spans = sorted([*capture.spans, *drawn], key=lambda span: span.start_ns)


def filled(steps: Sequence[Step], spans: Sequence[Span], collectives: Sequence[Span]) -> Iterator[Step]:
    """The steps in their order, ``collective_ns`` set in those of which all collectives were seen: the time
    of the rank whose execution ended last, waiting included, which the parts of the step divide."""
    seen: dict[str, tuple[int, int]] = {}
    for span in collectives:
        lane = span.track[0]
        since_ns, until_ns = seen.get(lane, (span.start_ns, span.end_ns))
        seen[lane] = (min(since_ns, span.start_ns), max(until_ns, span.end_ns))
    since_ns = max((since for since, _ in seen.values()), default=0)
    until_ns = min((until for _, until in seen.values()), default=0)
    began_in = {span.step for span in collectives}
    index = SpanIndex.of([*spans, *collectives])
    inside: dict[tuple[str, int, int], list[Step]] = defaultdict(list)
    for step in steps:
        if since_ns <= step.start_ns and step.end_ns <= until_ns:
            inside[step.engine, step.replica, step.rank].append(step)
    lengths: dict[Step, int] = {}
    for own in inside.values():
        for found in break_down(own, index):
            if any(part.lanes[-1] in seen for part in found.parts):
                sums = found.sums
                ns = sums.get(COLLECTIVE, 0) + sums.get(COLLECTIVE_WAIT, 0)
                # Where a rank's execution was not told, its collectives are in no part of the step.
                if ns or found.step.step not in began_in:
                    lengths[found.step] = ns
    for step in steps:
        told = lengths.get(step)
        yield step if told is None else step._replace(collective_ns=told)
