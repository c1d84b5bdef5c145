"""The guard on a real vLLM under bursts of long prompts, without and with it."""

from __future__ import annotations

import argparse
from pathlib import Path

from latencyprism.cli.options import add_duration
from latencyprism.cli.results import print_figures, say
from latencyprism.errors import BadInput

NAME = "bench guard"
HELP = "SLO kept under bursts of long prompts, without and with the guard"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--engine", choices=("vllm",), default="vllm", help="default: vllm")
    parser.add_argument("--pairs", type=int, default=2, help="blocks without and with (default 2)")
    add_duration(parser, 45.0, "of a block (default 45s)")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="plot of the run (a new SVG file)")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn at random (default 0)")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(args: argparse.Namespace) -> int:
    from latencyprism.bench import guarding

    if not 1 <= args.pairs <= 50:
        raise BadInput("--pairs must be from 1 to 50")
    if not 10.0 <= args.duration <= 600.0:
        raise BadInput("-d must be from 10 s to 10 min")
    if args.output is not None:
        _writable(args.output)
    result = guarding.run(args.pairs, args.duration, args.seed, args.output, say)
    return print_figures(result, args.json, 20)


def _writable(path: Path) -> None:
    """Before minutes are spent on what could then not be kept."""
    if path.suffix.lower() != ".svg":
        raise BadInput(f"cannot plot into {path}", "the plot is an SVG", "let the name end in .svg")
    try:
        path.open("x").close()
    except OSError as error:
        raise BadInput(f"cannot write {path}", error.strerror or str(error)) from None
