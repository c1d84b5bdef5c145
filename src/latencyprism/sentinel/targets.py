"""From a replica to a source of steps: claim it, attach to it, and say what could not be had."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from latencyprism.agent.session import BUDGET_PPM
from latencyprism.engines.discovery import Replica
from latencyprism.engines.unknown import no_pack_fits
from latencyprism.records import StepSource
from latencyprism.sentinel.claim import Claim
from latencyprism.sentinel.priority import OnTime
from latencyprism.timeline.generic_source import GenericSource
from latencyprism.timeline.python_source import PythonSource


@dataclass
class Attachment:
    """A replica that is ours to watch. ``close`` detaches from every process and gives it free."""

    replica: Replica
    source: StepSource
    claims: list[Claim]
    warning: str | None

    def alive(self) -> bool:
        return all(member.process.identity.alive() for member in self.replica.members if member.role != "api")

    def close(self) -> None:
        try:
            self.source.close()
        finally:
            for claim in self.claims:
                claim.close()


def attach(
    replica: Replica, say: Callable[[str], None] = lambda text: None, *, realtime: bool = True,
    budget_ppm: int = BUDGET_PPM,
) -> Attachment:  # fmt: skip
    """TargetRefused, with everything undone, if it is watched already or cannot be attached to.

    An engine that no pack knows is searched first, for up to ten seconds; ``say`` is told so.
    ``realtime``: be on time in that beside engines that spin. ``budget_ppm``: see ``PythonSource``."""
    claims: list[Claim] = []
    try:
        probed = (member for member in replica.members if member.role != "api")
        claims.extend(Claim(member.process.identity) for member in probed)
        source: StepSource
        warning = None
        if replica.engine == "llama.cpp":
            from latencyprism.engines.llama_cpp.source import LlamaSource

            source = LlamaSource(replica.engine_pid, first_replica=replica.number)
        elif no_pack_fits(replica):
            with OnTime(realtime):
                generic = GenericSource(replica, say)
            source, warning = generic, generic.warning
        else:
            python = PythonSource(replica, budget_ppm=budget_ppm)
            source, warning = python, python.warning
        return Attachment(replica, source, claims, warning)
    except BaseException:
        for claim in claims:
            claim.close()
        raise
