"""What share of the requests that run or wait will violate TTFT or TPOT, if nothing more comes in.

Work already admitted is laid out on the engine's expected pace: prompts in the order of their arrival
through the chunk budget, answers of the lengths seen lately, slots that become free. What such a prediction
was off by before, under like circumstances, tells what is probable: no distribution is assumed beyond a wide
first guess.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from heapq import heappop, heappush
from math import ceil
from typing import NamedTuple

from latencyprism.baseline import StepTime
from latencyprism.records.request import Request
from latencyprism.records.step import Step
from latencyprism.slo.pace import FIRST_ROOM, Pace
from latencyprism.slo.residuals import KindsOfError
from latencyprism.timeline.requests import UnderWay

SAMPLE_NS = 500_000_000
SAMPLES_MOST = 60
FEW_TOKENS = 4
MANY_TOKENS = (16, 64)
"""The mean of so many tokens is steadier than that of fewer: their errors are kept apart."""
OPEN_MOST = 4096
SURE, LIKELY = 0.9, 0.1
LAID_OUT = 128
"""Of a longer queue the rest is taken to move as slowly."""
MEDIAN = 0.35
"""The n-th of many ends is over by its median when n less this are expected to be."""


class Fate(NamedTuple):
    """One request: probabilities of violating (None: no such objective, or it cannot be told). 0 and 1 where
    it is settled."""

    request: int
    ttft: float | None
    tpot: float | None
    waiting: bool

    @property
    def either(self) -> float:
        return 1.0 - (1.0 - (self.ttft or 0.0)) * (1.0 - (self.tpot or 0.0))


class Outlook(NamedTuple):
    """``share`` of ``requests`` expected to violate, and where it lies in eight of ten cases (``low`` to
    ``high``); all None where nothing is in flight."""

    time_ns: int
    fates: tuple[Fate, ...]
    share: float | None
    low: float | None
    high: float | None
    waiting: int
    prompt_tokens: int = 0
    """Of prompts that wait or are under way, as far as they have to be computed."""
    prompt_reach: float = 0.0
    """Mean context that one of these tokens attends to."""

    @property
    def requests(self) -> int:
        return len(self.fates)


class _Open:
    """Predictions made for a request that is not settled yet."""

    __slots__ = ("first_ns", "sampled_ns", "tpot", "ttft")

    def __init__(self) -> None:
        self.sampled_ns = 0
        self.first_ns: int | None = None
        self.ttft: list[tuple[int, int, float]] = []
        """(when ns, kind, predicted s from then on)"""
        self.tpot: list[tuple[int, int, float]] = []
        """(group of tokens, kind, predicted s)"""


class Forecaster:
    """``limits`` in ns; None: no such objective. Call ``steps`` and ``ended`` with what comes in, ``look``
    whenever an outlook is wanted."""

    def __init__(self, model: StepTime, ttft_limit_ns: int | None, tpot_limit_ns: int | None) -> None:
        self.pace = Pace(model)
        self.ttft_limit_s = None if ttft_limit_ns is None else ttft_limit_ns / 1e9
        self.tpot_limit_s = None if tpot_limit_ns is None else tpot_limit_ns / 1e9
        self._ttft = KindsOfError((0.03, 0.1, 0.25, 0.6, 1.5, 4.0))
        self._tpot = [KindsOfError((0.0, 0.15, 0.4, 0.7, 0.85)) for _ in range(len(MANY_TOKENS) + 1)]
        self._open: dict[int, _Open] = {}

    def steps(self, steps: Iterable[Step]) -> None:
        for step in steps:
            self.pace.take(step)

    def ended(self, requests: Iterable[Request]) -> None:
        for request in requests:
            self.pace.ended(request)
            opened = self._open.pop(request.request, None)
            if opened is None:
                continue
            if opened.ttft and request.ttft_ns is not None and request.arrival_ns is not None:
                self._settle_ttft(opened, request.arrival_ns + request.ttft_ns)
            if request.tpot_ns is not None:
                for group, kind, predicted in opened.tpot:
                    self._tpot[group].add(kind, predicted, request.tpot_ns / 1e9)

    def look(self, now_ns: int, flights: Sequence[UnderWay]) -> Outlook:
        plan = _Plan(self.pace, flights)
        fates, waiting = [], 0
        for flight in flights:
            if not flight.whole or flight.arrival_ns is None:
                continue  # its beginning was not seen: neither of its times will be known
            opened = self._opened(flight.request)
            sample = now_ns - opened.sampled_ns >= SAMPLE_NS
            if sample:
                opened.sampled_ns = now_ns
            ttft = self._first_token(now_ns, flight, plan, opened, sample)
            tpot = self._per_token(now_ns, flight, plan, opened, sample)
            waiting += flight.first_step is None
            fates.append(Fate(flight.request, ttft, tpot, flight.first_token_ns is None))
        if not fates:
            return Outlook(now_ns, (), None, None, None, waiting, plan.prompt_tokens, plan.reach)
        chances = [fate.either for fate in fates]
        share = sum(chances) / len(chances)
        low = sum(chance >= SURE for chance in chances) / len(chances)
        high = sum(chance >= LIKELY for chance in chances) / len(chances)
        low, high = min(low, share), max(high, share)
        return Outlook(now_ns, tuple(fates), share, low, high, waiting, plan.prompt_tokens, plan.reach)

    def _opened(self, request: int) -> _Open:
        found = self._open.get(request)
        if found is None:
            while len(self._open) >= OPEN_MOST:
                del self._open[next(iter(self._open))]
            found = self._open[request] = _Open()
        return found

    def _first_token(
        self, now_ns: int, flight: UnderWay, plan: _Plan, opened: _Open, sample: bool
    ) -> float | None:
        limit_s, arrival_ns = self.ttft_limit_s, flight.arrival_ns or 0
        if flight.first_token_ns is not None:
            if opened.ttft:
                self._settle_ttft(opened, flight.first_token_ns)
            if limit_s is None:
                return None
            return float(flight.first_token_ns - arrival_ns > limit_s * 1e9)
        predicted = plan.first_token_s.get(flight.request)
        if limit_s is None or predicted is None:
            return None
        kind = self._ttft.kind(predicted)
        if sample and len(opened.ttft) < SAMPLES_MOST:
            opened.ttft.append((now_ns, kind, predicted))
        left_s = limit_s - (now_ns - arrival_ns) / 1e9
        return 1.0 if left_s <= 0 else self._ttft.probability(kind, predicted, left_s)

    def _per_token(
        self, now_ns: int, flight: UnderWay, plan: _Plan, opened: _Open, sample: bool
    ) -> float | None:
        limit_s = self.tpot_limit_s
        if limit_s is None or not plan.known:
            return None
        had, spent_s = 0, 0.0
        if flight.first_token_ns is not None:
            had = max(flight.tokens - 1, 0)
            spent_s = max(now_ns - flight.first_token_ns, 0) / 1e9 if had else 0.0
        left = self.pace.left_tokens(had + 1)
        predicted = (spent_s + plan.tokens_s(left, flight.first_token_ns is not None)) / (had + left)
        group = bisect_right(MANY_TOKENS, had)
        errors = self._tpot[group]
        kind = errors.kind(had / (had + left) if had >= FEW_TOKENS else 0.0)
        if sample and len(opened.tpot) < SAMPLES_MOST:
            opened.tpot.append((group, kind, predicted))
        return errors.probability(kind, predicted, limit_s)

    def _settle_ttft(self, opened: _Open, first_ns: int) -> None:
        for when_ns, kind, predicted in opened.ttft:
            self._ttft.add(kind, predicted, max(first_ns - when_ns, 0) / 1e9)
        opened.ttft.clear()


class _Plan:
    """Admitted work laid out in time, seconds from now."""

    def __init__(self, pace: Pace, flights: Sequence[UnderWay]) -> None:
        self.first_token_s: dict[int, float] = {}
        decoding = [f for f in flights if f.first_token_ns is not None]
        prompts = [f for f in flights if f.first_token_ns is None]
        decodes = len(decoding)
        room = max(1, (pace.room or FIRST_ROOM) - decodes)
        total = sum(_prompt(pace, f) for f in prompts)
        self.prompt_tokens = int(total)
        # A prompt's tokens attend to half of those computed now and to all before them.
        reach = sum(n * ((f.prompt_tokens or n) - n / 2) for f in prompts for n in (_prompt(pace, f),))
        self.reach = reach / total if total else 0.0
        chunk = int(min(room, total)) or 1
        alone, beside = pace.step_s(decodes, 0), pace.step_s(decodes, chunk, self.reach)
        self.known = beside is not None
        self.after_s = pace.interval_s or alone or 0.0
        self.beside_s = beside or self.after_s
        self.busy_s = 0.0
        if not self.known:
            return
        self.token_s = self.beside_s / chunk
        self.alone_s = alone if alone is not None else self.beside_s
        # Those that wait for a slot come in one by one, as they do all the time: that is in the mean pace.
        free = len(prompts) if pace.slots is None else max(pace.slots - decodes, 0)
        soon = sorted(prompts, key=lambda f: f.first_step is None)[:free]
        self.busy_s = sum(_prompt(pace, f) for f in soon) * self.token_s
        self._lay_out(pace, decoding, prompts, chunk)

    def _lay_out(
        self, pace: Pace, decoding: Sequence[UnderWay], prompts: Sequence[UnderWay], chunk: int
    ) -> None:
        begun = [f for f in prompts if f.first_step is not None]
        queued = [f for f in prompts if f.first_step is None]
        slots = _Slots(pace.slots, len(decoding) + len(begun))
        for flight in decoding:
            slots.taken_until([self.tokens_s(left, True) for left in pace.left_spread(flight.tokens)])
        answers = [self.tokens_s(left, False) for left in pace.left_spread(0)]
        clock, taken = 0.0, 0
        for flight in begun:
            done = pace.prefilled_since(flight.first_step or 0) - taken
            needed = _prompt(pace, flight)
            done = min(max(done, 0), int(needed) - 1)
            taken += max(done, 0)
            # A step is under way, too: on average it has half its time to go.
            clock += max(needed - done, 1) * self.token_s
            self.first_token_s[flight.request] = max(clock, self.beside_s / 2)
            slots.taken_until([clock + answer for answer in answers])
        extra_s = max(self.beside_s - self.alone_s, 0.0) / chunk
        for place, flight in enumerate(queued):
            prompt = _prompt(pace, flight)
            if place >= LAID_OUT:
                clock += clock / place  # as slowly as those before it
                self.first_token_s[flight.request] = clock
                continue
            free_s = slots.free()
            if free_s > clock:
                # It has its first steps for itself.
                clock = free_s + self.alone_s * ceil(prompt / max(chunk, pace.room)) + prompt * extra_s
            else:
                clock += prompt * self.token_s
            self.first_token_s[flight.request] = max(clock, self.beside_s)
            slots.taken_until([clock + answer for answer in answers])

    def tokens_s(self, tokens: float, now: bool) -> float:
        """How long so many tokens take: beside the prompts that are there, if they begin ``now``, and at the
        mean pace of late after that."""
        beside = min(tokens, self.busy_s / self.beside_s) if now and self.beside_s else 0.0
        return beside * self.beside_s + (tokens - beside) * self.after_s


class _Slots:
    """When slots become free, from the spread of the times at which those that hold one may end: the next is
    free when half a one is expected to be, then when one and a half are, and so on."""

    def __init__(self, slots: int | None, taken: int) -> None:
        self._free = None if slots is None else slots - taken
        self._ends: list[tuple[float, float]] = []
        self._ended, self._asked, self._now = 0.0, 0, 0.0

    def taken_until(self, times_s: Sequence[float]) -> None:
        if self._free is not None:
            for time_s in times_s:
                heappush(self._ends, (time_s, 1.0 / len(times_s)))

    def free(self) -> float:
        """Seconds until the next one is; it is taken then."""
        if self._free is None or self._free > 0:
            self._free = None if self._free is None else self._free - 1
            return 0.0
        self._asked += 1
        while self._ends and self._ended < self._asked - MEDIAN:
            self._now, weight = heappop(self._ends)
            self._ended += weight
        return self._now


def _prompt(pace: Pace, flight: UnderWay) -> float:
    """Prompt tokens to compute: what is not in the cache."""
    prompt = flight.prompt_tokens or 1
    if flight.cached_tokens is not None:
        return float(max(prompt - flight.cached_tokens, 1))
    return max(prompt * (1.0 - pace.cached), 1.0)
