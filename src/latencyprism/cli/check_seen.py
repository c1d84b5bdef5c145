"""What of an engine will be seen and what will not, in words: from its processes, its pack, this kernel."""

from __future__ import annotations

from typing import Any

from latencyprism.engines.discovery import Replica
from latencyprism.engines.packs import Pack, load_pack
from latencyprism.engines.unknown import no_pack_fits

NATIVE = "llama.cpp"
# Of this kernel's conditions, those without which kernel probes see nothing; the others are for captures.
NATIVE_NEEDS = frozenset({"architecture", "bpf(2) allowed", "uprobes on a process", "kernel lockdown"})
_FOR_SCHEDULING = ("kernel type information", "scheduler tracing, structure offsets right", "pid namespace")


def seen_of(replica: Replica, met: bool, kernel: list[dict[str, Any]]) -> dict[str, list[str]]:
    """``seen`` and ``not_seen``; ``met``: whether the engine's conditions are."""
    if not met:
        return {"seen": [], "not_seen": ["anything, until the conditions marked NOT are met"]}
    if replica.engine == NATIVE:
        seen = ["every micro-batch: when, how long, its tokens, sequences and phase"]
        missing = ["single requests", "what happens on an accelerator inside a call"]
    elif no_pack_fits(replica):
        seen = ["iterations: when and how long, once their function is found"]
        missing = ["what they are made of (requests, tokens)", "single requests"]
    else:
        seen, missing = _by_pack(replica, load_pack(replica.engine))
    lacking = [one["name"] for one in kernel if one["name"] in _FOR_SCHEDULING and not one["ok"]]
    if lacking:
        missing.append(f"scheduler events in a capture ({', '.join(lacking)}: see below)")
    else:
        seen.append("in a capture: which threads ran, waited and were woken")
    return {"seen": seen, "not_seen": [*missing, "prompts, tokens and outputs: never read"]}


def _by_pack(replica: Replica, pack: Pack) -> tuple[list[str], list[str]]:
    entry = pack.choose(replica.version)[0]
    roles = [part for member in replica.members for part in member.role.split("+")]
    seen = ["every batch: when, how long, its requests and tokens, prompt and decode"]
    if not pack.untold:
        seen[0] += ", queue and cache"
    missing = []
    if "worker" in roles:
        seen.append(f"the model's execution in each worker ({roles.count('worker')})")
    elif "execute" in entry.hooks:  # elsewhere the engine process runs the model itself
        missing.append("the model's execution: no worker of it was found")
    if "preempt" not in entry.hooks and "update" in entry.hooks:
        missing.append(f"preemptions (not told by {replica.engine} of this version)")
    if "receive" in entry.hooks:
        if "api" in roles:
            seen.append("each request as its client was served: arrival, first token, intervals, finish")
        else:
            missing.append("requests as their clients were served: no API process of it was found")
    deep = sum(len(entry.deep.get(role, ())) for role in set(roles))
    if deep:
        seen.append(f"in a capture: calls of up to {deep} functions of it")
    return seen, [*missing, *pack.untold]
