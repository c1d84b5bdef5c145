"""Remove the probe from a process (and from the other processes of its engine), whoever left it there."""

from __future__ import annotations

import argparse
import json
import sys

from latencyprism.agent.session import remove_probe
from latencyprism.cli.options import add_json, add_pid
from latencyprism.engines.unknown import discover_any
from latencyprism.sentinel.claim import holder_of

NAME = "detach"
HELP = "remove probes from an engine"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_pid(parser, required=True, what="any process of the engine")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    done = []
    for replica in discover_any(args.pid):
        for member in replica.members:
            if member.role == "api":
                continue
            holder = holder_of(member.process.identity)
            native = replica.engine == "llama.cpp"
            removed = None if native else remove_probe(member.pid)
            done.append({"pid": member.pid, "role": member.role, "watcher": holder, "removed": removed})
    if args.json:
        print(json.dumps({"processes": done}))
        return 0
    for entry in done:
        print(f"{entry['pid']}: {_words(entry)}", file=sys.stdout)
    return 0


def _words(entry: dict[str, object]) -> str:
    if entry["removed"] is None:
        if entry["watcher"]:
            return f"watched by process {entry['watcher']} through kernel probes: stop that process"
        return "nothing in it; kernel probes end with their watcher"
    return (
        "no probe is left in it"
        if entry["removed"]
        else "it did not answer: a probe in it ends with its lease"
    )
