"""``bench breakdown``, ``deepdive`` and ``clocks``: does a step add up, what does looking deeper cost, and is
every time as right as it says?"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from latencyprism.cli.options import add_duration, duration_s
from latencyprism.cli.results import print_figures, say
from latencyprism.errors import BadInput

ENGINES = ("vllm", "transformers", "llama.cpp")


def add_arguments(what: Any) -> None:
    """Adds the three to ``bench``'s list."""
    breakdown: argparse.ArgumentParser = what.add_parser(
        "breakdown", help="parts of a step's time and what of it stays unexplained"
    )
    breakdown.add_argument("--engine", choices=ENGINES, default="vllm", help="default: vllm")
    add_duration(breakdown, 20.0, "length of each of the two captures (default 20s)")
    breakdown.add_argument("--clients", type=int, default=4, help="clients of the load (default 4)")
    breakdown.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the captures there")
    breakdown.set_defaults(bench=_breakdown)
    deep: argparse.ArgumentParser = what.add_parser(
        "deepdive", help="what a deep dive costs and sees, against a placebo"
    )
    deep.add_argument("--engine", choices=ENGINES[:2], default="vllm", help="default: vllm")
    deep.add_argument("--pairs", type=int, default=12, help="pairs of windows (default 12)")
    deep.add_argument(
        "--window", type=duration_s, default=2.5, metavar="TIME", help="length of a window (default 2.5s)"
    )
    deep.add_argument("--clients", type=int, default=4, help="clients of the load (default 4)")
    deep.add_argument("--arms", type=int, default=20, help="further times armed, for its delay (default 20)")
    deep.add_argument("--seed", type=int, default=0, help="of the order of the windows (default 0)")
    deep.set_defaults(bench=_deepdive)
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
    for parser in (breakdown, deep, clocks):
        parser.add_argument("--json", action="store_true", help="one JSON object")


def _breakdown(args: argparse.Namespace) -> int:
    from latencyprism.bench import breakdown

    if not 1 <= args.duration <= 60:
        raise BadInput("-d must be from 1s to 60s", "a capture is kept in memory")
    if not 1 <= args.clients <= 1024:
        raise BadInput("--clients must be from 1 to 1024")
    if args.keep is not None and not args.keep.is_dir():
        raise BadInput(f"cannot keep captures in {args.keep}", "it is no folder", "make it first")
    return print_figures(
        breakdown.run(args.engine, args.duration, args.clients, say, args.keep), args.json, 34
    )


def _deepdive(args: argparse.Namespace) -> int:
    from latencyprism.bench import deepdive

    if not 1 <= args.pairs <= 200 or not 0 <= args.arms <= 500:
        raise BadInput("--pairs must be from 1 to 200 and --arms from 0 to 500")
    if not 0.5 <= args.window <= 10:
        raise BadInput("--window must be from 0.5s to 10s")
    if not 1 <= args.clients <= 1024:
        raise BadInput("--clients must be from 1 to 1024")
    found = deepdive.run(args.engine, args.pairs, args.window, args.clients, args.arms, args.seed, say)
    return print_figures(found, args.json, 34)


def _clocks(args: argparse.Namespace) -> int:
    from latencyprism.bench import clocks

    if not 1 <= args.trials <= 100_000:
        raise BadInput("--trials must be from 1 to 100000")
    if args.exchange > 120:
        raise BadInput("--exchange is too long", "120s at most")
    return print_figures(clocks.run(args.trials, args.seed, args.exchange, say), args.json, 34)
