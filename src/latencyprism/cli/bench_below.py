"""``bench bpf`` and ``bench attribution``: the probes below the interpreter, measured on targets of their own."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from latencyprism.cli.options import add_duration
from latencyprism.errors import BadInput

NAMES = ("bpf", "attribution")


def add_arguments(what: Any) -> None:
    """Adds both to ``bench``'s list."""
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
    for parser in (bpf, attribution):
        parser.add_argument("--json", action="store_true", help="one JSON object")


def _bpf(args: argparse.Namespace) -> int:
    from latencyprism.bench import bpf

    if not 1000 <= args.rate <= 10_000_000:
        raise BadInput("--rate must be from 1000 to 10000000")
    if not 0 <= args.kills <= 1000:
        raise BadInput("--kills must be from 0 to 1000")
    if args.duration > 60:
        raise BadInput("that is too long", "60s at most")
    return _print(bpf.run(args.duration, args.rate, args.kills, _say), args.json)


def _attribution(args: argparse.Namespace) -> int:
    from latencyprism.bench import attribution

    if not 1 <= args.rounds <= 500:
        raise BadInput("--rounds must be from 1 to 500")
    return _print(attribution.run(args.rounds, args.seed, _say), args.json)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _print(result: dict[str, Any], as_json: bool) -> int:
    if as_json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:24} {value}")
    return 0
