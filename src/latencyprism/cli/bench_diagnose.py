"""``latencyprism bench diagnose``: are injected causes named, healthy runs left alone, and is it said with
the right confidence?"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from latencyprism.cli.options import duration_s
from latencyprism.cli.results import say
from latencyprism.errors import BadInput
from latencyprism.records import CAUSES

NAME = "bench diagnose"
HELP = "injected causes on a real engine, or recorded pairs: is the cause named?"
ENGINES = ("vllm", "transformers", "llama.cpp")
_SHORT_S = 540.0
_SHORT = ("cpu.neighbour", "cpu.quota", "peer.stalled", "python.gil", "python.gc", "memory.reclaim")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--engine", choices=ENGINES, default="vllm", help="default: vllm")
    parser.add_argument(
        "--causes", type=_causes, metavar="CAUSE,..", help="default: all that the toolkit can inject"
    )
    parser.add_argument(
        "--strengths", type=_strengths, default=(0.1, 0.25, 0.5, 1.0), metavar="N,..",
        help="slow-downs aimed at (default 0.1,0.25,0.5,1)",
    )  # fmt: skip
    parser.add_argument("--runs", type=int, default=5, help="of each cause and strength (default 5)")
    parser.add_argument(
        "--pairs", type=_pairs, default=(), metavar="A+B,..", help="two causes at once, at 0.5 and above"
    )
    parser.add_argument(
        "--healthy", type=int, metavar="N", help="healthy runs (default: a fifth of the others)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="append each run to FILE; what is in it already is not repeated",
    )
    parser.add_argument(
        "--for", dest="seconds", type=duration_s, metavar="TIME",
        help="stop after so long; the same command goes on from there",
    )  # fmt: skip
    parser.add_argument(
        "--short", action="store_true", help="six causes at full strength, within ten minutes"
    )
    parser.add_argument(
        "--read", type=Path, nargs="+", metavar="FILE", help="no engine: score the runs of these files"
    )
    parser.add_argument(
        "-o", "--output", type=Path, metavar="SVG", help="write the confusion matrix as a picture"
    )
    parser.add_argument(
        "--artefact", type=Path, metavar="DIR",
        help="instead of an engine: folders of tables, named after what was injected",
    )  # fmt: skip
    parser.add_argument(
        "--draws", type=int, default=20, help="with --artefact: draws of each kind (default 20)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn at random (default 0)")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def _causes(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    unknown = [name for name in names if name not in CAUSES or name in ("none", "unknown")]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r:.60} is no cause")
    return names


def _pairs(text: str) -> tuple[tuple[str, str], ...]:
    found = []
    for part in text.split(","):
        names = _causes(part.replace("+", ","))
        if len(names) != 2:
            raise argparse.ArgumentTypeError(f"{part!r:.80} is not two causes joined by +")
        found.append((names[0], names[1]))
    return tuple(found)


def _strengths(text: str) -> tuple[float, ...]:
    try:
        found = tuple(sorted({float(part) for part in text.split(",")}))
    except ValueError:
        found = ()
    if not found or not all(math.isfinite(value) and 0 < value <= 4 for value in found):
        raise argparse.ArgumentTypeError("numbers above 0, up to 4, separated by commas")
    return found


def run(args: argparse.Namespace) -> int:
    if not 1 <= args.draws <= 1000:
        raise BadInput("--draws must be from 1 to 1000")
    if not 1 <= args.runs <= 1000 or not 0 <= (args.healthy or 0) <= 10_000:
        raise BadInput("--runs must be from 1 to 1000, --healthy from 0 to 10000")
    if args.artefact is not None:
        return _artefact(args)
    lines, skipped = _read(args.read) if args.read else _measure(args)
    from latencyprism.bench import confusion_picture, diagnose_score

    result = {**diagnose_score.score(lines), "skipped": skipped}
    if args.output is not None:
        title = f"{result['runs'] - result['without_effect']} runs: what was injected, what was named"
        _write(args.output, confusion_picture.svg(result["confusion"], title))
    print(json.dumps(result) if args.json else "\n".join(_table(result)))
    return 0


def _read(paths: list[Path]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    from latencyprism.bench.diagnosed import read_lines

    return [line for path in paths for line in read_lines(path)], {}


def _measure(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, str]]:
    from latencyprism import inject
    from latencyprism.bench.diagnosed import Plan
    from latencyprism.bench.diagnosed import run as measure

    if args.short:
        plan = Plan(
            args.engine, args.causes or _SHORT, (1.0,), 2, args.pairs, args.out, args.seconds or _SHORT_S
        )
    else:
        causes = args.causes or tuple(cause for cause in inject.CATALOGUE)
        plan = Plan(
            args.engine, causes, args.strengths, args.runs, args.pairs, args.out, args.seconds, args.healthy
        )
    return measure(plan, say), plan.skipped


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise BadInput(f"cannot write {path}", error.strerror or str(error)) from error


def _artefact(args: argparse.Namespace) -> int:
    from latencyprism.bench import artefact

    result = artefact.run(args.artefact, args.draws, args.seed, say)
    print(json.dumps(result) if args.json else "\n".join(_artefact_table(result)))
    return 0


def _table(result: dict[str, Any]) -> list[str]:
    told = [f"{result['runs']} runs, {result['without_effect']} of them without effect and not counted"]
    told.append(f"{'':24}  runs  top-1  top-3")
    for name, row in result["by_strength"].items():
        told.append(_row(f"aimed at {float(name):.0%}", row))
    for name, row in result["by_reached"].items():
        told.append(_row(f"slower by {name}", row))
    for kind in ("by_engine", "by_cause"):
        told += [_row(name, row) for name, row in result[kind].items()]
    told.append(_row("the paper's score", result["paper"]))
    healthy, pairs, unseen = result["healthy"], result["pairs"], result["unseen"]
    told.append(f"healthy: a cause named in {healthy['cause_named']} of {healthy['runs']}")
    told.append(f"two at once: both in the top three {_percent(pairs['both_in_top3'])} of {pairs['runs']}")
    told.append(
        f"cause unseen: unknown or its family {_percent(unseen['unknown_or_family'])} of {unseen['runs']}"
    )
    for row in result["calibration"]:
        told.append(f"said above {row['above']:.2f}: right {_percent(row['right'])} of {row['runs']}")
    told += [f"skipped {cause}: {why}" for cause, why in result["skipped"].items()]
    return told


def _row(name: str, row: dict[str, Any]) -> str:
    return f"{name:24}  {row['runs']:4}  {_percent(row['top1']):>5}  {_percent(row['top3']):>5}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"


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
