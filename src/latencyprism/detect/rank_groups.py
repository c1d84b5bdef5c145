"""Runs of one batch on several ranks, put together: which of them began late, and which took long for itself.

Ranks of tensor parallelism execute the same batches in the same order, and wait for each other in every
collective. A call that waits for a slow rank is as long as the slow one's, so lengths alone would blame the
wrong rank or all of them. What a rank is *behind* by is therefore counted from two things that waiting does
not spread: how much later than the first it began, and how much longer than the shortest it took where it
ended as much later, too. A rank that is slow between two collectives of one call is behind in neither.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

KEPT = 4096
"""Runs of a rank that wait for those of the others."""


RankRun = tuple[int, int]
"""One model execution on one rank: start and end, CLOCK_MONOTONIC ns."""


class RankGroup(NamedTuple):
    """One batch on all ranks, in the order of ``RankGroups.ranks``; durations in ns. ``late_ns``: by how much
    each began after the first; ``longer_ns``: by how much it took longer than the shortest and ended later
    than the first to end, whichever is less."""

    start_ns: int
    end_ns: int
    execute_ns: tuple[int, ...]
    late_ns: tuple[int, ...]
    longer_ns: tuple[int, ...]

    @property
    def shortest_ns(self) -> int:
        return min(self.execute_ns)

    def behind_ns(self, place: int) -> int:
        return self.late_ns[place] + self.longer_ns[place]


class RankGroups:
    """``take`` each run, those of one rank in their order; gives the group that it completes, if any."""

    def __init__(self, ranks: Sequence[int]) -> None:
        self.ranks = tuple(ranks)
        self.dropped = 0
        """Runs that found no partner, since a record was lost or a probe came later than the others."""
        self._place = {rank: place for place, rank in enumerate(self.ranks)}
        self._waiting: list[deque[RankRun]] = [deque(maxlen=KEPT) for _ in self.ranks]

    def take(self, rank: int, start_ns: int, end_ns: int) -> RankGroup | None:
        """``rank`` must be one of ``ranks``."""
        self._waiting[self._place[rank]].append((start_ns, end_ns))
        while all(self._waiting):
            stray = self._stray()
            if stray is None:
                return group_of([waiting.popleft() for waiting in self._waiting])
            self._waiting[stray].popleft()
            self.dropped += 1
        return None

    def _stray(self) -> int | None:
        """The rank whose oldest run belongs to an earlier batch than the others': its next one lies nearer to
        the last of them to begin."""
        latest_ns = 0
        for place, waiting in enumerate(self._waiting):
            if len(waiting) > 1:
                latest_ns = latest_ns or max([held[0][0] for held in self._waiting])
                if abs(waiting[1][0] - latest_ns) < latest_ns - waiting[0][0]:
                    return place
        return None


def group_of(runs: Sequence[RankRun]) -> RankGroup:
    """Of the runs of one batch."""
    starts, ends = [start for start, _ in runs], [end for _, end in runs]
    execute = [end - start for start, end in runs]
    first_start, first_end, shortest = min(starts), min(ends), min(execute)
    longer = []
    for took, end in zip(execute, ends):
        over, after = took - shortest, end - first_end
        longer.append(over if over < after else after)
    late = [start - first_start for start in starts]
    return RankGroup(first_start, max(ends), tuple(execute), tuple(late), tuple(longer))
