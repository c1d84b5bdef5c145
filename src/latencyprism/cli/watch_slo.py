"""Options of ``watch`` that bring objectives and the guard along."""

from __future__ import annotations

import argparse
from pathlib import Path

from latencyprism.errors import BadInput
from latencyprism.sentinel.attendant import Attendant
from latencyprism.sentinel.guard_watch import ACTIONS, GuardOptions, GuardWatch
from latencyprism.sentinel.slo_watch import SloWatch
from latencyprism.slo.objectives import read_objectives


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--slo", type=Path, metavar="FILE", help="objectives (TOML): budgets, burn, forecast")
    parser.add_argument(
        "--guard", metavar="ACTION,..", type=_actions,
        help="act where objectives are missed: " + ", ".join(ACTIONS) + " (default: none)",
    )  # fmt: skip
    parser.add_argument(
        "--guard-port", type=int, metavar="PORT", default=0, help="of /ready and /metrics on 127.0.0.1"
    )
    parser.add_argument(
        "--neighbour", type=Path, action="append", metavar="DIR",
        help="control group that --guard shield may confine; repeat",
    )  # fmt: skip
    parser.add_argument(
        "--dry-run", action="store_true", help="the guard tells what it would do, and does not"
    )


def attendants(args: argparse.Namespace) -> list[Attendant]:
    if args.slo is None:
        if args.guard or args.neighbour or args.guard_port or args.dry_run:
            raise BadInput("the guard needs objectives", remedy="give a file of them with --slo")
        return []
    slo = SloWatch(read_objectives(args.slo))
    if not args.guard:
        if args.neighbour or args.guard_port or args.dry_run:
            raise BadInput("no guard was asked for", remedy="say which actions with --guard")
        return [slo]
    if not 0 <= args.guard_port < 65536:
        raise BadInput("--guard-port must be from 1 to 65535")
    if args.neighbour and "shield" not in args.guard:
        raise BadInput("--neighbour is for --guard shield")
    groups = tuple(args.neighbour or ())
    return [slo, GuardWatch(slo, GuardOptions(args.guard, args.guard_port, groups, args.dry_run))]


def _actions(text: str) -> frozenset[str]:
    found = frozenset(part.strip() for part in text.split(","))
    if not found or not found <= set(ACTIONS):
        raise argparse.ArgumentTypeError(f"actions are {', '.join(ACTIONS)}, separated by commas")
    return found
