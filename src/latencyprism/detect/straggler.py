"""A rank that has become slower than the others for good, though the step may be within its limits.

What is looked at is by which part of the shortest run a rank is behind (``rank_groups``): the workload
cancels out, as all ranks have the same. Blocks of groups are compared by their medians, so that a lone stall,
a collection or a prompt does not count.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from latencyprism.detect.rank_groups import RankGroup

BLOCK = 32
"""Groups in a block."""
LEARNED, LEAST_LEARNED = 32, 4
"""Blocks that say what is usual: at most, and before anything is told."""
IN_A_ROW = 3
LEAST_SHARE, LEAST_NS, SPREADS = 0.10, 100_000, 6.0
"""Behind by this part of the shortest run more than usual, by so much time, and by so many times the spread
(median absolute deviation) of the usual blocks."""


class Straggler(NamedTuple):
    """``place`` of the rank among the ranks; its median behind the shortest run over the last block and as is
    usual, both as a share of that run; ``shortest_ns``: the run's median; ``late_ns``, ``longer_ns``: the
    rank's medians; ``onset_ns``: start of the first slow group (CLOCK_MONOTONIC)."""

    place: int
    share: float
    usual_share: float
    shortest_ns: float
    late_ns: float
    longer_ns: float
    onset_ns: int


class StragglerTest:
    """Of ``ranks`` ranks. ``feed`` each group; it gives the ranks that became stragglers, each once, and
    again only after it was none for as long. Not thread-safe."""

    def __init__(self, ranks: int) -> None:
        self._block: list[RankGroup] = []
        self._usual: list[deque[float]] = [deque(maxlen=LEARNED) for _ in range(ranks)]
        self._over = [0] * ranks
        self._calm = [0] * ranks
        self._onset_ns = [0] * ranks
        self.told = [False] * ranks

    def feed(self, group: RankGroup) -> list[Straggler]:
        self._block.append(group)
        if len(self._block) < BLOCK:
            return []
        block, self._block = self._block, []
        shortest_ns = _median([group.shortest_ns for group in block])
        found = [self._judge(place, block, shortest_ns) for place in range(len(self._usual))]
        return [one for one in found if one is not None]

    def _judge(self, place: int, block: list[RankGroup], shortest_ns: float) -> Straggler | None:
        share = _median([group.behind_ns(place) / max(group.shortest_ns, 1) for group in block])
        usual = self._usual[place]
        if len(usual) < LEAST_LEARNED:
            usual.append(share)
            return None
        middle = _median(list(usual))
        spread = _median([abs(value - middle) for value in usual])
        limit = max(LEAST_SHARE, SPREADS * spread, LEAST_NS / max(shortest_ns, 1.0))
        if share - middle <= limit:
            self._over[place] = 0
            self._settle(place, share - middle <= limit / 2.0)
            if not self.told[place]:
                usual.append(share)
            return None
        self._calm[place] = 0
        self._over[place] += 1
        if self._over[place] == 1:
            self._onset_ns[place] = block[0].start_ns
        if self._over[place] < IN_A_ROW or self.told[place]:
            return None
        self.told[place] = True
        late_ns = _median([group.late_ns[place] for group in block])
        longer_ns = _median([group.longer_ns[place] for group in block])
        return Straggler(place, share, middle, shortest_ns, late_ns, longer_ns, self._onset_ns[place])

    def _settle(self, place: int, calm: bool) -> None:
        self._calm[place] = self._calm[place] + 1 if calm else 0
        if self._calm[place] >= IN_A_ROW:
            self.told[place] = False


def _median(values: list[float] | list[int]) -> float:
    """The upper of the two where there are two in the middle."""
    return float(sorted(values)[len(values) // 2])
