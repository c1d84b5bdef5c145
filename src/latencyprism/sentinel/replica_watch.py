"""One replica under watch: poll its source, judge each step, raise alerts, keep the flight record."""

from __future__ import annotations

import secrets
import time
from collections import deque
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import islice
from math import exp
from typing import Any

from latencyprism.detect import Detector, Firing
from latencyprism.detect.straggler import Straggler
from latencyprism.detect.wording import sentence, work_in_words
from latencyprism.errors import PrismError
from latencyprism.host.sampler import HostSampler
from latencyprism.recorder.flight import FlightRecorder
from latencyprism.records import Alert, Step, Usual, Window
from latencyprism.sentinel.below_watch import BelowWatch
from latencyprism.sentinel.cost import Cost
from latencyprism.sentinel.flight_tape import FlightTape
from latencyprism.sentinel.habit import NEVER, Habit
from latencyprism.sentinel.kernel_dive import KernelDives
from latencyprism.sentinel.machine_share import STEPS, MachineShare, machine_share
from latencyprism.sentinel.operator_dive import OperatorDives
from latencyprism.sentinel.rank_watch import RUN, Blame, RankWatch
from latencyprism.sentinel.targets import Attachment
from latencyprism.sentinel.where import PhaseShares, phase_names
from latencyprism.xpu.sampler import DeviceSampler

SILENCE_MIN_S = 2.0
SILENCE_FACTOR = 20.0
LONG_STALL_MS, LONG_STALL_EXCESS = 25.0, 1.0
STALL_QUIET_NS = 500_000_000
_NO_OPERATORS = frozenset({"llama.cpp"})
"""Engines without PyTorch."""
NAP_S, VAGUE_NAP_S, WARY_NAP_S, SHORT_NAP_S = 0.2, 0.1, 0.014, 0.012
TENSE = 0.5
"""From here on the way to a shift's alert one is wary."""
CAUTION = 0.7
"""Part of what would be an alert for which one wants to be woken: the probe's expectation is a rough one."""
MOST_ROOM_MS = 1e9
HELD_NS = 500_000_000
"""Steps are handed on a few at a time: what was seen below them is joined to many as cheaply as to one."""


OPERATORS_EXCUSE, DEEP_EXCUSE = 0.14, 0.03
"""How late (log) steps may be for our own deep probes, with operators and without: `bench deepdive`."""
KERNELS_EXCUSE = 50.0
"""Beside a profiler that is started and stopped nothing is told of how long steps take."""


@dataclass
class Counts:
    """What happened since attach."""

    steps: int = 0
    evidence: int = 0
    page: int = 0
    firings: int = 0


class ReplicaWatch:
    """``look`` and ``hand_on`` are called whenever there may be something new, and every ``nap_s`` at least;
    ``poll`` is both. ``prompt``: with short naps only, and what was seen is handed on at once."""

    kernels: KernelDives | None = None

    def __init__(self, attachment: Attachment, *, horizon_s: float = 60.0, realtime: bool = True) -> None:
        self.attachment = attachment
        self.replica = attachment.replica
        self.detector = Detector()
        self.recorder = FlightRecorder(horizon_s=horizon_s)
        self.counts = Counts()
        self.roles = {pid: role for pid, role in self.replica.roles().items() if role != "API server"}
        self.host = HostSampler(self.replica.roles())
        self.devices = DeviceSampler(self.roles)
        self.expected: deque[tuple[int, float]] = deque(maxlen=20_000)
        self.last_step: Step | None = None
        self.onset_ns = 0
        self._shares = PhaseShares()
        self._phase_names = phase_names(self.replica.engine, self.roles)
        self._ranks = RankWatch.of(self.replica)
        self._alerted: tuple[int, str] | None = None
        self._alerted_ns = 0
        self._alerted_ms = 0.0
        self._starts: deque[tuple[int, int, int]] = deque(maxlen=20_000)
        """Number, start and end of each step."""
        self._silent = False
        self.prompt = False
        self._habit = Habit()
        self._told: Usual | None = None
        self._adds_up = False
        """The source wakes us, too, when steps have lost time together."""
        self._held = Window()
        self._raised: list[Alert] = []
        self.handed_ns = self.wanted_ns = 0
        """When what was seen was last handed on, and when somebody wants it to be (CLOCK_MONOTONIC)."""
        self._dives: deque[tuple[int, int]] = deque(maxlen=4)
        self.below: BelowWatch | None = None
        self.below_missing: str | None = None
        try:
            self.below = BelowWatch(self.replica.roles())
        except PrismError as error:
            self.below_missing = f"scheduler events: {error.why or error.what}"
        self.cost = Cost(attachment.source, self.below)
        self.tape = FlightTape(self)
        self.operators: OperatorDives | None = None
        if self.replica.engine not in _NO_OPERATORS:
            self.operators = OperatorDives(self.roles, realtime=realtime)

    # -- seeing ----------------------------------------------------------------------------------

    def look(self) -> list[tuple[Alert, int]]:
        """Judges what came in since the last call: the alerts it gave rise to (``delay_ms`` not yet set),
        each with the end of its step, CLOCK_MONOTONIC ns."""
        window, held = self.attachment.source.poll(), self._held
        raised = []
        stragglers = self._ranks.see(window.spans) if self._ranks is not None else ()
        for step in window.steps:
            alert = self._judge(step)
            if alert is not None:
                raised.append((alert, step.end_ns))
        for straggler in stragglers:
            if self._ranks is not None and self.last_step is not None:
                alert = self._straggles(self.last_step, straggler, self._ranks.told(straggler))
                raised.append((alert, self.last_step.end_ns))
        self._raised += [alert for alert, _ in raised]
        held.steps += window.steps
        held.spans += window.spans
        held.counters += window.counters
        held.requests += window.requests
        return raised

    def hand_on(self, now_ns: int | None = None) -> tuple[Window, list[Alert]]:
        """What ``look`` has seen since the last hand-over, with what was seen below it, now in the recorder;
        and the alerts in it. Empty where ``now_ns`` is too early for the next and nobody wants it."""
        if now_ns is not None and not self.prompt and not self._raised:
            wanted = self.handed_ns < self.wanted_ns <= now_ns
            if now_ns - self.handed_ns < HELD_NS and not wanted:
                return Window(), []
        window, alerts = self._held, self._raised
        self._held, self._raised = Window(), []
        self.handed_ns = time.monotonic_ns() if now_ns is None else now_ns
        if self.below is not None and window.steps:
            threads = getattr(self.attachment.source, "step_threads", ())
            window.steps[:] = self.below.fill(window.steps, threads)
        self.recorder.add(window, self._latest_expected(len(window.steps)))
        return window, alerts

    def _latest_expected(self, count: int) -> dict[int, float]:
        """Of the ``count`` steps judged last, by step."""
        latest = self.expected
        return dict(latest[place] for place in range(max(0, len(latest) - count), len(latest)))

    def poll(self) -> tuple[Window, list[Alert]]:
        """What came in since the last call, and the alerts it gave rise to."""
        self.look()
        return self.hand_on()

    def sample_host(self, now_ns: int) -> None:
        self._habit.look(now_ns, CAUTION * self.detector.stall_limit() if self._adds_up else 0.0)
        for counter in self.host.sample(now_ns):
            self.recorder.add_counter(counter)
            if self._ranks is not None and counter.name == "runqueue_ns":
                self._ranks.count(counter)
        for counter in (*self.devices.drain(), *self.cost.counters(now_ns)):
            self.recorder.add_counter(counter)
        if self.below is not None:
            self.below.tick(now_ns)
        self.tape.refresh(now_ns)

    @property
    def nap_s(self) -> float:
        """So long steps as usual may wait."""
        if self.prompt:
            return SHORT_NAP_S
        if self._adds_up:
            if self.detector.poised:
                return SHORT_NAP_S
            # What it adds up goes by what steps of so many tokens take; how near an alert is goes by all that
            # is known of each. So the last part of the way is looked at closely: some 2 % of steps.
            return WARY_NAP_S if self.detector.tension > TENSE else NAP_S
        if self.detector.incident_open:
            # After a page there is nothing more urgent to tell than a long stall, and that wakes us.
            return VAGUE_NAP_S if self.detector.paging else SHORT_NAP_S
        if self._habit.wary or self.detector.tension > TENSE:
            return WARY_NAP_S
        return VAGUE_NAP_S if self._habit.vague else NAP_S

    def settle(self) -> bool:
        """True if nothing is waiting to be polled and the source will wake us where it must."""
        source = self.attachment.source
        usual = self._habit.usual or NEVER
        if usual is not self._told:
            self._told = usual
            source.wake_beyond(usual)
        typical_1024, spare_ns = self._news(usual)
        self._adds_up = source.wake_late(typical_1024, spare_ns) and usual is not NEVER
        return source.settle()

    def _news(self, usual: Usual) -> tuple[int, int]:
        """From which duration on, in 1024ths of what is long, steps bring the next alert nearer, and how much
        beyond that, ns together, may be it; 0: nobody can tell."""
        slack, room_ms = self.detector.room
        if self.detector.incident_open:  # it has news of its own, by what was expected: see _is_news
            room_ms = min(room_ms, LONG_STALL_MS)
        if usual is NEVER or room_ms > MOST_ROOM_MS:
            return 1024, 0
        return int(self._habit.expected_1024 * exp(slack)), int(CAUTION * room_ms * 1e6)

    # -- judging ---------------------------------------------------------------------------------

    def diving(self, begin_ns: int, end_ns: int) -> None:
        """Deep probes are armed between these times (CLOCK_MONOTONIC): an alert of the slow-down that they
        make would be ours."""
        self._dives.append((begin_ns, end_ns))

    def record_kernels(self) -> None:
        """From now on captures may hold kernels of devices."""
        self.kernels = KernelDives(self.roles, lambda: self._habit.step_ns)

    def _excuse(self, step: Step) -> float:
        if self.kernels is not None and self.kernels.touch(step.start_ns, step.end_ns):
            return KERNELS_EXCUSE
        while self._dives and self._dives[0][1] <= step.start_ns:
            self._dives.popleft()
        if not self._dives or step.end_ns <= self._dives[0][0]:
            return 0.0
        return DEEP_EXCUSE if self.operators is None else OPERATORS_EXCUSE

    def _judge(self, step: Step) -> Alert | None:
        self.last_step = step
        self._silent = False
        self.counts.steps += 1
        self._starts.append((step.step, step.start_ns, step.end_ns))
        self._habit.take(step)
        excused = bool(self._dives) or self.kernels is not None
        firing = self.detector.observe(step, self._excuse(step) if excused else 0.0)
        expected = self.detector.last
        if expected is not None:
            self.expected.append((step.step, expected.ms))
            self._habit.expect(step, expected.ms)
        group = self._ranks.of_step(step) if self._ranks is not None else None
        if firing is None:
            self._shares.learn(step)
            if self._ranks is not None and group is not None and expected is not None and not self._dives:
                self._ranks.learn(step, group, expected.ms)
            return None
        self.counts.firings += 1
        key = (firing.incident, firing.level)
        if not self._is_news(step, firing):
            return None
        self._alerted = key
        self._alerted_ns = step.end_ns
        self._alerted_ms = firing.observed_ms - firing.expected_ms
        self._habit.alerted(step)
        if firing.level == "page":
            self.counts.page += 1
        else:
            self.counts.evidence += 1
        begun = (start for number, start, _ in reversed(self._starts) if number <= firing.onset_step)
        self.onset_ns = next(begun, step.start_ns)
        blame = None
        if self._ranks is not None and group is not None:
            blame = self._ranks.blame(step, group, firing.expected_ms)
        return self._alert(step, firing, blame)

    def onset_of(self, alert: Alert) -> int:
        """Where what it tells of began (CLOCK_MONOTONIC ns); ``alert``: the latest. Objectives are missed
        without steps having slowed, too: then it is now."""
        if alert.kind == "slo" and not self.detector.incident_open and self.last_step is not None:
            return self.last_step.end_ns
        return self.onset_ns

    def _is_news(self, step: Step, firing: Firing) -> bool:
        """One alert an incident, a second one if it rises from evidence to page, and one for each long stall
        in it: half a second after the last, or at once where twice as much was lost."""
        if self._alerted is None or self._alerted[0] != firing.incident:
            return True
        if self._alerted[1] == "evidence" and firing.level == "page":
            return True
        lost_ms = firing.observed_ms - firing.expected_ms
        if lost_ms < LONG_STALL_MS or firing.excess < LONG_STALL_EXCESS:
            return False
        return lost_ms >= 2.0 * self._alerted_ms or step.end_ns - self._alerted_ns >= STALL_QUIET_NS

    def _machine_share(self, step: Step, firing: Firing) -> MachineShare | None:
        """What of a late step the machine made itself, since the onset."""
        machine, excess_ms = self.host.machine, max(firing.late_ms, firing.observed_ms - firing.expected_ms)
        read = (time_ns for time_ns, _ in reversed(machine.history) if time_ns <= self.onset_ns)
        since_ns = next(read, self.onset_ns)
        expected = dict(islice(reversed(self.expected), STEPS))
        late = []
        for number, start_ns, end_ns in islice(reversed(self._starts), STEPS):
            if end_ns <= since_ns:
                break
            if number in expected:
                late.append(((end_ns - start_ns) / 1e6, expected[number]))
        return machine_share(machine, self.roles, self.onset_ns, excess_ms, late, firing.observed_ms)

    def _alert(self, step: Step, firing: Firing, blame: Blame | None) -> Alert:
        where, text, rank = self._shares.locate(step, firing.expected_ms, self._phase_names), "", step.rank
        if firing.kind == "stall" and (step.gap_ns or 0) > step.duration_ns:
            where = "between steps"
        elif blame is not None and (where is None or where.endswith(RUN)):
            where, text = blame.where, f"; {blame.text}"
            rank = step.rank if blame.rank is None else blame.rank
        elif self._ranks is not None and where is not None and where.endswith(RUN):
            where = f"workers: {RUN}"  # which of them is not told
        machine = self._machine_share(step, firing)
        if machine is not None:
            text = f"; {machine.text()}{text}"
        return alert_about(
            step, firing.kind, firing.level, step.end_ns, firing.observed_ms, firing.expected_ms,
            where=where, text=sentence(step, firing) + text, rank=rank, onset_step=firing.onset_step,
            terms={name: round(value, 3) for name, value in firing.terms.items() if abs(value) >= 0.001},
            detectable=firing.detectable, machine=None if machine is None else machine.values(),
        )  # fmt: skip

    def _straggles(self, step: Step, straggler: Straggler, told: Blame) -> Alert:
        """Evidence that a rank has become slower than the others, whatever the steps say."""
        self.counts.evidence += 1
        if not self.detector.incident_open:
            self.onset_ns = straggler.onset_ns
        onset = (number for number, start, _ in reversed(self._starts) if start <= straggler.onset_ns)
        observed_ms, expected_ms = (
            straggler.shortest_ns * (1.0 + share) / 1e6 for share in (straggler.share, straggler.usual_share)
        )
        return alert_about(
            step, "straggler", "evidence", step.end_ns, observed_ms, expected_ms, where=told.where,
            text=told.text, rank=step.rank if told.rank is None else told.rank,
            onset_step=next(onset, step.step),
        )  # fmt: skip

    def silence(self, now_ns: int) -> Alert | None:
        """An alert if requests wait and no step has ended for far longer than one should take."""
        step = self.last_step
        if step is None or self._silent or not (step.running or step.waiting):
            return None
        expected_ms = self.expected[-1][1] if self.expected else step.duration_ms
        quiet_ms = (now_ns - step.end_ns) / 1e6
        if quiet_ms < max(SILENCE_MIN_S * 1e3, SILENCE_FACTOR * expected_ms):
            return None
        self._silent = True
        self.counts.page += 1
        self.onset_ns = step.end_ns
        text = f"after {work_in_words(step)}: no step has ended for {quiet_ms / 1e3:.1f} s"
        return alert_about(
            step, "silence", "page", now_ns, quiet_ms, expected_ms, where="no step ended", text=text,
            rank=step.rank, onset_step=step.step,
        )  # fmt: skip

    def close(self) -> None:
        self.tape.close()
        if self.below is not None:
            self.below.close()
        self.host.close()
        self.attachment.close()
        self.devices.close()


def alert_about(
    step: Step, kind: str, level: str, time_ns: int, observed_ms: float, expected_ms: float, *,
    where: str | None, text: str, rank: int, onset_step: int, **more: Any,
) -> Alert:  # fmt: skip
    """A new alert of the replica of ``step``; ``time_ns``: CLOCK_MONOTONIC."""
    return Alert(
        id=secrets.token_hex(8), kind=kind, level=level, engine=step.engine, replica=step.replica, rank=rank,
        step=step.step, onset_step=onset_step, time=utc(time_ns), observed_ms=round(observed_ms, 3),
        expected_ms=round(expected_ms, 3), excess=round(observed_ms / max(expected_ms, 1e-6) - 1.0, 4),
        where=where, text=text, **more,
    )  # fmt: skip


def utc(monotonic_ns: int) -> str:
    """RFC 3339 UTC of a CLOCK_MONOTONIC time, by the offset of the two clocks now."""
    wall_ns = time.time_ns() - (time.monotonic_ns() - monotonic_ns)
    return (
        datetime.fromtimestamp(wall_ns / 1e9, timezone.utc)
        .isoformat(timespec="milliseconds")
        .replace("+00:00", "Z")
    )
