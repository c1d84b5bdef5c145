"""Tell a running watch to take the present level of an engine as normal: a slow-down that is known and wanted
(a new setting, a smaller machine) stops being an incident. Faster is taken over without being told."""

from __future__ import annotations

import argparse
import json
import time

from latencyprism.attach.process import Identity
from latencyprism.cli.options import add_json, add_pid
from latencyprism.engines.unknown import discover_any
from latencyprism.errors import PrismError, TargetRefused
from latencyprism.sentinel import acknowledge
from latencyprism.sentinel.claim import holder_of

NAME = "ack"
HELP = "take the present level of a watched engine as normal"
PATIENCE_S = 5.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_pid(parser, required=True, what="any process of the engine")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    done = []
    for replica in discover_any(args.pid):
        member = next(m for m in replica.members if m.pid == replica.engine_pid)
        identity = member.process.identity
        holder = holder_of(identity)
        if holder is None:
            raise TargetRefused(
                f"nothing to acknowledge for {replica.engine} {replica.engine_pid}",
                "no watch of this user holds it",
                "start latencyprism watch first; as the user who runs it",
            )
        acknowledge.ask(identity)
        shift = _wait(identity)
        if shift is None:
            acknowledge.withdraw(identity)
            raise PrismError(
                f"watcher {holder} did not answer within {PATIENCE_S:.0f} s", "it may be held up", "try again"
            )
        done.append({"pid": replica.engine_pid, "engine": replica.engine, "watcher": holder, "shift": shift})
    if args.json:
        print(json.dumps({"acknowledged": done}))
        return 0
    for entry in done:
        shift = float(str(entry["shift"]))
        print(f"{entry['engine']} {entry['pid']}: {shift * 100:+.1f} % is normal from now on")
    return 0


def _wait(identity: Identity) -> float | None:
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        shift = acknowledge.answered(identity)
        if shift is not None:
            return shift
        time.sleep(0.05)
    return None
