"""The online detector: expectation, tests, incidents, and what may be learned when."""

from __future__ import annotations

from collections import deque
from math import exp, expm1, inf, log, log1p

from latencyprism.baseline import Expectation, StepTime, Work, work_of
from latencyprism.detect.cusum import ShiftTest
from latencyprism.detect.faster import Faster
from latencyprism.detect.firing import Firing
from latencyprism.detect.lost_time import LostTime
from latencyprism.detect.noise import LAG, Noise
from latencyprism.detect.settings import Settings
from latencyprism.detect.shown import Shown
from latencyprism.detect.tail import WILD
from latencyprism.records.step import Step

SCALES_EVERY, YOUNG_STEPS = 8, 200
"""The stream's scales move slowly: they are looked at this often, in a young stream always."""
TELLING_STEPS = 50
MEMORABLE = 50
"""Residuals kept for ``ack``."""
LOWER_RATE, LOWER_MOST, LOWER_CREEP = 0.06, 0.03, 0.015
HEAD_STEPS, HEAD_MOST, HEAD_MEMORY = 8, 0.013, 500
"""A workload that was not there for ``HEAD_MEMORY`` steps shows within ``HEAD_STEPS`` how far the model is
off for it; so much (log) of that is no news, as a fault hardly ever begins with a change of the workload."""
SHOWN_WORTH = 0.004
"""Allowances that are worth narrowing."""
WIDEN_TOLD = 1.3
BREAK_NS = 10_000_000_000
"""A longer hole is a break in the record or a silence, which is told by another alert."""
IDLE_NS = 1_000_000_000
"""After so long without a step, engine and device have to wake up: caches are cold, clocks are low."""


class Detector:
    """One replica's stream, step by step. ``last``: the expectation of the step just observed (None if it
    could not be judged). Not thread-safe."""

    __slots__ = ("_below", "_bucket", "_calm", "_clock_ms", "_ended_ns", "_evidence", "_excuse", "_faster",
                 "_gap", "_head", "_head_steps", "_head_sum", "_held", "_kind", "_lost_time", "_page",
                 "_page_held_ms", "_recent", "_seen", "_shown", "_stalled", "_typical_ms", "incident",
                 "incident_open", "last", "model", "moved", "noise", "page_from", "paging", "settings",
                 "steps")  # fmt: skip

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self.model = StepTime()
        self.noise = Noise()
        self.last: Expectation | None = None
        self.steps = 0
        self.incident = 0
        self.incident_open = False
        self.paging = False
        self.page_from = self.settings.warm_steps
        """No page before this step."""
        self.moved = 0.0
        """Log of all rebases and acknowledgements together."""
        self._evidence = ShiftTest(self.settings.evidence)
        self._page = ShiftTest(self.settings.page)
        self._held: deque[tuple[Work, float]] = deque()
        self._recent: deque[float] = deque(maxlen=MEMORABLE)
        self._calm = 0
        self._stalled = False
        self._clock_ms = self._page_held_ms = 0.0
        self._lost_time = LostTime()
        self._tune()
        self._typical_ms = 0.0
        self._gap = 0.0
        self._faster = Faster()
        self._bucket = self._kind = -1
        self._below = self._excuse = 0.0
        self._ended_ns = 0
        self._seen: dict[int, int] = {}
        self._shown = Shown()
        self._head = self._head_sum = 0.0
        self._head_steps = 0

    def observe(self, step: Step, excuse: float = 0.0) -> Firing | None:
        """Judge a step, then learn from it. Returns a firing if a test is above its limit at this step.
        ``excuse``: how late (log) our own deep probes may have made it: no news, and not learned."""
        start_ns, end_ns = step.start_ns, step.end_ns
        observed = (end_ns - start_ns) / 1e6
        hole_ns = start_ns - self._ended_ns
        self._ended_ns = end_ns
        work = work_of(step) if observed > 0.0 else None
        if work is None:
            self.last = None
            return None
        self.steps += 1
        found = self.last = self.model.expect_work(work)
        if found is None:
            self._kind = -1
            self.model.learn(work, observed)
            return None
        noise = self.noise
        residual = log(observed / found.ms)
        offset = noise.prompt_offset() if work.prefill else noise.offset()
        # Only one that decodes in this step was alive before it; no batch: nothing tells who waited.
        idle = self._idle_ms(step.gap_ns) if work.decode and work.batch > 0.0 else 0.0
        waking = not idle and hole_ns > IDLE_NS
        stretch = (log((observed + idle) / found.ms) if idle else residual) - offset
        self._excuse = excuse
        if excuse:
            residual = residual - excuse if residual > excuse else min(residual, 0.0)
            stretch = stretch - excuse if stretch > excuse else min(stretch, 0.0)
        if offset:
            found.drift = offset
            found.ms *= exp(offset)
        if waking:
            # What changed meanwhile is another workload, not drift.
            noise.ring = [None] * LAG
        kind = work.context_key + work.tokens_key * 65536 if work.prefill else work.context_key
        if kind != self._kind or self._head_steps < HEAD_STEPS or waking:
            self._look_up(kind, residual, waking)
        self._seen[kind] = self.steps
        firing = self._judge(step.step, observed, work, found, residual, stretch, waking)
        if not excuse:
            self._learn(work, observed, found, residual, stretch, firing)
        return firing

    def _idle_ms(self, gap_ns: int | None) -> float:
        """Engine idle before the step beyond its custom, where requests were waiting for it: one that
        decodes in this step was alive before it, a new one may have arrived just now."""
        if gap_ns is None or not 0 <= gap_ns < BREAK_NS:
            return 0.0
        gap = gap_ns / 1e6
        usual = self._gap
        top = 4.0 * usual + 0.05
        self._gap = usual + ((gap if gap < top else top) - usual) * 0.02
        return gap - usual if gap > usual else 0.0

    def _judge(
        self, number: int, observed: float, work: Work, found: Expectation, residual: float, stretch: float,
        waking: bool,
    ) -> Firing | None:  # fmt: skip
        allowance, expected, ragged = found.allowance, found.ms, 0.0
        if work.prefill:
            ragged = 2.0 * (self.noise.prefill - self.noise.d_near)
            if ragged > 0.0:
                allowance += ragged
            else:
                ragged = 0.0
        else:
            if allowance > SHOWN_WORTH:
                allowance = self._shown.narrow(work.context_key, allowance)
            self._typical_ms += (expected - self._typical_ms) * (0.01 if self._typical_ms else 1.0)
        stall = stall_page = False
        if stretch - allowance > self.settings.evidence.stall_floor:
            stall, stall_page = self._stall(stretch - allowance, stretch, ragged, found, work)
        if self.steps % SCALES_EVERY == 0 or self.steps < YOUNG_STEPS:
            self._tune()
        bare = residual - allowance - self._lower_level(work.batch_key, residual)
        fast = bare - self._head
        if waking:
            stall = stall_page
        if waking or (stall and not self._stalled):
            # A lone stall is told as such; only its followers say that the level has moved.
            fast = bare = 0.0
        self._stalled = stall
        clock = self._clock_ms
        self._clock_ms = clock + observed
        shift = self._evidence.feed(fast, number, clock)
        # The slack of a page is far above what a workload may show from its first steps on.
        shift_page = self._page.feed(bare, number, clock)
        lost = self._lost_time.feed(observed, expected * exp(allowance + self._excuse), number)
        if shift_page or shift or stall or lost:
            return self._tell(number, observed, found, stretch, (shift, stall, stall_page, shift_page, lost))
        self._page_held_ms = 0.0
        if self.incident_open and not self._excuse:
            self._settle()
        return None

    def _stall(
        self, over: float, stretch: float, ragged: float, found: Expectation, work: Work
    ) -> tuple[bool, bool]:
        """Is a step, late by ``over`` beyond its allowance, a stall, and one that pages? ``ragged``: the part
        of the allowance that is for prompts' times being ragged."""
        settings, noise, expected = self.settings, self.noise, found.ms
        evidence, page = settings.evidence, settings.page
        limit = self._for_length(noise.tail.limit(evidence.stall_rarity), expected, work)
        if over <= (evidence.stall_floor if evidence.stall_floor > limit else limit):
            # How long a stutter is does not depend on what our own probes cost, nor on what is usual.
            limit = settings.stutter_limit(expected)
            if over + ragged + self._excuse <= (
                evidence.stall_floor if evidence.stall_floor > limit else limit
            ):
                return False, False
        if not work.prefill:
            self._typical_ms += (expected - self._typical_ms) * 0.01
        limit = self._for_length(noise.far_tail.limit(page.stall_rarity), expected, work)
        # Drift is learned on steps that only decode. That these have become faster promises little of a
        # prompt's time: to page, such a step must be late by the expectation before drift, too.
        head = found.drift if work.prefill and found.drift < 0.0 else 0.0
        if over + head <= (page.stall_floor if page.stall_floor > limit else limit):
            return True, False
        return True, expected * (exp(stretch) - exp(-head)) >= settings.page_stall_ms

    def _tune(self) -> None:
        noise, settings = self.noise, self.settings
        wander, variance, wide = noise.wander, noise.long_run_variance(), 3.0 * noise.far
        clip, slow_clip = max(settings.fast_clip, wide), max(settings.slow_clip, wide)
        for test in (self._evidence, self._page):
            test.tune(wander, variance, clip, slow_clip, settings.cap)

    def _tell(
        self, number: int, observed: float, found: Expectation, stretch: float,
        fired: tuple[bool, bool, bool, bool, bool],
    ) -> Firing | None:  # fmt: skip
        """What the tests amount to; ``fired``: shift, stall, stall page, shift page, lost time."""
        settings = self.settings
        shift, stall, stall_page, shift_page, lost = fired
        self._page_held_ms = self._page_held_ms + observed if shift_page else 0.0
        lasted_ms = self._clock_ms - self._page.since
        if shift_page and (lasted_ms < self._dwell_ms() or self._page_held_ms < settings.page_hold_ms):
            # A page is evidence too, and is told as such until it has lasted.
            shift, shift_page = True, False
            self._evidence.onset = self._page.onset
        if self.steps < self.page_from:
            stall_page = shift_page = lost = False
        if not (shift or stall or shift_page or lost):
            return None
        if stretch <= 0.0 and not self.paging and (shift_page or lost):
            # Nobody is called at a step that is fast itself; if it is not over, the next one tells.
            self._evidence.onset = self._page.onset if shift_page else self._lost_time.onset
            shift, shift_page, lost = True, False, False
        paged = stall_page or shift_page or lost
        if shift_page:
            kind, onset = "shift", self._page.onset
        elif lost:
            kind, onset = "shift", self._lost_time.onset
        elif shift and not stall_page:
            kind, onset = "shift", self._evidence.onset
        else:
            kind, onset = "stall", number
        late_ms = found.ms * expm1(stretch)
        return self._fire(number, paged, kind, onset, observed, found, late_ms)

    def _dwell_ms(self) -> float:
        settings = self.settings
        drift = self._page.by_drift / settings.page.fast_slack
        return settings.page_dwell_ms * min(max(drift, 1.0), settings.page_dwell_most)

    def _for_length(self, limit: float, expected_ms: float, work: Work) -> float:
        """The tail's limit for a step of this length. What makes a lone step slow (a preemption, a fault)
        costs milliseconds, not percents: tails learned on short steps are too lenient for long ones."""
        if expected_ms <= self._typical_ms or not self._typical_ms:
            return limit
        by_length = log1p(self._typical_ms * expm1(limit) / expected_ms)
        by_noise = 4.0 * self.noise.prefill if work.prefill else limit
        return min(limit, by_length if by_length > by_noise else by_noise)

    def _lower_level(self, batch_key: int, residual: float) -> float:
        """How much faster than expected the present batch size runs, as a log offset in [-LOWER_MOST, 0]:
        a mild fault must not hide in the head start that this workload has. Downwards only, because an
        upward one could be the fault."""
        below = self._below
        if batch_key != self._bucket:
            self._bucket, below = batch_key, 0.0
        else:
            ahead = residual - below
            if ahead > LOWER_CREEP:
                ahead = LOWER_CREEP
            elif ahead < -LOWER_CREEP:
                ahead = -LOWER_CREEP
            below += LOWER_RATE * ahead
            below = 0.0 if below > 0.0 else below if below > -LOWER_MOST else -LOWER_MOST
        self._below = below
        return below

    def _look_up(self, kind: int, residual: float, waking: bool) -> None:
        """``_head``: part of the residual that a workload has had from its first steps on."""
        self._kind = kind
        seen = self._seen
        if waking or seen.get(kind, -HEAD_MEMORY) < self.steps - HEAD_MEMORY:
            self._head = self._head_sum = 0.0
            self._head_steps = 0
            if len(seen) >= 500:
                seen.clear()
        count = self._head_steps
        if count < HEAD_STEPS and not waking:
            self._head_steps = count = count + 1
            self._head_sum += residual
            if count > 3:
                head = self._head_sum / count
                self._head = 0.0 if head < 0.0 else head if head < HEAD_MOST else HEAD_MOST

    def _fire(
        self,
        number: int,
        paged: bool,
        kind: str,
        onset: int,
        observed: float,
        found: Expectation,
        late_ms: float,
    ) -> Firing:
        opened = not self.incident_open
        if opened:
            self.incident += 1
            self.incident_open = True
        escalated = paged and not self.paging
        self.paging = self.paging or paged
        self._calm = 0
        expected = found.ms
        terms = found.terms
        return Firing(
            number, "page" if paged else "evidence", kind, onset, observed, expected,
            observed / expected - 1.0, self.incident, opened, escalated, terms, late_ms, self.detectable(),
        )  # fmt: skip

    @property
    def tension(self) -> float:
        """How near the next news of a shift is, as a share of the way; 0: none is to come."""
        page = 0.0 if self.paging else self._page.tension
        return page if self.incident_open else max(self._evidence.tension, page)

    @property
    def poised(self) -> bool:
        """A page needs nothing but that what is told as evidence goes on."""
        return not self.paging and (self._page.room <= 0.0 or self._lost_time.near)

    @property
    def room(self) -> tuple[float, float]:
        """How late (log) a step must be to bring the next news of a shift nearer, and how much lateness
        beyond that (ms, together) may come at least before there is any."""
        tests = [] if self.paging else [self._page]
        if not self.incident_open:
            tests.append(self._evidence)
        tests = [test for test in tests if test.room > 0.0]
        if self.last is None or not tests:
            return 0.0, inf
        return min(test.slack for test in tests), min(test.room for test in tests) * self.last.ms

    def stall_limit(self) -> float:
        """How late (log) a typical step may be that is not told as a stall."""
        settings, level = self.settings, self.settings.evidence
        stutter = settings.stutter_limit(max(self._typical_ms, 1e-3))
        return max(level.stall_floor, min(self.noise.tail.limit(level.stall_rarity), stutter))

    def detectable(self) -> dict[str, float]:
        """By level, the slow-down (share) that is told when it lasts for ``TELLING_STEPS``, at the stream's
        present noise and for work that it knows."""
        wander, variance = self.noise.wander, self.noise.long_run_variance()
        return {
            name: round(expm1(test.detectable(wander, variance, TELLING_STEPS)), 4)
            for name, test in (("evidence", self._evidence), ("page", self._page))
        }

    def _settle(self) -> None:
        if self.incident_open:
            self._calm += 1
            if self._calm >= self.settings.calm_steps:
                self.incident_open = self.paging = False

    def _learn(
        self,
        work: Work,
        observed: float,
        found: Expectation,
        residual: float,
        stretch: float,
        firing: Firing | None,
    ) -> None:
        noise, settings = self.noise, self.settings
        calm = not self.paging
        self._recent.append(residual)
        if work.prefill:
            noise.take_prompt(residual, calm)
        elif found.known:
            if firing is None:
                if found.allowance > SHOWN_WORTH:
                    self._shown.take(work.context_key, residual)
                noise.take(residual, stretch, calm, WILD, WILD)
            else:
                noise.take(residual, stretch, calm, WIDEN_TOLD, 1.0 if firing.level == "page" else WILD)
        trusted = True
        if firing is not None or self.incident_open:
            # On a restless machine evidence is mostly drift, and drift has to be learned.
            restless = settings.evidence.slack_drift * noise.wander > settings.page.fast_slack
            trusted = calm if restless else not self.incident_open
            if firing is not None and not (restless and calm):
                self._held.clear()
                self._faster = Faster()
                return
        if not found.known or self.steps < 3 * settings.quarantine:
            self.model.learn(work, observed, noise.far)
        elif trusted:
            held = self._held
            held.append((work, observed))
            if len(held) > settings.quarantine:
                old, value = held.popleft()
                self.model.learn(old, value, noise.far)
            if residual <= -settings.rebase_floor or self._faster.count:
                self._rebase(work, residual)

    def _rebase(self, work: Work, residual: float) -> None:
        """Downwards only: a lasting speed-up is the new normal, a lasting slow-down is a fault until somebody
        acknowledges it."""
        settings = self.settings
        wide = 2.0 * self.noise.far
        faster = self._faster
        if residual > -(settings.rebase_floor if settings.rebase_floor > wide else wide):
            faster.ease()
        elif not work.prefill and faster.take(work.batch_key, residual) >= settings.rebase_steps:
            everywhere, by_batch = faster.verdict()
            if everywhere is not None:
                self._move(everywhere)
            else:
                for key, shift in by_batch.items():
                    self.model.rescale_batch(key, exp(shift))
            self._faster = Faster()

    def ack(self) -> float:
        """Take the present level as normal (a new version, a known slow-down): the expectation moves to
        the median of the last steps and the incident ends. Returns the log-ratio by which it moved."""
        shift = 0.0
        if self._recent:
            recent = sorted(self._recent)
            shift = recent[len(recent) // 2]
            self._move(shift)
        self.incident_open = self.paging = False
        return shift

    def _move(self, shift: float) -> None:
        self.model.rescale(exp(shift))
        self.moved += shift
        self.noise.clear_ring()
        self._shown = Shown()
        self._held.clear()
        self._recent.clear()
        self._evidence.reset()
        self._page.reset()
        self._lost_time = LostTime()
        self._faster = Faster()
