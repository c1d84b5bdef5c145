"""Ranks of one replica beside each other: which one a late step waited for, and which became a straggler.

Only where several workers of one pipeline stage are watched: their runs come with the steps, as spans
``execute_model``. What the times of calls can tell, and what not, is in ``detect.rank_groups``. Where all
calls grew alike, what each worker's main thread waited for a CPU meanwhile may still tell: a rank that had to
queue is what the others waited for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from latencyprism.detect.rank_groups import RankGroup, RankGroups
from latencyprism.detect.straggler import Straggler, StragglerTest
from latencyprism.engines.discovery import PIPELINE_STAGE, Replica
from latencyprism.host.held import read_once
from latencyprism.records import Counter, Span, Step

RUN = "execute_model"
RATE = 0.02
"""Weight of a new step in what is usual: about the last 50."""
BLAMED = 0.3
"""A rank is named where it was behind by this part of the step's excess."""
APART = 3.0
"""A rank that queued for a CPU is named where it did so many times as long as any other."""
KEPT_READINGS = 256
ALIKE = 0.5
"""All are named where each took longer by at least this part of it."""


class Blame(NamedTuple):
    """``rank`` None: all of them alike."""

    rank: int | None
    where: str
    text: str


class RankWatch:
    """``see`` the spans of a window before its steps are judged; then for each step ``learn``, or ``blame``.
    Below 10 us a step and rank."""

    def __init__(self, tracks: Sequence[tuple[int, tuple[str, ...]]]) -> None:
        """``tracks``: rank and track of each worker's spans."""
        self._ranks = {track: rank for rank, track in tracks}
        self._names = {rank: track[0] for rank, track in tracks}
        self._groups = RankGroups([rank for rank, _ in tracks])
        self._test = StragglerTest(len(tracks))
        self._waiting: deque[RankGroup] = deque(maxlen=4096)
        self._shares: dict[str | None, list[float]] = {}
        self._late_ns = [0.0] * len(tracks)
        self._pids = [int(track[0].rsplit(" ", 1)[-1]) for _, track in tracks]
        self._place = {track[0]: place for place, (_, track) in enumerate(tracks)}
        self._queued: list[deque[tuple[int, int]]] = [deque(maxlen=KEPT_READINGS) for _ in tracks]

    @staticmethod
    def of(replica: Replica) -> RankWatch | None:
        """None where there is nothing to compare: one worker, or workers of several stages, or ones that
        tell no runs of their first rank (SGLang, whose first rank writes steps)."""
        workers = [member for member in replica.members if member.role == "worker"]
        if replica.engine != "vllm" or len({member.rank for member in workers}) < 2:
            return None
        if any(member.rank >= PIPELINE_STAGE for member in workers):
            return None
        roles = replica.roles()
        return RankWatch([(m.rank, (f"{roles[m.pid]} {m.pid}",)) for m in workers])

    # -- seeing ----------------------------------------------------------------------------------

    def see(self, spans: Sequence[Span]) -> list[Straggler]:
        """The ranks that have become stragglers by these."""
        found: list[Straggler] = []
        for span in spans:
            if span.name != RUN:
                continue
            rank = self._ranks.get(span.track)
            group = None if rank is None else self._groups.take(rank, span.start_ns, span.end_ns)
            if group is not None:
                self._waiting.append(group)
                found += self._test.feed(group)
        return found

    def count(self, counter: Counter) -> None:
        """A ``runqueue_ns`` of the host sampler; those of the workers' main threads are kept."""
        place = self._place.get(counter.track[0])
        if place is not None and counter.track[1].endswith(f" {self._pids[place]}"):
            self._queued[place].append((counter.time_ns, int(counter.value)))

    def of_step(self, step: Step) -> RankGroup | None:
        """The longest of the groups that began in a step, taken out; None where none is whole yet. Steps in
        their order. Where a step is scheduled while the one before runs, a step may have two."""
        longest: RankGroup | None = None
        waiting = self._waiting
        while waiting and waiting[0].start_ns < step.end_ns:
            group = waiting.popleft()
            if group.start_ns >= step.start_ns and (
                longest is None or group.end_ns - group.start_ns > longest.end_ns - longest.start_ns
            ):
                longest = group
        return longest

    # -- judging ---------------------------------------------------------------------------------

    def learn(self, step: Step, group: RankGroup, expected_ms: float) -> None:
        """Take in a step that raised no alarm."""
        per_ns = 1e-6 / expected_ms
        usual = self._shares.get(step.phase)
        if usual is None:
            usual = [took * per_ns for took in group.execute_ns]
        self._shares[step.phase] = [
            old + RATE * (took * per_ns - old) for old, took in zip(usual, group.execute_ns)
        ]
        self._late_ns = [old + RATE * (late - old) for old, late in zip(self._late_ns, group.late_ns)]

    def blame(self, step: Step, group: RankGroup, expected_ms: float) -> Blame | None:
        """Who held a late step up; None where the ranks do not tell."""
        usual = self._shares.get(step.phase)
        excess_ns = step.duration_ns - expected_ms * 1e6
        if usual is None or excess_ns <= 0.0:
            return None
        places = range(len(group.execute_ns))
        usual_ns = [share * expected_ms * 1e6 for share in usual]
        longer = [min(group.longer_ns[p], group.execute_ns[p] - usual_ns[p]) for p in places]
        late = [group.late_ns[p] - self._late_ns[p] for p in places]
        worst = max(places, key=lambda p: max(longer[p], 0.0) + max(late[p], 0.0))
        took_ms, usual_ms = group.execute_ns[worst] / 1e6, usual_ns[worst] / 1e6
        if max(longer[worst], 0.0) + max(late[worst], 0.0) >= BLAMED * excess_ns:
            name = self._called(worst)
            if longer[worst] >= late[worst]:
                text = f"{name}: {RUN} {took_ms:.1f} ms where {usual_ms:.1f} ms is usual"
                return Blame(self._groups.ranks[worst], f"{name}: {RUN}", text)
            text = f"{name}: began {group.late_ns[worst] / 1e6:.1f} ms after the first rank"
            return Blame(self._groups.ranks[worst], f"{name}: before {RUN}", text)
        if all(group.execute_ns[p] - usual_ns[p] >= ALIKE * excess_ns for p in places):
            queued = self._who_queued(step.start_ns, excess_ns)
            if queued is not None:
                return queued
            text = (
                f"{RUN} grew on all {len(usual)} ranks alike ({took_ms:.1f} ms where {usual_ms:.1f} ms is "
                "usual): they wait for each other, and which one is slow these times do not tell"
            )
            return Blame(None, f"all ranks: {RUN}", text)
        return None

    def _who_queued(self, since_ns: int, excess_ns: float) -> Blame | None:
        """The rank whose main thread waited for a CPU far longer than any other's, since the last reading
        before ``since_ns``."""
        waited = []
        for pid, readings in zip(self._pids, self._queued):
            before = next((ns for time_ns, ns in reversed(readings) if time_ns <= since_ns), None)
            now_ns = runqueue_ns(pid)
            if before is None or now_ns is None:
                return None
            waited.append(now_ns - before)
        worst = max(range(len(waited)), key=waited.__getitem__)
        next_ns = max(ns for place, ns in enumerate(waited) if place != worst)
        if waited[worst] < BLAMED * excess_ns or waited[worst] < APART * next_ns:
            return None
        name = self._called(worst)
        text = (
            f"{name}: its main thread waited {waited[worst] / 1e6:.1f} ms for a CPU, no other rank's more "
            f"than {next_ns / 1e6:.1f} ms; {RUN} grew on all {len(waited)} ranks, which wait for each other"
        )
        return Blame(self._groups.ranks[worst], f"{name}: {RUN}", text)

    def told(self, straggler: Straggler) -> Blame:
        """A straggler in words."""
        name, rank = self._called(straggler.place), self._groups.ranks[straggler.place]
        begins = straggler.late_ns > straggler.longer_ns
        behind_ms = straggler.share * straggler.shortest_ns / 1e6
        usual_ms = straggler.usual_share * straggler.shortest_ns / 1e6
        what = f"begins {RUN} late" if begins else f"is slow in {RUN}"
        text = (
            f"{name} {what}: behind the fastest rank by {behind_ms:.2f} ms a step where {usual_ms:.2f} ms is "
            f"usual (the fastest takes {straggler.shortest_ns / 1e6:.1f} ms)"
        )
        return Blame(rank, f"{name}: {'before ' if begins else ''}{RUN}", text)

    def _called(self, place: int) -> str:
        rank = self._groups.ranks[place]
        return f"{self._names[rank]} (rank {rank})"


def runqueue_ns(pid: int) -> int | None:
    """How long the main thread of a process has waited for a CPU so far; None where that is not told."""
    words = (read_once(f"/proc/{pid}/task/{pid}/schedstat", 128) or b"").split()
    return int(words[1]) if len(words) == 3 else None
