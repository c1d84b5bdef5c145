"""How many tokens a step may have so that prompts do not starve the answers under way."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from math import ceil, exp, log
from typing import NamedTuple

from latencyprism.records.step import Step
from latencyprism.slo.pace import Pace

AIM = 0.65
"""A step shall take this part of the TPOT limit: the rest is for those that are slower than expected."""
LEAST_SHARE, LEAST_CHUNK = 1 / 32, 16
SLOWEST_PROMPTS = 0.35
"""Prompts keep at least this part of the tokens a second that whole chunks would give them."""
WORTH = 0.95
"""A knob is not touched for less: steps must be expected to take at most this part of what they take now."""
CHANGE, LOWER_NS, RAISE_NS = 0.25, 1_000_000_000, 20_000_000_000
"""Long prompts come in bursts: a limit that is raised between two of them meets the second too high."""
CALM_NS = 60_000_000_000
GRAIN = 8
LATE_STEPS, LATE_MOST = 20.0, 0.7
"""Steps within a limit are compared with what was estimated for them: a mean over so many (log), at most so
far off. Small chunks are seldom seen before the guard makes them, and cost more than large ones promise."""


class Estimate(NamedTuple):
    """What a chunk of so many prompt tokens is expected to do, against whole chunks."""

    chunk: int
    step_ms: float
    step_ms_before: float
    prompt_tokens_per_s: float
    prompt_tokens_per_s_before: float


@dataclass
class Shaper:
    """``decide`` gives the limit of tokens a step, None: none is needed. Calm in both directions: a change of
    less than ``CHANGE`` is not made, none sooner than ``LOWER_NS`` or ``RAISE_NS`` after the last, none
    upwards beyond the lowest that was wanted within ``RAISE_NS``, and a limit is lifted only after it was not
    needed for ``CALM_NS``."""

    tpot_limit_s: float
    tokens: int | None = None
    estimate: Estimate | None = None
    changes: int = 0
    late: float = 0.0
    """How much longer (log) steps with chunks of this limit have taken than estimated, lately."""
    _changed_ns: int = 0
    _needed_ns: int = 0
    _wished: deque[tuple[int, int]] = field(default_factory=deque)
    """When and what was wanted within ``RAISE_NS``."""

    def saw(self, pace: Pace, step: Step) -> None:
        """Each step, after ``pace`` has taken it."""
        prefill, decode = step.prefill_tokens or 0, step.decode_tokens or 0
        if self.tokens is None or not prefill or not decode or prefill + decode > self.tokens:
            return
        found = pace.step_s(decode, prefill, (step.attention_work or 0) / prefill)
        if found and step.duration_ns > 0:
            off = log(step.duration_ns / 1e9 / found)
            self.late += (max(-LATE_MOST, min(off, LATE_MOST)) - self.late) / LATE_STEPS

    def decide(self, pace: Pace, prompts: int, reach: float, whole: int, now_ns: int) -> int | None:
        """``prompts``: tokens of prompts that wait or are under way, ``reach``: mean context that they attend
        to; ``whole``: what the engine allows itself a step."""
        wanted = self._wanted(pace, prompts, reach, whole)
        if wanted is not None:
            self._needed_ns = now_ns
            wanted = self._steady(wanted, now_ns)
        since_ns = now_ns - self._changed_ns
        if self.tokens is None:
            if wanted is not None and since_ns >= LOWER_NS:
                self._set(wanted, now_ns)
        elif wanted is None:
            if now_ns - self._needed_ns >= CALM_NS:
                self._set(None, now_ns)
        elif abs(wanted - self.tokens) >= CHANGE * self.tokens and (
            since_ns >= (LOWER_NS if wanted < self.tokens else RAISE_NS)
        ):
            self._set(wanted, now_ns)
        return self.tokens

    def _steady(self, wanted: int, now_ns: int) -> int:
        """Down at once; up only as far as has been wanted all the while: what prompts and answers ask for
        changes by the second, and a limit that followed each change would swing."""
        wished = self._wished
        wished.append((now_ns, wanted))
        while wished[0][0] <= now_ns - RAISE_NS:
            wished.popleft()
        if self.tokens is None or wanted <= self.tokens:
            return wanted
        return max(self.tokens, min(tokens for _, tokens in wished))

    def _set(self, tokens: int | None, now_ns: int) -> None:
        self.tokens, self._changed_ns = tokens, now_ns
        self.changes += 1

    @property
    def _aim_s(self) -> float:
        return AIM * self.tpot_limit_s

    @property
    def _slower(self) -> float:
        return exp(max(self.late, 0.0))

    def _wanted(self, pace: Pace, prompts: int, reach: float, whole: int) -> int | None:
        last = pace.last
        now = (last.decode_tokens or 0) if last is not None else 0
        # Answers that come now and then are not to be met by a step that was begun without them.
        decodes = max(now, ceil(pace.decodes - 0.1))
        if decodes <= 0 or prompts <= 0:
            return None
        full = max(min(whole - decodes, prompts), 1)
        before_s = pace.step_s(decodes, full, reach)
        if before_s is None or before_s <= self._aim_s:
            return None
        least = max(LEAST_CHUNK, int(whole * LEAST_SHARE))
        chunk = self._largest(pace, decodes, least, full, reach)
        rate_before = full / before_s
        while chunk < full:
            after_s = (pace.step_s(decodes, chunk, reach) or before_s) * self._slower
            if after_s > WORTH * before_s:
                return None
            if chunk / after_s >= SLOWEST_PROMPTS * rate_before:
                self.estimate = Estimate(chunk, after_s * 1e3, before_s * 1e3, chunk / after_s, rate_before)
                return decodes + chunk
            chunk = min(full, max(chunk + GRAIN, int(chunk * 1.25)))
        return None

    def _largest(self, pace: Pace, decodes: int, least: int, full: int, reach: float) -> int:
        """Largest chunk whose step is expected to be short enough; ``least`` where none is."""
        low, high = least, full
        if low >= high:
            return full
        while high - low > GRAIN:
            middle = (low + high) // 2
            found = pace.step_s(decodes, middle, reach)
            if found is not None and found <= self._aim_s / self._slower:
                low = middle
            else:
                high = middle
        return low
