"""Tell what is here and what can be seen: engines found, conditions met or not, and how to meet them.

With -p it looks at one process; nothing is attached and nothing in it is touched.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

from latencyprism.attach.permissions import Condition, process_conditions
from latencyprism.attach.permissions import conditions as attach_conditions
from latencyprism.bpf.features import conditions as bpf_conditions
from latencyprism.cli.check_host import host_of, print_host, print_surroundings, surroundings
from latencyprism.cli.check_seen import NATIVE, NATIVE_NEEDS, seen_of
from latencyprism.cli.options import add_pid
from latencyprism.engines.discovery import Replica
from latencyprism.engines.installed import in_words as how_it_compares
from latencyprism.engines.installed import missing_in
from latencyprism.engines.listing import in_words, pack_rows
from latencyprism.engines.packs import load_pack
from latencyprism.engines.unknown import GENERIC, discover_any, no_pack_fits
from latencyprism.errors import TargetRefused
from latencyprism.sentinel.claim import holder_of
from latencyprism.sentinel.known import known_of, state_folder

NAME = "check"
HELP = "say which engines are here and what can be seen of them"

_IN_GENERAL = "probe in the interpreter, on the one function that marks an iteration"
_SEARCH = (
    "a watch would first search, for up to 10 s and while requests are served, for the function that marks "
    "an iteration; its steps have times and no composition"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_pid(parser)
    parser.add_argument("--packs", action="store_true", help="list the probe packs and their version ranges")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(args: argparse.Namespace) -> int:
    if args.packs:
        return _packs(args.json)
    try:
        replicas = discover_any(args.pid)
    except TargetRefused:
        _tell_of_refused(args.pid, args.json)
        raise
    kernel = [_condition(c) for c in bpf_conditions()]
    report: dict[str, Any] = {
        "engines": [_describe(replica, kernel) for replica in replicas],
        "kernel": kernel,
        **surroundings(replicas),
    }
    if args.json:
        print(json.dumps(report))
    else:
        _print(report)
    met = all(c["ok"] for engine in report["engines"] for c in engine["conditions"])
    return 0 if met or args.pid is None else 3


def _tell_of_refused(pid: int | None, as_json: bool) -> None:
    """The conditions of a process that cannot be watched, where it is there at all."""
    conditions = [{"pid": pid, **_condition(c)} for c in attach_conditions(pid)] if pid else []
    if len(conditions) < 2:
        return
    if as_json:
        print(json.dumps({"engines": [], "process": {"pid": pid, "conditions": conditions}}))
    else:
        print(f"process {pid}:")
        _print_conditions(conditions)


def _describe(replica: Replica, kernel: list[dict[str, Any]]) -> dict[str, Any]:
    native = replica.engine == NATIVE
    generic = no_pack_fits(replica)
    conditions: list[dict[str, Any]] = []
    for member in replica.members:
        if native:
            conditions += [{"pid": member.pid, **_condition(c)} for c in process_conditions(member.pid)]
        elif member.role != "api":
            conditions += [{"pid": member.pid, **_condition(c)} for c in attach_conditions(member.pid)]
    if native:
        conditions += [one for one in kernel if one["name"] in NATIVE_NEEDS]
    return {
        "engine": replica.engine,
        "version": replica.version,
        "replica": replica.number,
        "processes": {str(pid): role for pid, role in replica.roles().items()},
        "watched_by": [h for m in replica.members if (h := holder_of(m.process.identity)) is not None],
        "attach": "kernel probes" if native else _IN_GENERAL if generic else "probe in the interpreter",
        "warning": None if native else _warning(replica),
        "conditions": conditions,
        **seen_of(replica, all(one["ok"] for one in conditions), kernel),
        "known": known_of(replica, state_folder()),
        "host": host_of(replica),
    }


def _warning(replica: Replica) -> str | None:
    if replica.engine == GENERIC:
        return f"no pack knows this process; {_SEARCH}"
    warning = load_pack(replica.engine).choose(replica.version)[1]
    if no_pack_fits(replica):
        return f"{warning}; {_SEARCH}"
    missing = missing_in(replica) if warning is not None else None
    return warning if missing is None else f"{warning}; {how_it_compares(missing)}"


def _condition(condition: Condition) -> dict[str, Any]:
    return asdict(condition)


def _print(report: dict[str, Any]) -> None:
    if not report["engines"]:
        print("No engine found. Looked for vLLM, SGLang, TGI, Transformers (serve --continuous-batching),")
        print(
            "llama.cpp; an engine of another user may be out of sight without that user's rights, or root's."
        )
    for engine in report["engines"]:
        who = ", ".join(f"{role} {pid}" for pid, role in engine["processes"].items())
        print(f"{engine['engine']} {engine['version'] or ''}".rstrip() + f": {who}")
        print(f"  seen through: {engine['attach']}")
        for holder in engine["watched_by"]:
            print(f"  watched already, by process {holder}")
        if engine["warning"]:
            print(f"  note: {engine['warning']}")
        _print_conditions(engine["conditions"])
        for thing in engine["seen"]:
            print(f"  will be seen: {thing}")
        for thing in engine["not_seen"]:
            print(f"  will not be seen: {thing}")
        _print_known(engine["known"])
        print_host(engine["host"])
    print("this machine and user:")
    _print_conditions(report["kernel"])
    print_surroundings(report)


def _print_known(known: dict[str, Any] | None) -> None:
    if known is None:
        print("  nothing was learned of it yet: what slow-down can be told is known after a watch")
        return
    told = known["detectable"]
    from_on = f"is told from {told['evidence']:.1%} on, and pages from {told['page']:.1%}"
    print(f"  learned from {known['steps']} steps: a slow-down of 50 steps {from_on}")


def _print_conditions(conditions: list[dict[str, Any]]) -> None:
    for condition in conditions:
        mark = "ok  " if condition["ok"] else "NOT "
        of = f" [{condition['pid']}]" if "pid" in condition else ""
        print(f"  {mark}{condition['name']}{of}: {condition['detail']}")
        if not condition["ok"] and condition["remedy"]:
            print(f"       remedy: {condition['remedy']}")


def _packs(as_json: bool) -> int:
    rows = pack_rows()
    if as_json:
        print(json.dumps({"packs": rows}))
    else:
        print("\n".join(map(in_words, rows)))
    return 0
