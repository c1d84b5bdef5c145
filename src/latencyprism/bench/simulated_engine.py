"""An engine in simulated time: first come, first served, prompts in chunks beside the decodes, slots, noise.

Tells steps, requests under way and ended requests as a probe would, so that what is built on these can be
tested in seconds."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from latencyprism.bench.traces import Arrival
from latencyprism.records import Request, Step
from latencyprism.timeline.requests import UnderWay


@dataclass
class _Flight:
    number: int
    arrival_ns: int
    prompt: int
    output: int
    computed: int = 0
    tokens: int = 0
    first_step: int | None = None
    first_ns: int | None = None
    last_ns: int = 0
    worst_ns: int = 0


@dataclass
class SimulatedEngine:
    """``room``: tokens of a step; step time ms = 4 + .4 x decodes + .12 x prompt tokens, times log-normal
    noise of ``noise`` and a slow wander of the machine's speed of sd ``wander``. ``room`` and ``slots`` may
    be changed between steps, as a guard would."""

    arrivals: Sequence[Arrival]
    slots: int = 8
    room: int = 256
    noise: float = 0.1
    wander: float = 0.2
    seed: int = 0
    base_ms: float = 4.0
    decode_ms: float = 0.4
    token_ms: float = 0.12
    now_ns: int = 1_000_000_000
    _step: int = 0
    _next: int = 0
    _waiting: deque[_Flight] = field(default_factory=deque)
    _running: list[_Flight] = field(default_factory=list)
    _rng: random.Random = field(default_factory=random.Random)
    _begun_ns: int = 0
    _speed: float = 0.0

    def __post_init__(self) -> None:
        self._rng = random.Random(self.seed)
        self._begun_ns = self.now_ns

    def under_way(self) -> list[UnderWay]:
        return [
            UnderWay(f.number, f.arrival_ns, f.prompt, 0, f.first_step, f.first_ns, f.tokens, True)
            for f in [*self._running, *self._waiting]
        ]

    @property
    def over(self) -> bool:
        return self._next >= len(self.arrivals) and not self._running and not self._waiting

    def step(self) -> tuple[Step | None, list[Request]]:
        """One step, and the requests that ended with it; None while nothing is there (time goes on)."""
        self._arrive()
        while self._waiting and len(self._running) < self.slots:
            self._running.append(self._waiting.popleft())
        if not self._running:
            if self._next < len(self.arrivals):
                self.now_ns = self._begun_ns + int(self.arrivals[self._next].at_s * 1e9) + 1
            return None, []
        start = self.now_ns
        decoding = [f for f in self._running if f.first_ns is not None]
        room, chunks, work, context = self.room - len(decoding), [], 0, 0
        for flight in self._running:
            if flight.first_ns is None and room > 0:
                part = min(room, flight.prompt - flight.computed)
                flight.computed += part
                flight.first_step = self._step if flight.first_step is None else flight.first_step
                room -= part
                chunks.append((flight, part))
                work += part * flight.computed
            context += flight.computed + flight.tokens
        prefill = sum(part for _, part in chunks)
        ms = self.base_ms + self.decode_ms * len(decoding) + self.token_ms * prefill
        self._speed = 0.998 * self._speed + self._rng.gauss(0.0, self.wander * 0.063)
        self.now_ns += int(ms * 1e6 * self._rng.lognormvariate(self._speed, self.noise))
        ended = self._hand_out([*decoding, *(f for f, _ in chunks if f.computed >= f.prompt)])
        self._arrive()
        step = Step(
            "simulated", 0, 0, self._step, start, self.now_ns, None, len(decoding) + len(chunks), len(chunks),
            len(decoding), prefill, len(decoding), 0, context, work, running=len(self._running),
            waiting=len(self._waiting), gap_ns=0,
        )  # fmt: skip
        self._step += 1
        return step, ended

    def _arrive(self) -> None:
        while self._next < len(self.arrivals):
            arrival = self.arrivals[self._next]
            at = self._begun_ns + int(arrival.at_s * 1e9)
            if at > self.now_ns:
                return
            self._waiting.append(_Flight(self._next, at, arrival.prompt, arrival.output))
            self._next += 1

    def _hand_out(self, flights: Sequence[_Flight]) -> list[Request]:
        ended = []
        for flight in flights:
            flight.tokens += 1
            if flight.first_ns is None:
                flight.first_ns = self.now_ns
            else:
                flight.worst_ns = max(flight.worst_ns, self.now_ns - flight.last_ns)
            flight.last_ns = self.now_ns
            if flight.tokens >= flight.output:
                self._running.remove(flight)
                ended.append(self._record(flight))
        return ended

    def _record(self, flight: _Flight) -> Request:
        first = flight.first_ns or self.now_ns
        spent = self.now_ns - first
        return Request(
            "simulated", 0, flight.number, flight.arrival_ns, ttft_ns=first - flight.arrival_ns,
            tpot_ns=spent // (flight.tokens - 1) if flight.tokens > 1 else None,
            e2e_ns=self.now_ns - flight.arrival_ns, prompt_tokens=flight.prompt, cached_tokens=0,
            output_tokens=flight.tokens, max_itl_ns=flight.worst_ns or None, finish_reason="length",
        )  # fmt: skip
