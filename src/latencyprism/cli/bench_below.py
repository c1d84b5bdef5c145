"""``bench bpf``, ``bench attribution``, ``bench below``: the probes below the interpreter, measured."""

from __future__ import annotations

import argparse
from typing import Any

from latencyprism.cli.options import add_duration, duration_s
from latencyprism.cli.results import print_figures, say
from latencyprism.errors import BadInput

NAMES = ("bpf", "attribution", "below")


def add_arguments(what: Any) -> None:
    """Adds them to ``bench``'s list."""
    bpf: argparse.ArgumentParser = what.add_parser(
        "bpf", help="probes: events a second, loss, CPU of the reader, cost of a hit, and of coming and going"
    )
    add_duration(bpf, 5.0, "how long events stream (default 5s)")
    bpf.add_argument(
        "--rate", type=float, default=450_000, metavar="N", help="events a second to ask for (default 450000)"
    )
    bpf.add_argument(
        "--kills", type=int, default=50, metavar="N", help="profilers to kill at full load (default 50)"
    )
    bpf.set_defaults(bench=_bpf)
    attribution: argparse.ArgumentParser = what.add_parser(
        "attribution", help="known waits in known steps: are they found there, with the right reason?"
    )
    attribution.add_argument("--rounds", type=int, default=20, help="of each disturbance (default 20)")
    attribution.add_argument("--seed", type=int, default=0, help="of their order (default 0)")
    attribution.set_defaults(bench=_attribution)
    below: argparse.ArgumentParser = what.add_parser(
        "below", help="paired windows with and without the always-on kernel probes alone, on an engine"
    )
    below.add_argument("--engine", choices=("vllm", "transformers", "llama.cpp"), default="vllm")
    below.add_argument("--pairs", type=int, default=30, help="pairs of windows (default 30)")
    below.add_argument(
        "--window", type=duration_s, default=3.0, metavar="TIME", help="length of a window (default 3s)"
    )
    below.add_argument("--clients", type=int, default=8, help="clients of the load (default 8)")
    below.add_argument("--seed", type=int, default=0, help="of the order (default 0)")
    below.set_defaults(bench=_below)
    for parser in (bpf, attribution, below):
        parser.add_argument("--json", action="store_true", help="one JSON object")


def _bpf(args: argparse.Namespace) -> int:
    from latencyprism.bench import bpf

    if not 1000 <= args.rate <= 10_000_000:
        raise BadInput("--rate must be from 1000 to 10000000")
    if not 0 <= args.kills <= 1000:
        raise BadInput("--kills must be from 0 to 1000")
    if args.duration > 60:
        raise BadInput("that is too long", "60s at most")
    return print_figures(bpf.run(args.duration, args.rate, args.kills, say), args.json, 24)


def _attribution(args: argparse.Namespace) -> int:
    from latencyprism.bench import attribution

    if not 1 <= args.rounds <= 500:
        raise BadInput("--rounds must be from 1 to 500")
    return print_figures(attribution.run(args.rounds, args.seed, say), args.json, 24)


def _below(args: argparse.Namespace) -> int:
    from latencyprism.bench import overhead

    if not 1 <= args.pairs <= 500:
        raise BadInput("--pairs must be from 1 to 500")
    result = overhead.run(args.engine, args.pairs, args.window, args.clients, args.seed, say, "below_watched")
    told = {name: value for name, value in result.items() if value is not None and "probe_" not in name}
    return print_figures(told, args.json, 24)
