"""Python processes that no pack knows: each is taken for an engine, whose loop then has to be searched
for."""

from __future__ import annotations

from latencyprism.attach.interpreter import python_of
from latencyprism.attach.process import read_process
from latencyprism.engines.discovery import Member, Replica, discover
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
        return [Replica(GENERIC, 0, (Member(process, "engine"),))]
