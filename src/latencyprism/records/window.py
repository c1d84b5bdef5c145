"""Window: what was seen in one stretch of time; what sources hand over, the flight recorder keeps and
diagnosis compares."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from latencyprism.records.request import Request
from latencyprism.records.span import Counter, Span
from latencyprism.records.step import Step
from latencyprism.records.usual import Usual


@dataclass(slots=True)
class Window:
    """Records in order of time within each list."""

    steps: list[Step] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    counters: list[Counter] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    """Those that ended, in order of their ends."""


class StepSource(Protocol):
    """A probe that turns one replica into steps. ``fileno`` becomes readable when there may be something
    to ``poll`` (None: poll on a timer). ``lost`` counts records known to have been lost."""

    @property
    def engine(self) -> str: ...

    @property
    def pids(self) -> tuple[int, ...]: ...

    @property
    def lost(self) -> int: ...

    def fileno(self) -> int | None: ...

    def poll(self) -> Window: ...

    def settle(self) -> bool:
        """Before sleeping on ``fileno``: True if it is safe to sleep, False if there is more to poll."""

    def wake_beyond(self, usual: Usual | None) -> None:
        """Make ``fileno`` readable only for a step that is longer than ``usual``; None: for every step. A
        source that cannot tell may go on as it did."""

    def wake_late(self, typical_1024: int, spare_ns: int) -> bool:
        """And when steps from now on are late by ``spare_ns`` together: each by what it lasts beyond so many
        1024ths of what makes it long, less where it is shorter, never below none. False: it cannot."""

    def renew(self) -> None:
        """Keep a probe that lives on a lease alive; call it twice a second."""

    def arm_deep(self, seconds: float) -> None:
        """Ask for deeper spans, where the source has any, for so long."""

    def detached(self) -> str | None:
        """Why the probe is no longer there ("expired", "detached", "over budget"); None while it is."""

    def notices(self) -> list[str]:
        """What the source has to say since the last call: what it cannot read, or no longer reads."""

    def close(self) -> None: ...
