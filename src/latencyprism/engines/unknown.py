"""Python processes that no pack knows: each is taken for an engine, whose loop then has to be searched
for."""

from __future__ import annotations

from collections.abc import Iterable

from latencyprism.attach.interpreter import python_of
from latencyprism.attach.process import ProcessInfo, list_processes, read_process
from latencyprism.engines.discovery import Member, Replica, discover
from latencyprism.engines.packs import PYTHON_ENGINES, load_pack
from latencyprism.errors import TargetRefused

GENERIC = "python"
"""The name of an engine that has none."""


def discover_any(pid: int | None) -> list[Replica]:
    """As ``discover``, but a Python process that is part of no known engine is one of its own, named
    ``GENERIC``.

    TargetRefused as from ``discover``, also for a process that is no Python or cannot be attached to."""
    try:
        return discover(pid)
    except TargetRefused as unknown:
        if pid is None:
            raise
        process = read_process(pid)
        try:
            python_of(pid)
        except TargetRefused as refusal:
            raise unknown if refusal.what.endswith("is not Python") else refusal from None
        return [_alone(process)]


def successors(gone: Iterable[Replica]) -> list[Replica]:
    """Processes that may be engines without a name from ``gone``, started again."""
    nameless = [replica for replica in gone if replica.engine == GENERIC]
    if not nameless:
        return []
    found = (_alone(process) for process in list_processes() if process.cmdline)
    return [replica for replica in found if any(replica.succeeds(old) for old in nameless)]


def no_pack_fits(replica: Replica) -> bool:
    """True where steps can only be had the generic way: no pack, or none for this version."""
    if replica.engine == GENERIC:
        return True
    return replica.engine in PYTHON_ENGINES and not load_pack(replica.engine).covers(replica.version)


def _alone(process: ProcessInfo) -> Replica:
    return Replica(GENERIC, 0, (Member(process, "engine"),))
