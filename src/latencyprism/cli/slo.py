"""Objectives in a file: check what they say, or print rules for Prometheus that alert on them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from latencyprism.slo.objectives import read_objectives
from latencyprism.slo.rules import prometheus_rules
from latencyprism.slo.words import objective_words, span_words

NAME = "slo"
HELP = "check a file of objectives, or make Prometheus rules from it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("check", "rules"), help="what to do with the file")
    parser.add_argument("file", type=Path, metavar="FILE", help="objectives (TOML)")
    parser.add_argument("--json", action="store_true", help="check: one JSON object")


def run(args: argparse.Namespace) -> int:
    found = read_objectives(args.file)
    if args.what == "rules":
        print(prometheus_rules(found), end="")
        return 0
    rows = [
        {
            "objective": one.label, "limit_ms": one.limit_ns / 1e6, "share": one.share,
            "period_s": one.period_s, "model": one.model, "port": one.port, "route": one.route,
            "tenant": one.tenant,
            "windows": [window._asdict() for window in found.windows_of(one)],
        }
        for one in found.objectives
    ]  # fmt: skip
    if args.json:
        print(json.dumps({"objectives": rows}))
        return 0
    for one in found.objectives:
        print(f"{objective_words(one)}, budget {one.budget:.3%} of {span_words(one.period_s)}")
        for window in found.windows_of(one):
            spans = f"{span_words(window.long_s)} and {span_words(window.short_s)}"
            print(f"  {window.level}: burn rate above {window.burn:g} over {spans}")
    return 0
