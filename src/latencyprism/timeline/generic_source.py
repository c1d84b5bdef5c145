"""Steps of a Python engine that no pack knows: calls of the one function that marks an iteration."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from latencyprism.agent.session import ProbePlan, ProbeSession
from latencyprism.attach.inject import InjectReport
from latencyprism.attach.process import Identity
from latencyprism.engines.discovery import Replica
from latencyprism.records import Span, Step, Usual, Window, ring
from latencyprism.records.step import NULL
from latencyprism.timeline.anchor_search import Anchor, search, where

_AT = {name: index for index, name in enumerate(ring.STEP_WIRE)}
_found: dict[Identity, Anchor] = {}
"""What was found in a process stays true for as long as it runs: a watch that begins anew need not search."""


class GenericSource:
    """A ``records.StepSource`` over one function of one process; composition columns are null.

    Searches for the function (up to ten seconds) unless it is known from before. Raises TargetRefused when
    there is none, or when the process cannot be attached to. ``say`` gets a sentence when a search begins."""

    def __init__(self, replica: Replica, say: Callable[[str], None] = lambda text: None) -> None:
        self.engine = replica.engine
        self.replica = replica
        pid = replica.engine_pid
        self.pids: tuple[int, ...] = (pid,)
        member = next(member for member in replica.members if member.pid == pid)
        anchor = _found.get(member.process.identity)
        if anchor is None:
            say(f"process {pid}: searching for the function that marks an iteration")
            anchor = _found[member.process.identity] = search(pid, say=say)
        self.anchor = anchor
        self.warning = (
            f"generic mode: a step is one call of {anchor.name}, confidence {anchor.confidence:.2f} "
            f"({anchor.reasons[0]}); what is in a batch is not known"
        )
        hooks = {"anchor": where(anchor.function)}
        if anchor.witness is not None:
            hooks["witness"] = where(anchor.witness)
        self._session = ProbeSession(pid, ProbePlan("anchor", "engine", 0, hooks))
        self._only_if_long = False
        self._track = (f"{replica.roles().get(pid, 'engine')} {pid}",)

    # -- StepSource ------------------------------------------------------------------------------

    @property
    def lost(self) -> int:
        return self._session.ring.lost

    def fileno(self) -> int | None:
        return self._session.fileno()

    def poll(self) -> Window:
        window = Window()
        for record in self._session.read():
            if record.kind == ring.KIND_STEP:
                step = self._step(record.words)
                window.steps.append(step)
                window.spans.append(Span(self._track, self.anchor.function.name, step.start_ns, step.end_ns))
        return window

    def settle(self) -> bool:
        self._session.drain_wakes()
        return self._session.ask_to_be_woken(self._only_if_long)

    def wake_beyond(self, usual: Usual | None) -> None:
        self._only_if_long = usual is not None
        if usual is not None:
            self._session.call_long(*usual[:4])

    def wake_late(self, typical_1024: int, spare_ns: int) -> bool:
        self._session.call_late(typical_1024, spare_ns)
        return True

    def renew(self) -> None:
        self._session.renew()

    def arm_deep(self, seconds: float) -> None:
        """There is nothing deeper to arm."""

    def detached(self) -> str | None:
        if self._session.live:
            return None
        if self._session.over_budget:
            return "over budget"
        return "expired" if self._session.expired else "detached"

    def notices(self) -> list[str]:
        return self._session.notices()

    def close(self) -> None:
        self._session.close()

    # -- more than a StepSource ------------------------------------------------------------------

    def health(self) -> dict[int, dict[str, object]]:
        return {self.pids[0]: self._session.health()}

    def attach_reports(self) -> dict[int, InjectReport]:
        return {self.pids[0]: self._session.report}

    def _step(self, words: Sequence[int]) -> Step:
        gap, gc = words[_AT["gap_ns"]], words[_AT["gc_ns"]]
        return Step(
            engine=self.engine,
            replica=self.replica.number,
            rank=0,
            step=words[0],
            start_ns=words[1],
            end_ns=words[2],
            gap_ns=None if gap == NULL else gap,
            gc_ns=None if gc == NULL else gc,
        )
