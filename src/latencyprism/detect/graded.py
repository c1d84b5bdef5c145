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


class Fault(NamedTuple):
    """``kind``: mult (share of the step), add (ms), ramp (share at its end), kv (share, long contexts
    only), stall (ms, one step)."""

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


def spoil(steps: Sequence[Step], fault: Fault, events: Sequence[Event]) -> list[Step]:
    """The stream with the faults in it; durations change, work does not."""
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
            elif fault.kind == "kv" and (step.context_tokens or 0) <= long_context:
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
    progress: Callable[[str], None] | None = None,
) -> dict[str, object]:
    """Run the protocol. ``learn`` False: cold start, the streamed part is all that is seen. Returns plain
    data: ``fault_free`` and ``faults`` by level, hours streamed, µs per step."""
    scores = {(fault.name, level): Score() for fault in faults for level in LEVELS}
    quiet = {level: Score() for level in LEVELS}
    hours_of: dict[str, float] = {fault.name: 0.0 for fault in faults}
    quiet_hours, seconds, observed = 0.0, 0.0, 0
    for number in range(splits):
        first, second = split(jobs, seed * 1000 + number)
        detector = Detector(settings)
        if learn:
            alerts_of(detector, [steps[at] for at in first])
        stream = [steps[at] for at in second]
        began = time.perf_counter()
        fired = alerts_of(copy.deepcopy(detector), stream)
        seconds += time.perf_counter() - began
        observed += len(stream)
        quiet_hours += busy_hours(stream)
        for level in LEVELS:
            judge(fired[level], [], quiet[level])
        for fault in faults:
            if progress is not None:
                progress(f"split {number + 1}/{splits}, {fault.name}")
            for placement in range(placements):
                rng = random.Random(f"{seed}/{number}/{placement}/{fault.name}")
                events = place(fault, len(stream), rng)
                spoiled = spoil(stream, fault, events)
                events = touched(events, stream, spoiled)
                fired = alerts_of(copy.deepcopy(detector), spoiled)
                hours_of[fault.name] += busy_hours(spoiled)
                for level in LEVELS:
                    judge(fired[level], events, scores[fault.name, level])
    return {
        "steps": len(steps),
        "jobs": len(set(jobs)),
        "splits": splits,
        "placements": placements,
        "seed": seed,
        "hours": quiet_hours,
        "us_per_step": seconds / observed * 1e6 if observed else None,
        "fault_free": {level: quiet[level].row(quiet_hours) for level in LEVELS},
        "faults": {
            fault.name: {level: scores[fault.name, level].row(hours_of[fault.name]) for level in LEVELS}
            for fault in faults
        },
    }


def busy_hours(steps: Sequence[Step]) -> float:
    """Sum of step durations, hours."""
    return sum(step.end_ns - step.start_ns for step in steps) / 3.6e12
