"""The guard on a real vLLM under bursts of long prompts, without and with it."""

from __future__ import annotations

import argparse
import json
import sys

from latencyprism.cli.options import add_duration
from latencyprism.errors import BadInput

NAME = "bench guard"
HELP = "SLO kept under bursts of long prompts, without and with the guard"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--engine", choices=("vllm",), default="vllm", help="default: vllm")
    parser.add_argument("--pairs", type=int, default=2, help="blocks without and with (default 2)")
    add_duration(parser, 45.0, "of a block (default 45s)")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn at random (default 0)")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(args: argparse.Namespace) -> int:
    from latencyprism.bench import guarding

    if not 1 <= args.pairs <= 50:
        raise BadInput("--pairs must be from 1 to 50")
    result = guarding.run(args.pairs, args.duration, args.seed, _say)
    if args.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:20} {value}")
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
