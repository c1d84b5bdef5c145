"""``latencyprism bench diagnose``: are injected causes named, healthy runs left alone, and is it said with
the right confidence?"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from latencyprism.errors import BadInput

NAME = "bench diagnose"
HELP = "injected causes on a real engine, or recorded pairs: is the cause named?"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--artefact", type=Path, metavar="DIR",
        help="instead of an engine: folders of tables, named after what was injected",
    )  # fmt: skip
    parser.add_argument(
        "--draws", type=int, default=20, help="with --artefact: draws of each kind (default 20)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn at random (default 0)")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(args: argparse.Namespace) -> int:
    from latencyprism.bench import artefact

    if not 1 <= args.draws <= 1000:
        raise BadInput("--draws must be from 1 to 1000")
    if args.artefact is None:
        raise BadInput("nothing to diagnose", "--artefact DIR is needed")
    result = artefact.run(args.artefact, args.draws, args.seed, _say)
    print(json.dumps(result) if args.json else "\n".join(_artefact_table(result)))
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _artefact_table(result: dict[str, Any]) -> list[str]:
    told = [
        f"{result['right']} of {result['of']} pairs right with all cycles "
        f"(the paper's score: {result['paper_right']})"
    ]
    for name, row in result["pairs"].items():
        told.append(f"  {name:48} {row['verdict']} ({row['probability']:.0%})")
    told.append("cycles  strength  top-1  top-3  said > 0.9, of these right")
    for row in result["draws"]:
        sure = f"{row['of_these_right']}/{row['said_over_0.9']}"
        told.append(
            f"{row['cycles']:6}  {row['strength']:8.2f}  {row['top1']:.3f}  {row['top3']:.3f}  {sure}"
        )
    healthy = result["healthy"]
    told.append(f"healthy against healthy: {healthy['cause_named']} of {healthy['compared']} name a cause")
    return told
