"""Requests of a replica, joined from the probes' few events and the ends of the steps that carried them.

The probe tells when something changes for a request; every step in between gave it its tokens at its end. So
intervals between tokens are differences of step ends, worked out once, when the request has ended.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from latencyprism.records import ring
from latencyprism.records.request import FINISH_REASONS, ROUTES, Request, word_at
from latencyprism.records.step import NULL

KEPT_STEPS = 1 << 16
LIVE_LIMIT = 1 << 16
DELIVERY_WAIT_NS = 2_000_000_000
"""How long an ended request waits for word from the API process that its last token was handed out."""
_ABORTED = FINISH_REASONS.index("abort")


class _Live:
    """A request that has not ended."""

    __slots__ = ("arrival", "cached", "client", "first_step", "had", "preempted", "prompt", "ranges", "route",
                 "whole")  # fmt: skip

    def __init__(self) -> None:
        self.arrival: int | None = None
        self.client: int | None = None
        self.prompt: int | None = None
        self.cached: int | None = None
        self.first_step: int | None = None
        self.route: str | None = None
        self.had = 0
        self.preempted = 0
        # First and last step of each stretch in which every step gave it tokens; last None: it goes on.
        self.ranges: list[tuple[int, int | None]] = []
        self.whole = True  # False: events of it may have been lost

    def get_tokens_from(self, step: int) -> None:
        if not self.ranges or self.ranges[-1][1] is not None:
            self.ranges.append((step, None))


class _Ended(NamedTuple):
    live: _Live
    request: int
    last_step: int | None
    seen_ns: int
    output_tokens: int
    reason: int | None


class UnderWay(NamedTuple):
    """A request that has not ended, as far as the probe has told; what was not observed is None.

    ``tokens``: steps that gave it tokens; ``first_token_ns``: end of the first of them; ``whole``: its story
    has no hole."""

    request: int
    arrival_ns: int | None
    prompt_tokens: int | None
    cached_tokens: int | None
    first_step: int | None
    first_token_ns: int | None
    tokens: int
    whole: bool


class RequestJoin:
    """Feed it ``step`` and ``events`` in the order of the ring, ``events`` of the API process's ring too;
    ``ready`` gives the requests that have ended since the last call, ``in_flight`` counts the others."""

    def __init__(self, engine: str, replica: int) -> None:
        self.engine, self.replica = engine, replica
        self._live: dict[int, _Live] = {}
        self._received: dict[int, tuple[int | None, int | None, str | None]] = {}
        self._base = 0
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._handed_out: dict[int, int] = {}
        self._deliveries: deque[tuple[int, int]] = deque(maxlen=KEPT_STEPS)
        self._waiting: deque[_Ended] = deque()
        self._even = True

    @property
    def in_flight(self) -> int:
        return len(self._live)

    def under_way(self) -> list[UnderWay]:
        """Those in flight, in the order in which the engine added them."""
        last, found = self._base + len(self._ends) - 1, []
        for request, live in self._live.items():
            tokens, first_end = 0, None
            if live.ranges:
                first_end = self._end(live.ranges[0][0])
                for a, b in live.ranges:
                    tokens += max((last if b is None else min(b, last)) - a + 1, 0)
            begun = bool(live.had)
            found.append(
                UnderWay(
                    request, live.arrival, live.prompt, live.cached, live.first_step, first_end, tokens,
                    live.whole and not begun,
                )
            )  # fmt: skip
        return found

    def step(self, number: int, start_ns: int, end_ns: int) -> None:
        """A step has ended."""
        expected = self._base + len(self._ends)
        if not self._ends or not expected <= number < expected + KEPT_STEPS:
            if self._ends:
                self.lost()
            self._base, self._starts, self._ends, self._handed_out = number, [], [], {}
        elif number > expected:
            self.lost()
            missing = number - expected
            self._starts += [self._ends[-1]] * missing
            self._ends += [self._ends[-1]] * missing
        self._starts.append(start_ns)
        self._ends.append(max(end_ns, self._ends[-1] if self._ends else end_ns))
        if len(self._ends) > 2 * KEPT_STEPS:
            self._base += KEPT_STEPS
            del self._ends[:KEPT_STEPS], self._starts[:KEPT_STEPS]
            self._handed_out = {step: at for step, at in self._handed_out.items() if step >= self._base}

    def lost(self) -> None:
        """Records are missing: what is derived from a whole story is not told of the requests under way."""
        for live in self._live.values():
            live.whole = False

    def events(self, words: Sequence[int]) -> None:
        """One KIND_REQUEST payload, of the engine loop's process or of the API process."""
        count = min(max(words[0], 0), ring.REQUEST_EVENTS_PER_RECORD)
        for at in range(1, 1 + count * ring.REQUEST_EVENT_WORDS, ring.REQUEST_EVENT_WORDS):
            event, request, a, b, c, d = words[at : at + ring.REQUEST_EVENT_WORDS]
            if event == ring.REQUEST_RECEIVED:
                _make_room(self._received)
                self._received[request] = (_known(a), _known(b), word_at(ROUTES, d))
            elif event == ring.REQUEST_DELIVERED:
                self._deliveries.append((c, b))
            elif event == ring.REQUEST_UNEVEN:
                self._even = False
            elif event == ring.REQUEST_ENDED:
                live = self._live.pop(request, None) or self._unheard()
                self._waiting.append(_Ended(live, request, _known(a), b, c, _known(d)))
            else:
                self._change(event, request, a, b, c, d)

    def _unheard(self) -> _Live:
        live = _Live()
        live.whole = False
        return live

    def _change(self, event: int, request: int, a: int, b: int, c: int, d: int) -> None:
        live = self._live.get(request)
        if event == ring.REQUEST_ADDED:
            if live is None:
                _make_room(self._live)
                live = self._live[request] = _Live()
                live.arrival, live.prompt, live.had = _known(a), _known(c), max(d, 0)
        elif live is None:
            return
        elif event == ring.REQUEST_SCHEDULED:
            if live.first_step is None and not live.had:
                live.first_step, live.cached, live.route = a, _known(b), word_at(ROUTES, d)
            if c == 1:
                live.get_tokens_from(a)
        elif event == ring.REQUEST_TOKENS:
            live.get_tokens_from(a)
        elif event == ring.REQUEST_PAUSED:
            live.preempted += b == 1
            if live.ranges and live.ranges[-1][1] is None:
                live.ranges[-1] = (live.ranges[-1][0], a - 1)

    # -- what has ended ------------------------------------------------------------------------------

    def ready(self, now_ns: int, api: bool) -> list[Request]:
        """Requests that ended; ``api``: a probe in the API process tells when tokens are handed out."""
        self._match_deliveries()
        done = []
        while self._waiting:
            ended = self._waiting[0]
            handed_out = ended.last_step is None or ended.last_step in self._handed_out
            expected = api and ended.output_tokens and ended.reason != _ABORTED and not handed_out
            if expected and now_ns - ended.seen_ns < DELIVERY_WAIT_NS:
                break
            self._waiting.popleft()
            done.append(self._record(ended))
        return done

    def _match_deliveries(self) -> None:
        """A delivery carries a time stamp that the engine took within the update of its step."""
        while self._deliveries and self._ends and self._deliveries[0][0] <= self._ends[-1]:
            stamp, end = self._deliveries.popleft()
            place = bisect_left(self._ends, stamp)
            if self._starts[place] <= stamp:
                self._handed_out[self._base + place] = end

    def _record(self, ended: _Ended) -> Request:
        live, reason = ended.live, ended.reason
        received = self._received.pop(ended.request, (None, None, None))
        arrival = received[0] if received[0] is not None else live.arrival
        ranges = [(a, ended.last_step if b is None else b) for a, b in live.ranges]
        spans = [(a, b) for a, b in ranges if b is not None and a <= b]
        whole = live.whole and not live.had and all(a >= self._base for a, _ in spans)
        first = spans[0][0] if spans and whole else None
        last = spans[-1][1] if spans and whole else None
        first_end, last_end = self._end(first), self._end(last)
        begun = self._start(live.first_step)
        outputs = ended.output_tokens
        itl, slowest, token_steps = self._intervals(spans) if whole and self._even else (None, None, None)
        if token_steps is not None and reason != _ABORTED and token_steps > outputs:
            itl = slowest = token_steps = None  # the story and the engine's own count do not agree
        over = (
            ended.seen_ns if reason == _ABORTED else self._handed(ended.last_step, self._end(ended.last_step))
        )
        return Request(
            engine=self.engine,
            replica=self.replica,
            request=ended.request,
            arrival_ns=arrival,
            queue_ns=_between(arrival, begun),
            prefill_ns=_between(begun, first_end),
            ttft_ns=_between(arrival, self._handed(first, first_end)),
            tpot_ns=(last_end - first_end) // (outputs - 1)
            if first_end is not None and last_end is not None and outputs > 1
            else None,
            e2e_ns=_between(arrival, over),
            prompt_tokens=live.prompt,
            cached_tokens=live.cached,
            output_tokens=outputs,
            max_itl_ns=itl,
            finish_reason=FINISH_REASONS[reason]
            if reason is not None and 0 <= reason < len(FINISH_REASONS)
            else None,
            first_step=live.first_step,
            first_token_step=first,
            last_step=ended.last_step,
            token_steps=token_steps,
            slowest_step=slowest,
            preempted=live.preempted if live.whole else None,
            client_request=received[1],
            route=received[2] or live.route,
        )

    def _intervals(self, spans: Sequence[tuple[int, int]]) -> tuple[int | None, int | None, int | None]:
        """(largest interval between ends of steps that gave tokens, the step at its end, number of steps)."""
        steps = [step for a, b in spans for step in range(a, min(b, self._base + len(self._ends) - 1) + 1)]
        if not steps:
            return None, None, None
        ends = self._ends
        largest, slowest = None, None
        for before, step in pairwise(steps):
            gap = ends[step - self._base] - ends[before - self._base]
            if largest is None or gap > largest:
                largest, slowest = gap, step
        return largest, slowest, len(steps)

    def _handed(self, step: int | None, otherwise: int | None) -> int | None:
        """When the tokens of a step were handed to their streams."""
        return otherwise if step is None else self._handed_out.get(step, otherwise)

    def _end(self, step: int | None) -> int | None:
        place = -1 if step is None else step - self._base
        return self._ends[place] if 0 <= place < len(self._ends) else None

    def _start(self, step: int | None) -> int | None:
        place = -1 if step is None else step - self._base
        return self._starts[place] if 0 <= place < len(self._starts) else None


def _make_room(held: dict[int, Any]) -> None:
    """The oldest goes: its end was never told."""
    while len(held) >= LIVE_LIMIT:
        del held[next(iter(held))]


def _known(word: int) -> int | None:
    return None if word == NULL else word


def _between(start: int | None, end: int | None) -> int | None:
    return None if start is None or end is None else max(end - start, 0)
