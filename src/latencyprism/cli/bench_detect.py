"""How good the detector is: graded synthetic faults on a recorded normal step log, workload shifts that must
not alert, a cold start, contaminated training; beside the paper's detector re-created and raw thresholds. Or,
with --record, real faults on a real engine."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from latencyprism.detect.graded import GRADES, LEVELS, first_alert, grade, shifts
from latencyprism.detect.steplog import FORMATS, StepLog
from latencyprism.errors import BadInput

NAME = "bench detect"
HELP = "graded faults on a recorded step log, or real ones on a real engine"
COLD = ("mult_0.05", "mult_0.1", "mult_0.15")
CONTAMINATED, SHARE = ("mult_0.05", "mult_0.1"), 0.2
SHORT = {
    "evidence": "evidence", "page": "page", "paper_dynamic_window": "paper",
    "paper_fixed_window": "paper 15%", "raw_threshold": "raw p99.9", "raw_ewma": "raw ewma",
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", metavar="FILE", type=Path, help="step log, normal traffic, several jobs")
    what.add_argument("--record", action="store_true", help="record steps of a real engine, with real faults")
    parser.add_argument("--engine", choices=("vllm", "transformers"), default="vllm", help="with --record")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="with --record: the step log goes there as well"
    )
    parser.add_argument("--format", choices=tuple(FORMATS), default="latencyprism-artefact")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--splits", type=int, default=6, help="random 60/40 splits of the jobs (default 6)")
    parser.add_argument("--placements", type=int, default=2, help="fault placements per split (default 2)")
    parser.add_argument(
        "--fault", action="append", choices=[f.name for f in GRADES],
        help="only this one, and nothing of cold starts, shifts and contamination; repeat",
    )  # fmt: skip
    parser.add_argument("--cold", action="store_true", help="learn nothing before the faults begin")
    parser.add_argument("--no-rivals", action="store_true", help="our detector alone")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(args: argparse.Namespace) -> int:
    if not (1 <= args.splits <= 100 and 1 <= args.placements <= 100):
        raise BadInput("--splits and --placements must be from 1 to 100")
    if args.output is not None and not args.record:
        raise BadInput("-o is for what --record records")
    if args.record:
        from latencyprism.bench import detect_recorded

        result = detect_recorded.run(
            args.engine, args.seed, lambda text: print(text, file=sys.stderr, flush=True)
        )
        print(json.dumps(result) if args.json else "\n".join(f"{k:24} {v}" for k, v in result.items()))
        return 0
    result = _on_data(args)
    print(json.dumps(result) if args.json else "\n".join(_table(result)))
    return 0


def _on_data(args: argparse.Namespace) -> dict[str, Any]:
    from latencyprism.bench.footing import model_bytes
    from latencyprism.bench.rivals import rivals

    log = StepLog(args.data, args.format)
    steps = list(log)
    jobs = log.stretches
    if len(set(jobs)) < 3:
        raise BadInput(f"{args.data} cannot be split", "it names fewer than three jobs")
    others = None if args.no_rivals or args.cold else rivals

    def graded(names: tuple[str, ...] | None, part: str, **more: Any) -> dict[str, Any]:
        faults = [fault for fault in GRADES if names is None or fault.name in names]
        return grade(
            steps, jobs, faults=faults, splits=args.splits, placements=args.placements, seed=args.seed,
            progress=_progress(part) if sys.stderr.isatty() and not args.json else None, **more,
        )  # fmt: skip

    asked = tuple(args.fault) if args.fault else None
    result = graded(asked, "faults", learn=not args.cold, rivals=others)
    result["model_bytes"] = model_bytes(steps)
    if asked is not None or args.cold:
        return result
    cold = graded(COLD, "cold start", learn=False)
    spoiled = graded(CONTAMINATED, "contaminated", contaminated=SHARE)
    result["cold"] = {
        "first_alert_step": first_alert(steps), "fault_free": cold["fault_free"], "faults": cold["faults"]
    }  # fmt: skip
    result["contaminated"] = {
        "share": SHARE, "fault_free": spoiled["fault_free"], "faults": spoiled["faults"],
        "f1_lost": {
            name: result["faults"][name]["evidence"]["f1"] - spoiled["faults"][name]["evidence"]["f1"]
            for name in CONTAMINATED
        },
    }  # fmt: skip
    result["workload_shifts"] = shifts(steps, jobs, seed=args.seed, rivals=others)
    return result


def _progress(part: str) -> Callable[[str], None]:
    return lambda text: print(f"\r\x1b[K{part}: {text}", end="", file=sys.stderr)


def _table(result: dict[str, Any]) -> list[str]:
    names = [name for name in SHORT if name in result["fault_free"]]
    told = [
        f"{result['steps']} steps of {result['jobs']} jobs, {result['hours']:.2f} stream hours judged, "
        f"{result['us_per_step']:.1f} us of processor time a step, "
        f"{result['model_bytes'] / 1000:.0f} kB a model",
        f"{'':14}" + "".join(f"{SHORT[name]:>11}" for name in names) + "   lag, steps: evidence, page",
        f"{'false/h, clean':14}"
        + "".join(f"{result['fault_free'][name]['false_per_hour']:11.1f}" for name in names),
    ]
    told += _rows("", result["faults"], names)
    if "cold" in result:
        first = result["cold"]["first_alert_step"]
        told.append(
            f"cold start (first alert in the clean stream: {'none' if first is None else f'step {first}'})"
        )
        told += _rows("cold ", result["cold"]["faults"], names)
        told.append(f"{result['contaminated']['share']:.0%} of the learned steps 10 to 100 % slow")
        told += _rows("dirty ", result["contaminated"]["faults"], names)
        moved = result["workload_shifts"]
        alerted = ", ".join(
            f"{SHORT[name]} {moved['alerted'][name]}" for name in names if name in moved["alerted"]
        )
        told.append(f"of {moved['shifts']} workload shifts alerted: {alerted}")
    return told


def _rows(before: str, faults: dict[str, Any], names: list[str]) -> list[str]:
    told = []
    for fault, rows in faults.items():
        cells = "".join(f"{rows[name]['f1']:11.3f}" if name in rows else f"{'-':>11}" for name in names)
        lags = [rows[level]["lag_mean"] for level in LEVELS]
        shown = ", ".join("-" if lag is None else f"{lag:.1f}" for lag in lags)
        told.append(f"{before + fault:14}{cells}   {shown}")
    return told
