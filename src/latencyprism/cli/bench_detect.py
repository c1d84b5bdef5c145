"""Graded synthetic faults on a recorded normal step log: how much of what is found, how late, at what rate
of false alarms. Splits by job, in order of time, seeded."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from latencyprism.detect.graded import GRADES, LEVELS, grade
from latencyprism.detect.steplog import FORMATS, StepLog
from latencyprism.errors import BadInput

NAME = "bench detect"
HELP = "graded faults on a recorded step log"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", metavar="FILE", type=Path, required=True, help="step log, normal traffic")
    parser.add_argument("--format", choices=tuple(FORMATS), default="latencyprism-artefact")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--splits", type=int, default=6, help="random 60/40 splits of the jobs (default 6)")
    parser.add_argument("--placements", type=int, default=2, help="fault placements per split (default 2)")
    parser.add_argument(
        "--fault", action="append", choices=[f.name for f in GRADES], help="repeat; default all"
    )
    parser.add_argument("--cold", action="store_true", help="learn nothing before the faults begin")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(args: argparse.Namespace) -> int:
    if not (1 <= args.splits <= 100 and 1 <= args.placements <= 100):
        raise BadInput("--splits and --placements must be from 1 to 100")
    log = StepLog(args.data, args.format)
    steps = list(log)
    if len(set(log.stretches)) < 3:
        raise BadInput(f"{args.data} cannot be split", "it names fewer than three jobs")
    result = grade(
        steps,
        log.stretches,
        faults=[fault for fault in GRADES if not args.fault or fault.name in args.fault],
        splits=args.splits,
        placements=args.placements,
        seed=args.seed,
        learn=not args.cold,
        progress=_progress if sys.stderr.isatty() and not args.json else None,
    )
    print(json.dumps(result) if args.json else "\n".join(_table(result)))
    return 0


def _progress(text: str) -> None:
    print(f"\r\x1b[K{text}", end="", file=sys.stderr)


def _table(result: dict[str, Any]) -> list[str]:
    quiet = result["fault_free"]
    told = [
        f"{result['steps']} steps of {result['jobs']} jobs, {result['hours']:.2f} stream hours judged, "
        f"{result['us_per_step']:.1f} us per step",
        "false episodes per hour, fault-free: "
        + ", ".join(f"{level} {quiet[level]['false_per_hour']:.1f}" for level in LEVELS),
        f"{'fault':10}" + "".join(f" | {level:8} F1  recall  prec.  lag" for level in LEVELS),
    ]
    for name, rows in result["faults"].items():
        cells = ""
        for level in LEVELS:
            row = rows[level]
            shown = [row["f1"], row["recall"], row["precision"]]
            numbers = "  ".join("  -  " if value is None else f"{value:.3f}" for value in shown)
            lag = "    -" if row["lag_mean"] is None else f"{row['lag_mean']:5.1f}"
            cells += f" | {numbers:>26} {lag}"
        told.append(f"{name:10}{cells}")
    return told
