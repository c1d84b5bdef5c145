"""How good the detector is: graded synthetic faults in a recorded normal stream.

Protocol. The log's jobs (stretches of one workload) are split 60/40 at random, several times. The detector
learns the 60 % in order of time and then streams the other 40 %, mostly workloads that it never saw, in
order of time, learning on; into that part faults are put. An event is found if an alert falls on
[start, end + 10]. Alerts that touch no fault, nor the 20 steps after one, are false; those less than 50
steps apart are one false episode. Precision is found events / (found events + false episodes).
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from latencyprism.detect.detector import Detector
from latencyprism.detect.settings import Settings
from latencyprism.records.step import Step

TRAIN_SHARE = 0.6
DURATIONS = (20, 50, 100, 200, 500)
RAMP_STEPS = 500
LATE, GRACE, MERGE = 10, 20, 50
KV_PERCENTILE = 0.70
LEVELS = ("evidence", "page")
SPORADIC = 5
SHIFTED = 50
"""An alert within so many steps of a change of workload counts against it."""
Rivals = Callable[[Sequence[Step], Sequence[Step]], dict[str, Callable[[Sequence[Step]], list[int]]]]
"""Other detectors by name, from the learned and the clean streamed steps: positions of their alerts in a
stream of the same work."""


class Fault(NamedTuple):
    """``kind``: mult (share of the step), add (ms), ramp (share at its end), kv (share, long contexts
    only), sporadic (share, one step in five on average), stall (ms, one step)."""

    kind: str
    amount: float

    @property
    def name(self) -> str:
        return f"{self.kind}_{self.amount:g}"


GRADES: tuple[Fault, ...] = (
    *(Fault("mult", share) for share in (0.03, 0.05, 0.08, 0.10, 0.15, 0.30, 1.0)),
    Fault("ramp", 0.15),
    *(Fault("add", ms) for ms in (1.0, 2.0, 3.0, 5.0)),
    *(Fault("kv", share) for share in (0.1, 0.2)),
    *(Fault("sporadic", share) for share in (0.3, 1.0)),
    *(Fault("stall", ms) for ms in (20.0, 50.0, 100.0, 500.0)),
)


class Event(NamedTuple):
    start: int
    end: int
    """First and last position of the fault in the streamed part."""


@dataclass(slots=True)
class Score:
    """Sums over all splits and placements of one fault and one level."""

    events: int = 0
    found: int = 0
    false_episodes: int = 0
    lags: list[int] = field(default_factory=list)

    def row(self, hours: float) -> dict[str, float | int | None]:
        recall = self.found / self.events if self.events else None
        told = self.found + self.false_episodes
        precision = self.found / told if told else None
        f1 = 0.0
        if recall and precision:
            f1 = 2.0 * recall * precision / (recall + precision)
        lags = sorted(self.lags)
        return {
            "events": self.events,
            "recall": recall,
            "precision": precision,
            "f1": f1,
            "lag_mean": sum(lags) / len(lags) if lags else None,
            "lag_median": lags[len(lags) // 2] if lags else None,
            "false_episodes": self.false_episodes,
            "false_per_hour": self.false_episodes / hours if hours else None,
        }


def place(fault: Fault, length: int, rng: random.Random) -> list[Event]:
    """Where the faults go in a stream of ``length`` steps."""
    events: list[Event] = []
    at = rng.randint(100, 200) if fault.kind != "stall" else rng.randint(60, 140)
    turn = rng.randrange(len(DURATIONS))
    while True:
        steps = 1 if fault.kind == "stall" else RAMP_STEPS
        if fault.kind not in ("stall", "ramp"):
            steps = DURATIONS[turn % len(DURATIONS)]
        if at + steps + LATE >= length:
            return events
        events.append(Event(at, at + steps - 1))
        turn += 1
        at += steps + (rng.randint(60, 140) if fault.kind == "stall" else rng.randint(250, 650))


def spoil(
    steps: Sequence[Step], fault: Fault, events: Sequence[Event], rng: random.Random | None = None
) -> list[Step]:
    """The stream with the faults in it; durations change, work does not."""
    rng = rng or random.Random(0)
    spoiled = list(steps)
    contexts = sorted(step.context_tokens or 0 for step in steps)
    long_context = contexts[int(KV_PERCENTILE * (len(contexts) - 1))] if contexts else 0
    for start, end in events:
        for position in range(start, end + 1):
            step = steps[position]
            took = step.end_ns - step.start_ns
            if fault.kind in ("add", "stall"):
                more = fault.amount * 1e6
            elif fault.kind == "ramp":
                more = took * fault.amount * (position - start + 1) / (end - start + 1)
            elif (fault.kind == "kv" and (step.context_tokens or 0) <= long_context) or (
                fault.kind == "sporadic" and rng.randrange(SPORADIC)
            ):
                more = 0.0
            else:
                more = took * fault.amount
            spoiled[position] = step._replace(end_ns=step.end_ns + int(more))
    return spoiled


def touched(events: Sequence[Event], clean: Sequence[Step], spoiled: Sequence[Step]) -> list[Event]:
    """Events that changed at least one step (a kv fault may find no long context)."""
    return [
        event
        for event in events
        if any(clean[at].end_ns != spoiled[at].end_ns for at in range(event.start, event.end + 1))
    ]


def judge(alerts: Sequence[int], events: Sequence[Event], score: Score) -> None:
    """Count found events, lags and false episodes of one stream."""
    score.events += len(events)
    for start, end in events:
        first = next((at for at in alerts if start <= at <= end + LATE), None)
        if first is not None:
            score.found += 1
            score.lags.append(first - start)
    last = -MERGE - 1
    for at in alerts:
        if any(start <= at <= end + GRACE for start, end in events):
            continue
        if at - last >= MERGE:
            score.false_episodes += 1
        last = at


def alerts_of(detector: Detector, steps: Sequence[Step]) -> dict[str, list[int]]:
    """Positions at which a level fired; a page is evidence as well."""
    fired: dict[str, list[int]] = {level: [] for level in LEVELS}
    for position, step in enumerate(steps):
        firing = detector.observe(step)
        if firing is not None:
            fired["evidence"].append(position)
            if firing.level == "page":
                fired["page"].append(position)
    return fired


def split(jobs: Sequence[str], seed: int) -> tuple[list[int], list[int]]:
    """Positions of the learned and of the streamed steps for one seed, each in order of time."""
    names = sorted(set(jobs))
    random.Random(seed).shuffle(names)
    learned = set(names[: round(TRAIN_SHARE * len(names))])
    first = [position for position, job in enumerate(jobs) if job in learned]
    return first, [position for position, job in enumerate(jobs) if job not in learned]


def contaminate(steps: Sequence[Step], share: float, seed: int) -> list[Step]:
    """The steps with slow stretches of 20 to 200 steps in them, 10 to 100 % slower: ``share`` of them."""
    rng = random.Random(f"contaminate/{seed}")
    spoiled, left = list(steps), int(share * len(steps))
    while left > 0:
        length = min(left, rng.randint(20, 200))
        start, more = rng.randrange(max(1, len(steps) - length)), rng.uniform(0.1, 1.0)
        for at in range(start, min(len(steps), start + length)):
            step = steps[at]
            if spoiled[at] is step:
                took = step.end_ns - step.start_ns
                spoiled[at] = step._replace(end_ns=step.end_ns + int(took * more))
                left -= 1
    return spoiled


def shuffled(steps: Sequence[Step], jobs: Sequence[str], seed: int) -> tuple[list[Step], list[int]]:
    """The jobs in random order, their steps as they were; and where each begins. Times are put in order, with
    the idle time between two steps of a job kept and one of a millisecond between jobs."""
    names = sorted(set(jobs))
    random.Random(f"shuffle/{seed}").shuffle(names)
    steps_of: dict[str, list[Step]] = {name: [] for name in names}
    for step, job in zip(steps, jobs):
        steps_of[job].append(step)
    found: list[Step] = []
    begins, now = [], 0
    for name in names:
        begins.append(len(found))
        ended = None
        for step in steps_of[name]:
            now += 1_000_000 if ended is None else max(0, step.start_ns - ended)
            took = step.end_ns - step.start_ns
            found.append(step._replace(start_ns=now, end_ns=now + took))
            now, ended = now + took, step.end_ns
    return found, begins


@dataclass(slots=True)
class Run:
    """What ``grade`` sums up, by name of the detector (``LEVELS`` are ours)."""

    faults: Sequence[Fault]
    quiet: dict[str, Score] = field(default_factory=dict)
    scores: dict[tuple[str, str], Score] = field(default_factory=dict)
    hours: float = 0.0
    fault_hours: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    observed: int = 0

    def clean(self, fired: dict[str, list[int]], stream: Sequence[Step]) -> None:
        self.hours += busy_hours(stream)
        for name, alerts in fired.items():
            judge(alerts, [], self.quiet.setdefault(name, Score()))

    def faulty(
        self, fault: Fault, fired: dict[str, list[int]], events: Sequence[Event], hours: float
    ) -> None:
        self.fault_hours[fault.name] = self.fault_hours.get(fault.name, 0.0) + hours
        for name, alerts in fired.items():
            judge(alerts, events, self.scores.setdefault((fault.name, name), Score()))

    def told(self) -> dict[str, object]:
        return {
            "hours": self.hours,
            "us_per_step": self.seconds / self.observed * 1e6 if self.observed else None,
            "fault_free": {name: score.row(self.hours) for name, score in self.quiet.items()},
            "faults": {
                fault.name: {
                    name: score.row(self.fault_hours[fault.name])
                    for (other, name), score in self.scores.items()
                    if other == fault.name
                }
                for fault in self.faults
            },
        }


def grade(
    steps: Sequence[Step],
    jobs: Sequence[str],
    *,
    settings: Settings | None = None,
    faults: Sequence[Fault] = GRADES,
    splits: int = 6,
    placements: int = 2,
    seed: int = 0,
    learn: bool = True,
    contaminated: float = 0.0,
    rivals: Rivals | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, object]:
    """Run the protocol. ``learn`` False: cold start, the streamed part is all that is seen; ``contaminated``:
    share of the learned steps that are slow. Returns plain data: ``fault_free`` and ``faults`` by level and
    rival, hours streamed, µs of processor time per step."""
    run = Run(faults)
    for number in range(splits):
        first, second = split(jobs, seed * 1000 + number)
        learned = [steps[at] for at in first] if learn else []
        learned = contaminate(learned, contaminated, seed * 1000 + number) if contaminated else learned
        detector = Detector(settings)
        alerts_of(detector, learned)
        stream = [steps[at] for at in second]
        others = rivals(learned, stream) if rivals is not None else {}
        began = time.thread_time()
        fired = alerts_of(copy.deepcopy(detector), stream)
        run.seconds += time.thread_time() - began
        run.observed += len(stream)
        run.clean({**fired, **{name: told(stream) for name, told in others.items()}}, stream)
        for fault in faults:
            if progress is not None:
                progress(f"split {number + 1}/{splits}, {fault.name}")
            for placement in range(placements):
                rng = random.Random(f"{seed}/{number}/{placement}/{fault.name}")
                events = place(fault, len(stream), rng)
                spoiled = spoil(stream, fault, events, rng)
                events = touched(events, stream, spoiled)
                fired = alerts_of(copy.deepcopy(detector), spoiled)
                fired.update({name: told(spoiled) for name, told in others.items()})
                run.faulty(fault, fired, events, busy_hours(spoiled))
    return {
        "steps": len(steps),
        "jobs": len(set(jobs)),
        "splits": splits,
        "placements": placements,
        "seed": seed,
        **run.told(),
    }


def shifts(
    steps: Sequence[Step],
    jobs: Sequence[str],
    *,
    seed: int = 0,
    streams: int = 4,
    rivals: Rivals | None = None,
) -> dict[str, object]:
    """Workload shifts that must not alert: the jobs of a split in random order, one shift each. An alert
    within ``SHIFTED`` steps of one counts, once a shift."""
    counts: dict[str, int] = {}
    total = 0
    for number in range(streams):
        first, second = split(jobs, seed * 1000 + number)
        stream, begins = shuffled([steps[at] for at in second], [jobs[at] for at in second], number)
        learned = [steps[at] for at in first]
        detector = Detector()
        alerts_of(detector, learned)
        fired = alerts_of(detector, stream)
        if rivals is not None:
            fired.update({name: told(stream) for name, told in rivals(learned, stream).items()})
        total += len(begins)
        for name, alerts in fired.items():
            at = set(alerts)
            hit = sum(not at.isdisjoint(range(begin, begin + SHIFTED)) for begin in begins)
            counts[name] = counts.get(name, 0) + hit
    return {"shifts": total, "alerted": counts}


def first_alert(steps: Sequence[Step]) -> int | None:
    """Position of the first alert of a fresh detector in a clean stream; None if there is none."""
    detector = Detector()
    return next((at for at, step in enumerate(steps) if detector.observe(step) is not None), None)


def busy_hours(steps: Sequence[Step]) -> float:
    """Sum of step durations, hours."""
    return sum(step.end_ns - step.start_ns for step in steps) / 3.6e12
