"""``latencyprism inject --scenario FILE``: a schedule of disturbances, and the truth about it."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from latencyprism.errors import BadInput
from latencyprism.inject import scenario as scenarios
from latencyprism.inject.scenario import Played, Scenario
from latencyprism.inject.target import ancestors
from latencyprism.lab import serve
from latencyprism.lab.install import ENGINES
from latencyprism.lab.load import Load
from latencyprism.lab.profiles import profile

_WARM_S = 2.0


def run(args: argparse.Namespace) -> int:
    """0: everything took effect; 1: something did not, or was refused."""
    wanted = scenarios.read(Path(args.scenario))
    if wanted.engine is None and args.pid is None:
        raise BadInput("nobody to disturb", "the scenario starts no engine", "give -p PID")
    if wanted.engine is not None and wanted.engine not in ENGINES:
        raise BadInput(f"no engine {wanted.engine!r}", remedy=f"one of: {', '.join(ENGINES)}")
    if wanted.profile is not None and (wanted.engine is None or args.pid is not None):
        raise BadInput("cannot make that load", "load is made for an engine that the scenario starts")
    with ExitStack() as stack:
        if args.pid is not None or wanted.engine is None:
            pids, url, model = {"target": args.pid, "parent": _parent(args.pid)}, args.url, args.model
        else:
            server = stack.enter_context(serve.start(wanted.engine))
            pids, url, model = {"target": server.pid, "parent": server.main_pid}, server.url, server.model
            if wanted.profile is not None:
                load = profile(wanted.profile).but(duration_s=_WARM_S + wanted.duration_s)
                stack.enter_context(Load(server, load))
                time.sleep(_WARM_S)
        begun_ns, played = scenarios.play(wanted, pids, i_know=args.i_know, url=url, model=model, tell=_tell)
    if args.json:
        print(json.dumps(as_dict(wanted, begun_ns, played)))
    else:
        _print(wanted, begun_ns, played)
    return 0 if all(one.effect is not None and one.effect.effective for one in played) else 1


def _parent(pid: int) -> int:
    """Of the target; 0, which is refused, where that is one of ours."""
    above = ancestors(pid)
    own = {os.getpid(), *ancestors(os.getpid())}
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            data = file.read()
        parent = int(data[data.rfind(b")") + 1 :].split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return parent if parent in above and parent not in own else 0


def _tell(at_s: float, text: str) -> None:
    print(f"{at_s:7.1f} s  {text}", file=sys.stderr, flush=True)


def as_dict(wanted: Scenario, begun_ns: int, played: list[Played]) -> dict[str, Any]:
    """Times are CLOCK_MONOTONIC ns."""
    return {
        "scenario": wanted.name,
        "start_ns": begun_ns,
        "injected": [
            {
                "cause": one.act.cause,
                "pid": one.pid,
                "strength": one.act.strength,
                "refused": one.refused,
                "effective": one.effect.effective if one.effect is not None else False,
                "measured": one.effect.measured if one.effect is not None else None,
                "asked": one.effect.asked if one.effect is not None else None,
                "unit": one.effect.unit if one.effect is not None else None,
                "text": one.effect.text if one.effect is not None else None,
                "intervals": [interval._asdict() for interval in one.truth],
            }
            for one in played
        ],
        "expected": [
            {
                "start_ns": begun_ns + int(each.from_s * 1e9),
                "end_ns": begun_ns + int(each.to_s * 1e9),
                "causes": list(each.causes),
            }
            for each in wanted.expected
        ],
    }


def _print(wanted: Scenario, begun_ns: int, played: list[Played]) -> None:
    print(f"{wanted.name or 'scenario'}: {wanted.duration_s:g} s")
    for one in played:
        if one.effect is None:
            print(f"{one.act.cause} on {one.pid}: REFUSED: {one.refused}")
            continue
        word = "took effect" if one.effect.effective else "NO EFFECT"
        print(f"{one.act.cause} on {one.pid}: {word}: {one.effect.text}")
        for interval in one.truth:
            from_s, to_s = ((moment - begun_ns) / 1e9 for moment in (interval.start_ns, interval.end_ns))
            print(f"  from {from_s:7.3f} s to {to_s:7.3f} s  {interval.detail}")
    for each in wanted.expected:
        print(f"expected from {each.from_s:g} s to {each.to_s:g} s: {', '.join(each.causes)}")
