"""``bench breakdown`` and ``bench clocks``: does a step add up, and is every time as right as it says?"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from latencyprism.cli.options import add_duration, duration_s
from latencyprism.errors import BadInput

ENGINES = ("vllm", "transformers", "llama.cpp")


def add_arguments(what: Any) -> None:
    """Adds both to ``bench``'s list."""
    breakdown: argparse.ArgumentParser = what.add_parser(
        "breakdown", help="parts of a step's time and what of it stays unexplained"
    )
    breakdown.add_argument("--engine", choices=ENGINES, default="vllm", help="default: vllm")
    add_duration(breakdown, 20.0, "length of each of the two captures (default 20s)")
    breakdown.add_argument("--clients", type=int, default=4, help="clients of the load (default 4)")
    breakdown.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the captures there")
    breakdown.set_defaults(bench=_breakdown)
    clocks: argparse.ArgumentParser = what.add_parser(
        "clocks", help="simulated clocks: is any event further off than the stated bound?"
    )
    clocks.add_argument("--trials", type=int, default=1000, help="default 1000")
    clocks.add_argument("--seed", type=int, default=0, help="of the trials (default 0)")
    clocks.add_argument(
        "--exchange", type=duration_s, default=5.0, metavar="TIME",
        help="real exchanges between two network namespaces for so long (default 5s; needs root)",
    )  # fmt: skip
    clocks.set_defaults(bench=_clocks)
    for parser in (breakdown, clocks):
        parser.add_argument("--json", action="store_true", help="one JSON object")


def _breakdown(args: argparse.Namespace) -> int:
    from latencyprism.bench import breakdown

    if not 1 <= args.duration <= 60:
        raise BadInput("-d must be from 1s to 60s", "a capture is kept in memory")
    if not 1 <= args.clients <= 1024:
        raise BadInput("--clients must be from 1 to 1024")
    if args.keep is not None and not args.keep.is_dir():
        raise BadInput(f"cannot keep captures in {args.keep}", "it is no folder", "make it first")
    return _print(breakdown.run(args.engine, args.duration, args.clients, _say, args.keep), args.json)


def _clocks(args: argparse.Namespace) -> int:
    from latencyprism.bench import clocks

    if not 1 <= args.trials <= 100_000:
        raise BadInput("--trials must be from 1 to 100000")
    if args.exchange > 120:
        raise BadInput("--exchange is too long", "120s at most")
    return _print(clocks.run(args.trials, args.seed, args.exchange, _say), args.json)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _print(result: dict[str, Any], as_json: bool) -> int:
    if as_json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:34} {value}")
    return 0
