"""What goes along with a watch: objectives, triggers, guard, memory; the seam that wires them in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from latencyprism.agent.session import BUDGET_PPM
from latencyprism.recorder.trigger import Asked
from latencyprism.records import Alert, Window
from latencyprism.sentinel.replica_watch import ReplicaWatch


@dataclass(frozen=True, slots=True)
class Raised:
    """What an attendant asks the watch for: to emit ``alert``, and to begin a capture for the reason that
    ``capture`` gives. Either may be None."""

    watch: ReplicaWatch
    alert: Alert | None = None
    capture: Asked | None = None


class Attendant:
    """Every method is called from the watch's only thread and must return within about a millisecond: an
    alert may be waiting. Files and networks are for threads or processes of the attendant's own. Whatever a
    method raises ends the attendant, not the watch; ``close`` is still called."""

    name = "attendant"
    prompt = True
    """Whether it must see each step as soon as it ends; else steps come a few at a time, which is cheaper."""
    budget_ppm = BUDGET_PPM
    """What the probes must be allowed to cost, parts per million of the step time, so that it sees what it
    lives on."""

    def __init__(self) -> None:
        self.emit: Callable[..., None] = lambda kind, **values: None
        """Writes an event line of the watch's JSON output: ``emit("forecast", share=0.1)``."""
        self.say: Callable[[str], None] = lambda text: None
        """Tells a person a sentence."""

    def attached(self, watch: ReplicaWatch) -> None:
        """After attach or re-attach."""

    def window(self, watch: ReplicaWatch, window: Window, alerts: list[Alert]) -> None:
        """What a poll brought, judged and recorded already; not called for an empty one."""

    def alert(self, watch: ReplicaWatch, alert: Alert) -> None:
        """An alert was emitted, also one of another attendant."""

    def tick(self, now_ns: int) -> Sequence[Raised]:
        """Five times a second (CLOCK_MONOTONIC). What shall be emitted or captured."""
        return ()

    def detached(self, watch: ReplicaWatch) -> None:
        """The probes are gone already; ``watch`` still has its recorder and detector."""

    def close(self) -> None:
        """The watch ends."""


class Attendants:
    """Calls each of them; one that fails is left out from then on, and said."""

    def __init__(
        self, members: Sequence[Attendant], emit: Callable[..., Any], say: Callable[[str], None]
    ) -> None:
        self._all = list(members)
        self._live = list(members)
        self._emit = emit
        self._say = say
        for member in members:
            member.emit, member.say = emit, say

    def __bool__(self) -> bool:
        return bool(self._live)

    @property
    def prompt(self) -> bool:
        return any(member.prompt for member in self._live)

    @property
    def budget_ppm(self) -> int:
        return max((member.budget_ppm for member in self._live), default=BUDGET_PPM)

    def _call(self, method: str, *args: Any) -> list[Any]:
        found = []
        for member in list(self._live):
            try:
                found.append(getattr(member, method)(*args))
            except BrokenPipeError:
                raise
            except Exception as error:  # noqa: BLE001 (the watch must outlive what goes along with it)
                self._live.remove(member)
                text = f"{member.name} failed and is left out: {type(error).__name__}: {error}"
                self._say(text)
                self._emit("notice", text=text)
        return found

    def attached(self, watch: ReplicaWatch) -> None:
        self._call("attached", watch)

    def window(self, watch: ReplicaWatch, window: Window, alerts: list[Alert]) -> None:
        if window.steps or window.requests or window.spans:
            self._call("window", watch, window, alerts)

    def alert(self, watch: ReplicaWatch, alert: Alert) -> None:
        self._call("alert", watch, alert)

    def tick(self, now_ns: int) -> list[Raised]:
        return [raised for some in self._call("tick", now_ns) for raised in some]

    def detached(self, watch: ReplicaWatch) -> None:
        self._call("detached", watch)

    def close(self) -> None:
        self._live = self._all
        self._call("close")
        self._live = []
