"""Says when an incident is over, and when the expectation has moved by itself."""

from __future__ import annotations

from dataclasses import dataclass
from math import expm1

from latencyprism.records import Alert, Window
from latencyprism.sentinel.attendant import Attendant
from latencyprism.sentinel.replica_watch import ReplicaWatch


@dataclass(slots=True)
class _Incident:
    alert: str
    level: str
    onset_ns: int
    step: int
    worst: float
    alerts: int = 1


class IncidentWatch(Attendant):
    """A line ``recovered`` for each incident that ended, ``rebased`` where a lasting speed-up has become the
    norm. An incident that a detach cuts short gets no line."""

    name = "incidents"
    prompt = False

    def __init__(self) -> None:
        super().__init__()
        self._open: dict[ReplicaWatch, _Incident] = {}
        self._moved: dict[ReplicaWatch, float] = {}

    def attached(self, watch: ReplicaWatch) -> None:
        self._moved[watch] = watch.detector.moved

    def window(self, watch: ReplicaWatch, window: Window, alerts: list[Alert]) -> None:
        for alert in alerts:
            self._note(watch, alert)
        incident = self._open.get(watch)
        if incident is not None and not watch.detector.incident_open and window.steps:
            del self._open[watch]
            self._recovered(watch, incident, window)
        moved = watch.detector.moved
        shift, self._moved[watch] = moved - self._moved.get(watch, moved), moved
        if shift < 0.0:  # upwards somebody has acknowledged it, which is told
            percent = expm1(shift) * 100.0
            self.emit(
                "rebased", engine=watch.replica.engine, pid=watch.replica.engine_pid,
                step=watch.last_step.step if watch.last_step else None, shift=round(expm1(shift), 4),
            )  # fmt: skip
            self.say(
                f"{watch.replica.engine} {watch.replica.engine_pid}: expectations moved by {percent:+.1f} %"
            )

    def _note(self, watch: ReplicaWatch, alert: Alert) -> None:
        if alert.kind not in ("shift", "stall"):
            return
        incident = self._open.get(watch)
        if incident is None:
            self._open[watch] = _Incident(alert.id, alert.level, watch.onset_ns, alert.step, alert.excess)
            return
        incident.alerts += 1
        incident.worst = max(incident.worst, alert.excess)
        if alert.level == "page":
            incident.level = "page"

    def _recovered(self, watch: ReplicaWatch, incident: _Incident, window: Window) -> None:
        last = window.steps[-1]
        seconds = (last.end_ns - incident.onset_ns) / 1e9
        self.emit(
            "recovered", engine=last.engine, pid=watch.replica.engine_pid, alert=incident.alert,
            level=incident.level, step=last.step, seconds=round(seconds, 3), alerts=incident.alerts,
            worst_excess=round(incident.worst, 4), detectable=watch.detector.detectable(),
        )  # fmt: skip
        self.say(f"{last.engine} {watch.replica.engine_pid}: recovered after {seconds:.1f} s")

    def detached(self, watch: ReplicaWatch) -> None:
        self._open.pop(watch, None)
        self._moved.pop(watch, None)
