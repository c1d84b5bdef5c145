"""Forecast of SLO violations on a real engine under published arrivals, or on a simulated one."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from latencyprism.cli.options import add_duration
from latencyprism.cli.results import say
from latencyprism.errors import BadInput

NAME = "bench forecast"
HELP = "forecast of TTFT and TPOT violations under published arrivals"
TRACES = ("azure", "azure-code", "mooncake")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--engine", choices=("vllm", "transformers"), default="vllm", help="default: vllm")
    parser.add_argument(
        "--traces", type=Path, metavar="DIR", help="folder with the traces (default: synthetic arrivals)"
    )
    parser.add_argument("--trace", action="append", choices=TRACES, help="repeat; default azure, mooncake")
    add_duration(parser, 75.0, "of each trace (default 75s)")
    parser.add_argument(
        "--load", type=float, default=0.75, help="share of a closed loop's rate (default .75)"
    )
    parser.add_argument("--simulated", action="store_true", help="a simulated engine instead of a real one")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn at random (default 0)")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(args: argparse.Namespace) -> int:
    from latencyprism.bench import forecast
    from latencyprism.bench.traces import Arrival, read_trace, scaled, synthetic

    if not 0.1 <= args.load <= 2.0:
        raise BadInput("--load must be from .1 to 2")
    if not 10.0 <= args.duration <= 3600.0:
        raise BadInput("-d must be from 10 s to an hour")
    if args.trace and args.traces is None:
        raise BadInput("--trace needs the folder of the traces", remedy="give it with --traces")
    plans: dict[str, list[Arrival]] = {"synthetic": synthetic(4000, args.seed)}
    if args.traces is not None:
        plans = {name: read_trace(args.traces, name) for name in args.trace or ["azure", "mooncake"]}
    result: dict[str, Any]
    if args.simulated:
        result = {"engine": "simulated", "load": args.load, "traces": {}}
        for name, plan in plans.items():
            rate = forecast.simulated_rate(plan, args.load)
            arrivals = scaled(plan[: max(60, int(rate * args.duration))], rate, forecast.SCALE)
            result["traces"][name] = forecast.simulate(arrivals, args.seed, **forecast.SIMULATED)
    else:
        result = forecast.run(args.engine, plans, args.duration, args.load, args.seed, say)
    print(json.dumps(result) if args.json else "\n".join(_table(result)))
    return 1 if all("failed" in found for found in result["traces"].values()) else 0


def _table(result: dict[str, Any]) -> list[str]:
    told = []
    for name, found in result["traces"].items():
        if "failed" in found:
            told.append(f"{name}: {found['failed']}")
            continue
        told.append(f"{name}: {found['requests']} requests")
        for metric in ("ttft", "tpot"):
            one, ahead = found[metric], found[metric]["one_second_ahead"]
            gap = one["any_time_before"]["calibration"]
            if one["violated_share"] is None:
                told.append(f"  {metric}: no request was seen to end")
                continue
            missed = f"{metric} < {one['limit_ms']:.0f} ms, missed by {one['violated_share']:.0%}"
            right = f"one second ahead AUC {ahead['auc']} of {ahead['n']}"
            off = f"off by {gap['mean_gap']} points on average, {gap['worst_gap']} in the worst bin"
            told.append(f"  {missed}: {right}; {off}")
        told.append(f"  share within its interval: {found['share']['inside_interval']}")
    return told
