"""Measure getting in and out: of every interpreter found, of a live engine, with a tracer that is killed."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from latencyprism.cli.results import say
from latencyprism.errors import BadInput

NAME = "bench attach"
HELP = "attach and detach again and again: on each interpreter, on an engine, with the tracer killed"
# What a person wants to see first, and in which order.
_COLUMNS = (
    ("crashes", "crashes"),
    ("hangs", "hangs"),
    ("wrong", "wrong results"),
    ("leftovers", "leftovers"),
    ("held_us_p50", "held p50 us"),
    ("held_us_p99", "held p99 us"),
    ("target_gap_ratio", "gap ratio"),
    ("cycles", "cycles"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cycles", type=int, default=200, help="attach-detach cycles (default 200)")
    parser.add_argument(
        "--python", action="append", metavar="PATH", help="an interpreter to try (repeat; default: all found)"
    )
    parser.add_argument("--engine", choices=("vllm", "transformers"), help="a live engine under load instead")
    parser.add_argument("--kill", type=int, metavar="N", help="kill the tracer N times instead, on each path")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of death (default 0)")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(args: argparse.Namespace) -> int:
    for name in ("cycles", "kill"):
        value = getattr(args, name)
        if value is not None and not 1 <= value <= 100_000:
            raise BadInput(f"--{name} must be from 1 to 100000")
    if args.engine:
        from latencyprism.bench import attach_engine

        result = attach_engine.run(args.engine, args.cycles, say)
    elif args.kill:
        result = {"killed": _kill(args)}
    else:
        from latencyprism.bench import attaching

        result = {"versions": attaching.run_versions(_pythons(args.python), args.cycles, say)}
    if args.json:
        print(json.dumps(result))
    else:
        _print(result)
    return 0


def _pythons(named: list[str] | None) -> dict[str, str]:
    from latencyprism.bench.attaching import find_pythons, version_of

    return {version_of(path): path for path in named} if named else find_pythons()


def _kill(args: argparse.Namespace) -> dict[str, Any]:
    from latencyprism.bench import attach_kill

    found: dict[str, Any] = {}
    pythons = _pythons(args.python or [sys.executable])
    for version, python in pythons.items():
        for idle in (False, True):
            say(f"Python {version}, the main thread {'waits' if idle else 'is at work'}")
            found.setdefault(version, []).append(
                attach_kill.run(python, args.kill, args.seed, idle=idle, say=say)
            )
    return found


def _print(result: dict[str, Any]) -> None:
    if "versions" in result:
        _print_versions(result["versions"])
    elif "killed" in result:
        for version, paths in result["killed"].items():
            for path in paths:
                died = ", ".join(f"{count} {stage}" for stage, count in path["died"].items())
                print(f"Python {version}, {path['path']}: killed {path['kills']} times, the target survived "
                      f"{path['survived']}, wrong results {_plain(path['wrong'])}")  # fmt: skip
                print(f"  the tracer died: {died}")
    else:
        for name, value in result.items():
            print(f"{name:22} {_plain(value)}")


def _print_versions(versions: dict[str, dict[str, Any]]) -> None:
    print(f"{'Python':10}" + "".join(f"{title:>15}" for _, title in _COLUMNS))
    for version, row in versions.items():
        if "error" in row:
            print(f"{version:10} {row['error']}")
            continue
        print(f"{row['python']:10}" + "".join(f"{_plain(row[key]):>15}" for key, _ in _COLUMNS))
        for thing in row["left"]:
            print(f"{'':10} left: {thing}")
        for why, count in row["refused"].items():
            print(f"{'':10} refused {count} times: {why}")
    print("held: how long the main thread stood still; gap ratio: its longest pause in windows with a cycle")
    print(
        "over that in windows of the same length without one. 3.14 and later are not stopped while at work."
    )


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(one)}" for key, one in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(_plain, value)) or "none"
    return "unknown" if value is None else str(value)
