"""Collectives out of the operators of a deep window: each rank's part, joined across the processes of one
replica, as spans and as what they say together.

On a CPU the operator returns when its operation is done, so that its call is the operation. An operator that
only enqueues it on an accelerator says nothing of its length, and is none of those looked for here.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from latencyprism.engines.discovery import PIPELINE_STAGE
from latencyprism.records import Span, Step
from latencyprism.records.operators import Operators
from latencyprism.timeline.collectives import (
    MEETING,
    CollectiveSpan,
    Group,
    Operation,
    Place,
    RankDelay,
    groups,
    join,
)

LANE = "collectives"
"""Second part of the track of a rank's spans; the first is its process."""
BLOCKING = {
    "_C::shm_allreduce": "all_reduce",
    "_C::shm_all_gather": "all_gather",
    "_C::shm_gather": "gather",
}
"""Operators, without overloads, that return when their operation is done: those of vLLM on CPUs, through
memory that the ranks share. Of c10d, NCCL and their like the call returns at once."""
_LONGEST_TOLD = 5
_MOSTLY = 2 / 3
_WORKER = re.compile(r"Worker(?: (\d{1,7}))? (\d{1,7})")
_NODE = ""
"""The processes of a replica that one watch sees are of one machine, with one clock."""


@dataclass(slots=True)
class Feed:
    """``spans``: every rank's part in every operation, in order of time. ``operations``: those that all ranks
    must enter, joined. ``processes``: name by process id."""

    spans: list[Span] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)
    processes: dict[int, str] = field(default_factory=dict)


def several_ranks(processes: Iterable[str]) -> bool:
    """Whether these processes (``Worker 1 817``) are of more than one rank."""
    return len({found[1] for process in processes if (found := _WORKER.fullmatch(process))}) > 1


def feed_of(calls: Sequence[Operators], workers: Iterable[str], steps: Sequence[Step] = ()) -> Feed:
    """``calls``: of one replica, with none left out (``every`` is 1). ``workers``: names of all its worker
    processes, also of those whose operators were not seen."""
    feed = Feed(processes={int(found[2]): found[0] for name in workers if (found := _WORKER.fullmatch(name))})
    parts = parts_of(calls, feed.processes.values())
    feed.operations = join(numbered(part for part in parts if part.kind in MEETING))
    told = {
        (part.place.pid, part.start_ns): operation
        for operation in feed.operations
        for part in operation.parts.values()
    }
    number_of = _Steps(steps)
    for part in sorted(parts, key=lambda part: (part.start_ns, part.rank)):
        operation = told.get((part.place.pid, part.start_ns))
        track = (feed.processes[part.place.pid], LANE)
        details = _details(part, operation, feed.processes)
        feed.spans.append(
            Span(track, part.kind, part.start_ns, part.end_ns, number_of(part.start_ns), details)
        )
    return feed


def parts_of(calls: Iterable[Operators], workers: Iterable[str]) -> list[CollectiveSpan]:
    """Each rank's part in each operation, without numbers. A communicator is the tensor-parallel group of one
    stage of the pipeline: memory is shared by the workers of one machine, so all of its ranks are here."""
    known = {name: (int(found[2]), *divmod(int(found[1] or 0), PIPELINE_STAGE))
             for name in workers if (found := _WORKER.fullmatch(name))}  # fmt: skip
    sizes = Counter(stage for _, stage, _ in known.values())
    parts: list[CollectiveSpan] = []
    for one in calls:
        if one.track[0] not in known:
            continue
        pid, stage, rank = known[one.track[0]]
        communicator = f"tp pp {stage}" if stage else "tp"
        kinds = {place: kind for place, name in enumerate(one.names)
                 if (kind := BLOCKING.get(name.partition(".")[0]))}  # fmt: skip
        for start_ns, end_ns, _, name in one.rows[np.isin(one.rows["name"], list(kinds))].tolist():
            parts.append(
                CollectiveSpan(
                    communicator, rank, sizes[stage], kinds[name], start_ns, end_ns, Place(_NODE, pid)
                )
            )
    return parts


def numbered(parts: Iterable[CollectiveSpan]) -> list[CollectiveSpan]:
    """Parts of ranks on one clock, with numbers: those of the rank with most parts, and each other rank's
    part that was under way together with one of these. Where records of a rank were lost it goes on behind
    the hole. Parts that have no like are left out."""
    streams: dict[str, dict[int, list[CollectiveSpan]]] = defaultdict(lambda: defaultdict(list))
    for part in sorted(parts, key=lambda part: part.start_ns):
        streams[part.communicator][part.rank].append(part)
    found: list[CollectiveSpan] = []
    for by_rank in streams.values():
        leader = max(by_rank, key=lambda rank: (len(by_rank[rank]), -rank))
        reference = by_rank.pop(leader)
        found += [part._replace(sequence=number) for number, part in enumerate(reference)]
        for stream in by_rank.values():
            found += _beside(reference, stream)
    return found


def _beside(
    reference: Sequence[CollectiveSpan], stream: Sequence[CollectiveSpan]
) -> Iterable[CollectiveSpan]:
    """Nobody leaves before all have come, so two parts of one operation have a moment in common."""
    number = 0
    for part in stream:
        while number < len(reference) and reference[number].end_ns < part.start_ns:
            number += 1
        if number == len(reference):
            return
        like = reference[number]
        if like.start_ns <= part.end_ns and like.kind == part.kind:
            yield part._replace(sequence=number)
            number += 1


def _details(
    part: CollectiveSpan, operation: Operation | None, processes: dict[int, str]
) -> tuple[tuple[str, str | int | float], ...]:
    """Of one that was joined: its number, and how long this rank waited for whom."""
    told: list[tuple[str, str | int | float]] = [("communicator", part.communicator), ("rank", part.rank)]
    if operation is not None and operation.complete and operation.size > 1:
        waited_ns, last = operation.waited_ns()[part.rank], operation.last_rank
        told += [("operation", operation.number), ("waited_ns", waited_ns)]
        if waited_ns > 0:
            told.append(("waited_for", processes[operation.parts[last].place.pid]))
    return tuple(told)


class _Steps:
    """The number of the step in whose time something begins."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self._steps = sorted(steps, key=lambda step: step.start_ns)
        self._starts = [step.start_ns for step in self._steps]

    def __call__(self, at_ns: int) -> int | None:
        place = bisect_right(self._starts, at_ns) - 1
        inside = place >= 0 and at_ns < self._steps[place].end_ns
        return self._steps[place].step if inside else None


# -- what they say together --------------------------------------------------------------------------


def summary(feed: Feed) -> list[dict[str, Any]]:
    """By communicator, made for ``meta`` of a capture and for JSON. Times of an operation in us, medians; of
    waiting in ms. ``steps``: in which operations began; ``waited_for``: the rank for which the others waited
    more than two thirds of all their waiting, None where there is none."""
    return [_told(group, feed) for group in groups(feed.operations)]


def _told(group: Group, feed: Feed) -> dict[str, Any]:
    own = [operation for operation in feed.operations if operation.communicator == group.communicator]
    steps = {
        span.step
        for span in feed.spans
        if span.step is not None and ("communicator", group.communicator) in span.details
    }
    all_ns = sum(delay.caused_ns for delay in group.delays)
    delays = sorted(group.delays, key=lambda delay: (-delay.caused_ns, delay.rank))
    mostly = bool(delays and all_ns and delays[0].caused_ns > _MOSTLY * all_ns)
    straggler = group.straggler()
    return {
        "communicator": group.communicator,
        "size": group.size,
        "processes": {str(rank): feed.processes[place.pid] for rank, place in sorted(group.places.items())},
        "missing": list(group.missing),
        "operations": group.operations,
        "joined": group.complete,
        "kinds": dict(Counter(operation.kind for operation in own).most_common()),
        "steps": len(steps),
        "link_us": None if group.link_ns is None else group.link_ns / 1e3,
        "spread_us": None if group.spread_ns is None else group.spread_ns / 1e3,
        "link_ms": sum(operation.link_ns for operation in own if operation.complete) / 1e6,
        "ranks": [_told_rank(delay, all_ns) for delay in delays],
        "waits": [
            {"rank": rank, "for": culprit, "ms": ns / 1e6}
            for (rank, culprit), ns in sorted(group.waits.items(), key=lambda wait: -wait[1])
        ],
        "waited_for": delays[0].rank if mostly else None,
        "straggler": None if straggler is None else straggler.rank,
        "longest": _longest(own),
    }


def _told_rank(delay: RankDelay, all_ns: int) -> dict[str, Any]:
    return {
        "rank": delay.rank,
        "last_share": round(delay.last_share, 4),
        "caused_ms": delay.caused_ns / 1e6,
        "caused_share": round(delay.caused_ns / all_ns, 4) if all_ns else None,
        "waited_ms": delay.waited_ns / 1e6,
    }


def _longest(operations: Iterable[Operation]) -> list[dict[str, Any]]:
    """Those that the last rank came to the latest."""
    joined = [operation for operation in operations if operation.complete and operation.size > 1]
    joined.sort(key=lambda operation: -operation.spread_ns)
    return [
        {
            "kind": operation.kind,
            "start_ns": min(part.start_ns for part in operation.parts.values()),
            "waited_for": operation.last_rank,
            "spread_ms": operation.spread_ns / 1e6,
        }
        for operation in joined[:_LONGEST_TOLD]
    ]
