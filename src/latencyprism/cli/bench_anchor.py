"""Search for the iteration of an engine as if no pack knew it: is it right, how long does it take, what does
it cost.

On a real engine with a tiny random model, or on a made-up one (asyncio). Windows with a search alternate with
windows without one, in random order.
"""

from __future__ import annotations

import argparse

from latencyprism.cli.results import print_figures, say
from latencyprism.errors import BadInput

NAME = "bench anchor"
HELP = "search for an unknown engine's iteration: right function, time, cost"
ENGINES = ("vllm", "transformers", "asyncio")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--engine", choices=ENGINES, default="vllm", help="default: vllm")
    parser.add_argument("--pairs", type=int, default=12, help="pairs of windows (default 12)")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn at random (default 0)")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(args: argparse.Namespace) -> int:
    from latencyprism.bench import anchor

    if not 1 <= args.pairs <= 500:
        raise BadInput("--pairs must be from 1 to 500")
    result = anchor.run(args.engine, args.pairs, args.seed, say)
    return print_figures(result, args.json, 28)
