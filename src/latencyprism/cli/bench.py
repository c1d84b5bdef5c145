"""Measure the tool itself on real engines (tiny random models, CPU), and its detector on recorded streams.

fidelity: records against the engine's own counters. overhead: paired windows with and without the watch, or
what the probe costs a step by its own clock. requests: request records against the client's own clock.
alert: delay from an anomalous step to the alert. quiet: false alarms in a long normal run with surges.
detect: graded faults on a recorded step log. attach: attach and detach again and again, on every interpreter.
bpf: the kernel probes themselves. attribution: are waits found in the right step, under the right reason?
diagnose: are injected causes named, and healthy runs left alone?
breakdown: do the parts of a step add up, and what stays unexplained? clocks: do stated error bounds hold?
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from latencyprism.cli import (
    bench_anchor,
    bench_attach,
    bench_below,
    bench_detect,
    bench_diagnose,
    bench_forecast,
    bench_guard,
    bench_timeline,
)
from latencyprism.cli.options import add_duration, duration_s
from latencyprism.cli.results import print_figures, say
from latencyprism.errors import BadInput
from latencyprism.host.session_weight import session_nice

NAME = "bench"
HELP = "measure fidelity, overhead, alert delay and detection"
ENGINES = ("vllm", "transformers", "llama.cpp")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_subparsers(metavar="WHAT", dest="what", required=True)
    _engine_bench(what, "fidelity", "records against the engine's own counters", seconds=60.0, clients=8)
    overhead = _engine_bench(what, "overhead", "paired windows with and without the watch", clients=8)
    overhead.add_argument("--pairs", type=int, default=30, help="pairs of windows (default 30)")
    overhead.add_argument(
        "--window", type=duration_s, default=3.0, metavar="TIME", help="length of a window (default 3s)"
    )
    overhead.add_argument(
        "--running", type=_counts, metavar="N,N,..",
        help="instead: the probe's own time a step at these numbers of running requests",
    )  # fmt: skip
    requests = _engine_bench(what, "requests", "request records against the client's own clock", clients=2)
    requests.add_argument("--requests", type=int, default=500, help="how many (default 500)")
    alert = _engine_bench(what, "alert", "delay from an anomalous step to the alert")
    alert.add_argument("--stops", type=int, default=30, help="stops of 50 ms (default 30)")
    quiet = _engine_bench(what, "quiet", "false alarms in a normal run with surges", seconds=600.0)
    quiet.add_argument(
        "--steps", type=Path, metavar="FILE", help="log every step as CSV into a new FILE, for replay"
    )
    for module in (bench_attach, bench_anchor, bench_detect, bench_diagnose, bench_forecast, bench_guard):
        single = what.add_parser(module.NAME.removeprefix("bench "), help=module.HELP)
        module.add_arguments(single)
        single.set_defaults(bench=module.run)
    bench_below.add_arguments(what)
    bench_timeline.add_arguments(what)


def _engine_bench(
    what: Any, name: str, text: str, *, seconds: float | None = None, clients: int | None = None
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = what.add_parser(name, help=text)
    parser.add_argument("--engine", choices=ENGINES, default="vllm", help="default: vllm")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn at random (default 0)")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    if seconds is not None:
        add_duration(parser, seconds, f"how long the load runs (default {seconds:.0f}s)")
    if clients is not None:
        parser.add_argument(
            "--clients", type=int, default=clients, help=f"clients of the load (default {clients})"
        )
    parser.set_defaults(bench=_on_engine)
    return parser


def run(args: argparse.Namespace) -> int:
    weight = session_nice()
    if weight is not None and weight > 0:
        say(f"note: this session's group has nice {weight}, and waits beside an engine in a session of its "
            f"own; `setsid latencyprism bench {args.what}` does not")  # fmt: skip
    code: int = args.bench(args)
    return code


def _counts(text: str) -> list[int]:
    try:
        counts = sorted({int(part) for part in text.split(",")})
    except ValueError:
        counts = []
    if not counts or not 1 <= counts[0] <= counts[-1] <= 1024:
        raise argparse.ArgumentTypeError("numbers from 1 to 1024, separated by commas")
    return counts


def _on_engine(args: argparse.Namespace) -> int:
    if args.what == "fidelity":
        from latencyprism.bench import fidelity

        result = fidelity.run(args.engine, args.duration, args.clients, say)
    elif args.what == "requests":
        from latencyprism.bench import requests

        if not 1 <= args.requests <= 100_000:
            raise BadInput("--requests must be from 1 to 100000")
        result = requests.run(args.engine, args.requests, args.clients, args.seed, say)
    elif args.what == "overhead" and args.running:
        from latencyprism.bench import probe_cost

        result = probe_cost.run(args.engine, args.running, args.seed, say)
    elif args.what == "overhead":
        from latencyprism.bench import overhead

        if not 1 <= args.pairs <= 500:
            raise BadInput("--pairs must be from 1 to 500")
        result = overhead.run(args.engine, args.pairs, args.window, args.clients, args.seed, say)
    elif args.what == "alert":
        from latencyprism.bench import alerting

        result = alerting.run(args.engine, args.stops, args.seed, say)
    else:
        from latencyprism.bench import quiet

        result = quiet.run(args.engine, args.duration, args.steps, say)
    return print_figures(result, args.json, 28, _plain)


def _plain(value: Any) -> dict[str, Any]:
    """A record inside a result, as JSON knows it."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    raise TypeError(f"{type(value).__name__} is no JSON")
