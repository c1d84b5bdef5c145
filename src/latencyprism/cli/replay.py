"""Run the detector over a recorded step log: one JSON line for each step at which a test fires, before
incidents are merged; with --summary, one JSON object at the end."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from latencyprism.detect import Detector, Firing
from latencyprism.detect.steplog import FORMATS, StepLog
from latencyprism.errors import BadInput
from latencyprism.records.step import Step

NAME = "replay"
HELP = "run the detector over a recorded step log"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", type=Path, help="CSV of steps, plain or gzip")
    parser.add_argument(
        "--format", choices=tuple(FORMATS), default="steps", help="columns of the file (default: steps)"
    )
    parser.add_argument("--summary", action="store_true", help="end with one JSON object of totals")
    parser.add_argument(
        "--skip-bad", action="store_true", help="count and skip rows that cannot be used instead of failing"
    )
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, help="write there instead of stdout")
    parser.add_argument(
        "--fail-on-alert", action="store_true", help="exit with code 4 if a test fired anywhere"
    )
    parser.add_argument("--json", action="store_true", help="accepted for symmetry: the output is JSON")


def run(args: argparse.Namespace) -> int:
    log = StepLog(args.file, args.format, args.skip_bad)
    totals = Totals()
    with _output(args.output) as out:
        for line in replay(log, totals):
            out.write(json.dumps(line, allow_nan=False) + "\n")
        if args.summary:
            out.write(json.dumps(totals.summary(log), allow_nan=False) + "\n")
    return 4 if args.fail_on_alert and totals.alerts else 0


@contextlib.contextmanager
def _output(path: Path | None) -> Iterator[IO[str]]:
    if path is None:
        yield sys.stdout
        return
    try:
        out = path.open("w", encoding="utf-8")
    except OSError as error:
        raise BadInput(f"cannot write {path}", error.strerror or str(error)) from error
    with out:
        yield out


@dataclass(slots=True)
class Totals:
    """What the summary tells; errors are those of the expectation made before each step was known."""

    steps: int = 0
    alerts: int = 0
    incidents: int = 0
    seconds: float = 0.0
    judged: int = 0
    error_sum: float = 0.0
    within: int = 0
    streams: dict[tuple[str, int, int], Detector] = field(default_factory=dict)
    numbers: dict[tuple[int, int], int] = field(default_factory=dict)

    def observe(self, step: Step) -> Firing | None:
        """Give a step to the detector of its replica and rank."""
        key = (step.engine, step.replica, step.rank)
        detector = self.streams.get(key)
        if detector is None:
            detector = self.streams[key] = Detector()
        began = time.perf_counter()
        firing = detector.observe(step)
        self.seconds += time.perf_counter() - began
        self.steps += 1
        observed = step.duration_ms
        if detector.last is not None and observed > 0.0:
            share = abs(detector.last.ms - observed) / observed
            self.judged += 1
            self.error_sum += share
            self.within += share <= 0.10
        if firing is not None:
            self.alerts += 1
            number = self.numbers.setdefault((id(detector), firing.incident), len(self.numbers) + 1)
            self.incidents = len(self.numbers)
            firing.incident = number
        return firing

    def summary(self, log: StepLog) -> dict[str, Any]:
        judged = self.judged
        return {
            "steps": self.steps,
            "alerts": self.alerts,
            "incidents": self.incidents,
            "us_per_step": round(self.seconds / self.steps * 1e6, 2) if self.steps else None,
            "mape": round(self.error_sum / judged, 6) if judged else None,
            "within_10pct": round(self.within / judged, 6) if judged else None,
            "skipped": log.skipped,
            "unknown_columns": log.unknown_columns,
        }


def replay(steps: Iterable[Step], totals: Totals) -> Iterator[dict[str, Any]]:
    """One plain record per firing; ``step`` and ``onset_step`` are 0-based rows."""
    for step in steps:
        firing = totals.observe(step)
        if firing is not None:
            yield {
                "step": firing.step,
                "level": firing.level,
                "kind": firing.kind,
                "onset_step": firing.onset_step,
                "observed_ms": round(firing.observed_ms, 4),
                "expected_ms": round(firing.expected_ms, 4),
                "excess": round(firing.excess, 4),
                "incident": firing.incident,
                "engine": step.engine,
                "replica": step.replica,
                "rank": step.rank,
            }
