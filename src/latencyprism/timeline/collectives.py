"""Collective operations joined across processes and nodes: who waits for whom, and what the link itself
costs.

In an operation that all ranks must enter before any can leave, the rank that arrives last waits for nobody:
its time is the cost of the link, and what the others take longer, they waited for it. That needs only each
rank's own duration, so clocks of different nodes need not agree. They matter where operations carry no
number and have to be matched by their order, and for telling how far two clocks are apart. Within one node
there is one clock, which tells when each rank came: one that is held up after the operation was done, before
it has left, has then waited for nobody.

Spans must be of the operation itself (a kernel's device time, or a host call that blocks). The host call that
only enqueues it says nothing of its length.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

MEETING = frozenset({"all_reduce", "all_gather", "reduce_scatter", "all_to_all", "barrier"})
"""Kinds in which every rank waits for every other. A broadcast's root, or the sender of a pair, may leave
before the others arrive: of those neither waits nor link costs are told."""

MOST_SHIFT = 64
_FIT = 0.9
_CLEARLY = 3
"""Ends of one operation must lie this many times closer together than those of any other pairing."""


class Place(NamedTuple):
    """Where a rank lives."""

    node: str
    pid: int
    device: int | None = None


class CollectiveSpan(NamedTuple):
    """One rank's part in one operation; times in ns of its node's own clock. ``communicator``: the same
    text on all ranks. ``sequence``: number of the operation in its communicator, the same on all ranks, or
    None."""

    communicator: str
    rank: int
    size: int
    kind: str
    start_ns: int
    end_ns: int
    place: Place
    sequence: int | None = None

    @property
    def duration_ns(self) -> int:
        return self.end_ns - self.start_ns


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation with the parts of all ranks that were seen. ``parts`` by rank."""

    communicator: str
    number: int
    kind: str
    size: int
    parts: Mapping[int, CollectiveSpan]

    @property
    def complete(self) -> bool:
        """All ranks were seen: only then is the last one known, and ``link_ns`` more than an upper bound."""
        return len(self.parts) == self.size

    @property
    def one_clock(self) -> bool:
        """All parts are of one node."""
        return len({part.place.node for part in self.parts.values()}) == 1

    @property
    def last_rank(self) -> int:
        """The rank that the others waited for: the one that came last, or, where clocks do not tell, that was
        in it for the shortest time."""
        if self.one_clock:
            return max(self.parts, key=lambda rank: (self.parts[rank].start_ns, -rank))
        return min(self.parts, key=lambda rank: (self.parts[rank].duration_ns, rank))

    @property
    def link_ns(self) -> int:
        """What the operation cost without any waiting: from the last rank's coming until the first left (one
        clock), else the last rank's duration."""
        last = self.parts[self.last_rank]
        if self.one_clock:
            return max(0, min(part.end_ns for part in self.parts.values()) - last.start_ns)
        return last.duration_ns

    def waited_ns(self) -> dict[int, int]:
        """Rank -> time it waited for the last rank."""
        if self.one_clock:
            came_ns = self.parts[self.last_rank].start_ns
            return {rank: min(came_ns, part.end_ns) - part.start_ns for rank, part in self.parts.items()}
        link = self.link_ns
        return {rank: part.duration_ns - link for rank, part in self.parts.items()}

    @property
    def spread_ns(self) -> int:
        """How much later the last rank came than the first: its straggling in this operation."""
        return max(self.waited_ns().values())


def join(spans: Iterable[CollectiveSpan], skew_ns: int | None = None) -> list[Operation]:
    """The operations of every communicator, in order within each.

    Spans with sequence numbers are joined by these. Without, the n-th operation of a rank is matched with
    those of the others that it can have met (see ``align``, also for ``skew_ns``); ranks that do not fit
    are left out of those operations. Of two spans that claim the same place in an operation, the first is
    kept."""
    by_communicator: dict[str, list[CollectiveSpan]] = defaultdict(list)
    for span in spans:
        if span.end_ns >= span.start_ns and 0 <= span.rank < span.size:
            by_communicator[span.communicator].append(span)
    joined: list[Operation] = []
    for communicator, mine in by_communicator.items():
        numbered = [span for span in mine if span.sequence is not None]
        rows = _by_number(numbered) if len(numbered) == len(mine) else _by_order(mine, skew_ns)
        for number, parts in sorted(rows.items()):
            kind = Counter(part.kind for part in parts.values()).most_common(1)[0][0]
            agreeing = {rank: part for rank, part in parts.items() if part.kind == kind}
            size = max(part.size for part in agreeing.values())
            joined.append(Operation(communicator, number, kind, size, agreeing))
    return joined


def _by_number(spans: Iterable[CollectiveSpan]) -> dict[int, dict[int, CollectiveSpan]]:
    rows: dict[int, dict[int, CollectiveSpan]] = defaultdict(dict)
    for span in spans:
        rows[span.sequence or 0].setdefault(span.rank, span)
    return rows


def _by_order(spans: Iterable[CollectiveSpan], skew_ns: int | None) -> dict[int, dict[int, CollectiveSpan]]:
    """Operations numbered as the rank with the most of them has them."""
    streams: dict[int, list[CollectiveSpan]] = defaultdict(list)
    for span in spans:
        streams[span.rank].append(span)
    for stream in streams.values():
        stream.sort(key=lambda span: span.start_ns)
    reference = max(streams, key=lambda rank: (len(streams[rank]), -rank))
    rows = {number: {reference: span} for number, span in enumerate(streams[reference])}
    for rank, stream in streams.items():
        shift = 0 if rank == reference else align(streams[reference], stream, skew_ns)
        if rank == reference or shift is None:
            continue
        for position, span in enumerate(stream):
            rows.setdefault(position + shift, {}).setdefault(rank, span)
    return rows


def align(
    reference: Sequence[CollectiveSpan], other: Sequence[CollectiveSpan], skew_ns: int | None = None
) -> int | None:
    """The shift such that ``other[n]`` is the operation ``reference[n + shift]``; None if none fits, or more
    than one does.

    Probes attach at different moments, so the first span seen on two ranks need not be of one operation. Two
    parts of one operation are of one kind, and some moment lies in both. On one node that is looked at as it
    is; between nodes after taking out the difference of the clocks that the shift itself implies (at most
    ``skew_ns``, if given), which leaves it to the rhythm of the operations to decide: without a bound, a
    perfectly regular one decides nothing."""
    same_clock = bool(reference and other) and reference[0].place.node == other[0].place.node
    fits: list[tuple[int, int]] = []
    for shift in range(-MOST_SHIFT, MOST_SHIFT + 1):
        pairs = [
            (reference[position + shift], span)
            for position, span in enumerate(other)
            if 0 <= position + shift < len(reference)
        ]
        if not pairs or len(pairs) < min(len(reference), len(other)) // 2:
            continue
        ends = [b.end_ns - a.end_ns for a, b in pairs]
        offset = 0 if same_clock else int(median(ends))
        if skew_ns is not None and abs(offset) > skew_ns:
            continue
        fitting = sum(
            a.kind == b.kind and a.start_ns <= b.end_ns - offset and b.start_ns - offset <= a.end_ns
            for a, b in pairs
        )
        if fitting >= _FIT * len(pairs):
            fits.append((int(median(abs(end - offset) for end in ends)), shift))
    if not fits:
        return None
    fits.sort()
    if len(fits) > 1 and fits[1][0] <= _CLEARLY * fits[0][0]:
        return None
    return fits[0][1]


class ClockDifference(NamedTuple):
    """``offset_ns``: the second node's clock minus the first's; the truth lies within ``error_ns`` of it,
    if no span is wrong."""

    offset_ns: int
    error_ns: int


def clock_difference(operations: Iterable[Operation], first: str, second: str) -> ClockDifference | None:
    """How far the clocks of two nodes are apart, from operations in which ranks of both met: nobody leaves
    before everybody has arrived, which bounds it from both sides. None without such an operation, or if the
    bounds contradict each other (a clock was stepped, or spans are not of the operation itself)."""
    low, high = -(1 << 62), 1 << 62
    ends: list[int] = []
    for operation in operations:
        if operation.kind not in MEETING:
            continue
        a = [part for part in operation.parts.values() if part.place.node == first]
        b = [part for part in operation.parts.values() if part.place.node == second]
        if not a or not b:
            continue
        low = max(low, max(part.start_ns for part in b) - min(part.end_ns for part in a))
        high = min(high, min(part.end_ns for part in b) - max(part.start_ns for part in a))
        ends.append(int(median(p.end_ns for p in b)) - int(median(p.end_ns for p in a)))
    if not ends or low > high:
        return None
    offset = min(max(int(median(ends)), low), high)
    return ClockDifference(offset, max(offset - low, high - offset))


@dataclass(frozen=True, slots=True)
class RankDelay:
    """One rank over a stretch: ``last_share`` of the operations in which it came last; ``caused_ns``: what
    the others together waited for it; ``waited_ns``: what it waited itself."""

    rank: int
    place: Place
    operations: int
    last_share: float
    caused_ns: int
    waited_ns: int


@dataclass(frozen=True, slots=True)
class Group:
    """A communicator over a stretch. ``link_ns`` and ``spread_ns`` are medians over its complete meetings,
    None without any; ``missing``: ranks of which nothing was seen; ``waits``: {(who waited, for whom):
    ns}."""

    communicator: str
    size: int
    places: Mapping[int, Place]
    missing: tuple[int, ...]
    operations: int
    complete: int
    link_ns: int | None
    spread_ns: int | None
    delays: tuple[RankDelay, ...]
    waits: Mapping[tuple[int, int], int]

    @property
    def nodes(self) -> int:
        return len({place.node for place in self.places.values()})

    def straggler(self, least_share: float = 0.5, least_spread: float = 0.25) -> RankDelay | None:
        """The rank that is last in more than ``least_share`` of the operations (and more than twice as
        often as chance would have it) while the spread is more than ``least_spread`` of the link's cost;
        else None."""
        if not self.delays or self.link_ns is None or self.spread_ns is None:
            return None
        worst = max(self.delays, key=lambda delay: (delay.last_share, -delay.rank))
        often = worst.last_share > max(least_share, min(0.95, 2.0 / self.size))
        return worst if often and self.spread_ns > least_spread * max(1, self.link_ns) else None


def groups(operations: Iterable[Operation]) -> list[Group]:
    """What each communicator's operations say together, by name."""
    by_communicator: dict[str, list[Operation]] = defaultdict(list)
    for operation in operations:
        by_communicator[operation.communicator].append(operation)
    return [_group(name, mine) for name, mine in sorted(by_communicator.items())]


def _group(name: str, operations: Sequence[Operation]) -> Group:
    size = max(operation.size for operation in operations)
    places = {rank: part.place for operation in operations for rank, part in operation.parts.items()}
    meetings = [o for o in operations if o.complete and o.kind in MEETING and o.size > 1]
    last, caused, waited = Counter[int](), Counter[int](), Counter[int]()
    waits: dict[tuple[int, int], int] = defaultdict(int)
    for operation in meetings:
        culprit = operation.last_rank
        last[culprit] += 1
        for rank, ns in operation.waited_ns().items():
            if rank != culprit:
                waits[rank, culprit] += ns
                caused[culprit] += ns
                waited[rank] += ns
    delays = tuple(
        RankDelay(rank, places[rank], len(meetings), last[rank] / len(meetings), caused[rank], waited[rank])
        for rank in sorted(places if meetings else ())
    )
    return Group(
        communicator=name,
        size=size,
        places=places,
        missing=tuple(rank for rank in range(size) if rank not in places),
        operations=len(operations),
        complete=len(meetings),
        link_ns=int(median(o.link_ns for o in meetings)) if meetings else None,
        spread_ns=int(median(o.spread_ns for o in meetings)) if meetings else None,
        delays=delays,
        waits=dict(waits),
    )
