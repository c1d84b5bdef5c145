"""Where the time of a request went, from the steps that carried it and those it waited for.

Each stretch of a request's life is filled with steps and the pauses between them. A step is divided by what
its work costs: a line through the capture's own steps says what a step costs as such, for each token of a
prompt, for the attention that prompts take and for each request that decodes; what a step took beyond that
line is a stall. The parts of a stretch always add up to it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from latencyprism.records import Request, Step

OWN, OTHERS_PREFILL, MATES, STALL, BETWEEN, UNSEEN = (
    "own", "others_prefill", "batch_mates", "stall", "between_steps", "unseen",
)  # fmt: skip
"""``own``: steps as they would have been for this request alone; ``batch_mates``: what the decoding of others
added; ``between_steps``: no step was under way; ``unseen``: the steps are not in the capture."""

MEANWHILE = ("runqueue_ns", "throttled_ns", "gc_ns")
FEWEST_STEPS = 30
_ROUNDS = 40


class StepPrice(NamedTuple):
    """What a step costs, ns: as such, a prompt token, a request that decodes, a unit of attention work."""

    base_ns: float
    prefill_token_ns: float
    decode_ns: float
    attention_ns: float

    def prefill_ns(self, step: Step) -> float:
        """Of all prompt tokens of a step."""
        return self.prefill_token_ns * (step.prefill_tokens or 0) + self.attention_ns * (
            step.attention_work or 0
        )


@dataclass(slots=True)
class Stretch:
    """``name``: ``queue``, ``prefill``, ``decode`` or ``output``; ``parts`` in ns, adding up to ``ns``.
    ``worst``: the request whose prompt is behind most of ``others_prefill``, where the capture holds it;
    ``meanwhile``: what the steps in it say of their threads and interpreter, ns by column (within the parts,
    not beside them)."""

    name: str
    ns: int
    parts: dict[str, int] = field(default_factory=dict)
    steps: int = 0
    others_prefill_tokens: int = 0
    worst: Request | None = None
    meanwhile: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class Story:
    """``stretches`` follow one another, from arrival to the last token; ``own_tokens``: of the prompt,
    without those that were cached. ``largest_pause``: the step at the end of the request's longest wait for a
    token, and what it was made of."""

    request: Request
    stretches: list[Stretch]
    own_tokens: int | None
    largest_pause: tuple[Step, Stretch] | None = None

    def stretch(self, name: str) -> Stretch | None:
        return next((one for one in self.stretches if one.name == name), None)

    @property
    def lost_ns(self) -> int:
        """All that was not its own work, as far as it is known."""
        return sum(ns for one in self.stretches for part, ns in one.parts.items() if part != OWN)


def price(steps: Iterable[Step]) -> StepPrice | None:
    """A line through the steps, none of its terms below zero, stalls kept out of it; None for too few
    steps."""
    known = [s for s in steps if s.prefill_tokens is not None and s.decode_tokens is not None]
    known = [s for s in known if (s.prefill_tokens or s.decode_tokens) and s.duration_ns > 0]
    if len(known) < FEWEST_STEPS:
        return None
    terms = [[1.0, s.prefill_tokens or 0, _decoding(s), s.attention_work or 0] for s in known]
    work = np.array(terms, dtype=float)
    took = np.array([s.duration_ns for s in known], dtype=float)
    weight = np.ones(len(known))
    line = np.zeros(4)
    for _ in range(_ROUNDS):
        line = _line(work * weight[:, None], took * weight)
        away = np.abs(took - work @ line)
        spread = max(float(np.median(away)), 1.0)
        # Absolute deviations, relative to the length: a line through the middle of short and long steps.
        weight = 1.0 / np.sqrt(np.maximum(away, 0.1 * spread) * np.maximum(took, 1.0))
    return StepPrice(*(float(max(value, 0.0)) for value in line))


def _line(work: npt.NDArray[np.float64], took: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Least squares with no term below zero."""
    used = [column for column in range(work.shape[1]) if column == 0 or work[:, column].any()]
    line = np.zeros(work.shape[1])
    while used:
        found = np.linalg.lstsq(work[:, used], took, rcond=None)[0]
        below = [column for column, value in zip(used, found) if value < 0]
        if not below:
            line[used] = found
            break
        # The attention of prompts and their number of tokens are alike: the finer term goes first.
        used.remove(3 if 3 in used and below != [0] else below[-1])
    return line


def _decoding(step: Step) -> int:
    if step.decode_requests is not None:
        return step.decode_requests
    return step.decode_tokens or 0


def request_hash(text: str, key: bytes) -> int:
    """What stands for a request id in records that were made with this key."""
    digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, key=key).digest()
    return int.from_bytes(digest, "little") >> 1


class Teller:
    """Tells of the requests of one replica."""

    def __init__(self, steps: Sequence[Step], requests: Sequence[Request]) -> None:
        self.steps = sorted(steps, key=lambda step: step.start_ns)
        self.requests = requests
        self.price = price(steps)
        self._by_number = {step.step: step for step in self.steps}
        self._numbers = [step.step for step in self.steps]
        self._starts = [step.start_ns for step in self.steps]
        self._ends = np.maximum.accumulate([s.end_ns for s in self.steps]).tolist() if self.steps else []

    def tell(self, request: Request) -> Story:
        """Stretches without a known end are left out."""
        own = None
        if request.prompt_tokens is not None:
            own = max(request.prompt_tokens - (request.cached_tokens or 0), 0)
        story = Story(request, [], own)
        begun, first_end, last_end = self._edges(request)
        if request.arrival_ns is not None and request.queue_ns is not None:
            until = request.arrival_ns + request.queue_ns
            story.stretches.append(self._waiting(request, request.arrival_ns, until))
        if begun is not None and first_end is not None:
            story.stretches.append(self._stretch("prefill", request, begun, first_end, own))
        if first_end is not None and last_end is not None and last_end > first_end:
            story.stretches.append(self._stretch("decode", request, first_end, last_end, 0))
        if last_end is not None and request.arrival_ns is not None and request.e2e_ns is not None:
            output = max(request.arrival_ns + request.e2e_ns - last_end, 0)
            story.stretches.append(Stretch("output", output, {OWN: output}))
        story.largest_pause = self._pause(request)
        return story

    def _edges(self, request: Request) -> tuple[int | None, int | None, int | None]:
        """Start of its first step, end of that with its first token, end of its last."""
        begun = first_end = last_end = None
        if request.arrival_ns is not None and request.queue_ns is not None:
            begun = request.arrival_ns + request.queue_ns
            if request.prefill_ns is not None:
                first_end = begun + request.prefill_ns
        first = self._by_number.get(-1 if request.first_token_step is None else request.first_token_step)
        last = self._by_number.get(-1 if request.last_step is None else request.last_step)
        if first is not None:
            first_end = first.end_ns
        if last is not None:
            last_end = last.end_ns
        return begun, first_end, last_end

    # -- stretches -------------------------------------------------------------------------------

    def _within(self, start_ns: int, end_ns: int) -> list[Step]:
        first = bisect_right(self._ends, start_ns)
        return self.steps[first : bisect_left(self._starts, end_ns)]

    def _waiting(self, request: Request, start_ns: int, end_ns: int) -> Stretch:
        """In the queue all steps are others'."""
        found = self._fill("queue", start_ns, end_ns, own_tokens=0, takes_part=False)
        found.worst = self._worst(request, start_ns, end_ns)
        return found

    def _stretch(
        self, name: str, request: Request, start_ns: int, end_ns: int, own_tokens: int | None
    ) -> Stretch:
        found = self._fill(name, start_ns, end_ns, own_tokens or 0, takes_part=True)
        found.worst = self._worst(request, start_ns, end_ns)
        return found

    def _fill(self, name: str, start_ns: int, end_ns: int, own_tokens: int, takes_part: bool) -> Stretch:
        """Its parts, by the steps that overlap it. ``own_tokens`` of their prompt tokens are this request's:
        in steps with one prompt alone all are, the rest is spread over the others."""
        steps = self._within(start_ns, end_ns)
        parts: dict[str, float] = defaultdict(float)
        shares = _own_shares(steps, own_tokens)
        at = start_ns
        if not steps or self.steps[0].start_ns > start_ns:
            first = self.steps[0] if self.steps else None
            until = min(end_ns if first is None else first.start_ns - (first.gap_ns or 0), end_ns)
            if until > at and (first is None or first.start_ns > start_ns):
                parts[UNSEEN] += until - at
                at = until
        others = 0
        meanwhile: dict[str, float] = defaultdict(float)
        for step, own in zip(steps, shares):
            begun, ended = max(step.start_ns, at), min(step.end_ns, end_ns)
            if ended <= begun:
                continue
            if begun > at:
                parts[BETWEEN] += begun - at
            at = ended
            others += (step.prefill_tokens or 0) - own
            within = (ended - begun) / step.duration_ns
            for part, ns in self._divide(step, own, takes_part).items():
                parts[part] += ns * within
            for column in MEANWHILE:
                meanwhile[column] += (getattr(step, column) or 0) * within
        if end_ns > at:
            parts[BETWEEN] += end_ns - at
        told = {column: round(ns) for column, ns in meanwhile.items() if ns >= 0.5}
        found = _rounded(parts, end_ns - start_ns)
        return Stretch(name, end_ns - start_ns, found, len(steps), others, meanwhile=told)

    def _divide(self, step: Step, own_tokens: int, takes_part: bool) -> dict[str, float]:
        """A step's duration by cause."""
        took = float(step.duration_ns)
        line = self.price
        if line is None:
            return {UNSEEN: took}
        prompts = line.prefill_ns(step)
        own_prompt = prompts * own_tokens / step.prefill_tokens if step.prefill_tokens else 0.0
        others = prompts - own_prompt
        decodes = _decoding(step)
        if takes_part:
            alone = line.base_ns + own_prompt
            if not own_tokens and decodes:
                alone += line.decode_ns
                decodes -= 1
            found = {OWN: alone, OTHERS_PREFILL: others, MATES: line.decode_ns * decodes}
        else:
            # A request that takes no part does not need the step: its base is theirs whom it is for.
            prefill = (step.prefill_tokens or 0) > 0 and others >= line.decode_ns * decodes
            found = {OTHERS_PREFILL: others, MATES: line.decode_ns * decodes}
            found[OTHERS_PREFILL if prefill else MATES] += line.base_ns
        expected = sum(found.values())
        if expected >= took or expected <= 0:
            return {part: ns * took / expected for part, ns in found.items()} if expected else {STALL: took}
        return {**found, STALL: took - expected}

    def _worst(self, request: Request, start_ns: int, end_ns: int) -> Request | None:
        """Of the other requests the one with the longest prompt being computed in that time."""
        best, most = None, 0
        for other in self.requests:
            if other is request or other.first_step is None or other.first_token_step is None:
                continue
            first, last = self._by_number.get(other.first_step), self._by_number.get(other.first_token_step)
            if first is None or last is None or first.start_ns >= end_ns or last.end_ns <= start_ns:
                continue
            tokens = (other.prompt_tokens or 0) - (other.cached_tokens or 0)
            if tokens > most:
                best, most = other, tokens
        return best

    def _pause(self, request: Request) -> tuple[Step, Stretch] | None:
        step = self._by_number.get(-1 if request.slowest_step is None else request.slowest_step)
        if step is None or not request.max_itl_ns:
            return None
        start_ns = step.end_ns - request.max_itl_ns
        return step, self._stretch("pause", request, start_ns, step.end_ns, 0)


def _own_shares(steps: Sequence[Step], own_tokens: int) -> list[int]:
    """How many of each step's prompt tokens are the request's, adding up to ``own_tokens`` at most."""
    shares = [0] * len(steps)
    left = own_tokens
    for at, step in enumerate(steps):
        if step.prefill_requests == 1:
            shares[at] = min(step.prefill_tokens or 0, left)
            left -= shares[at]
    rest = [at for at, step in enumerate(steps) if (step.prefill_requests or 0) > 1]
    room = sum(steps[at].prefill_tokens or 0 for at in rest)
    for at in rest:
        tokens = steps[at].prefill_tokens or 0
        shares[at] = min(round(left * tokens / room), tokens) if room else 0
    return shares


def _rounded(parts: dict[str, float], whole: int) -> dict[str, int]:
    """Whole ns that add up to ``whole``; what rounding leaves goes to the largest."""
    found = {part: round(ns) for part, ns in parts.items() if ns >= 0.5}
    if found:
        found[max(found, key=found.__getitem__)] += whole - sum(found.values())
    return found
