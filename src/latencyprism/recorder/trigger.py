"""When a capture is worth its disk: one per incident, and not too many an hour."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from latencyprism.records import Alert


@dataclass(frozen=True, slots=True)
class Decision:
    """``capture`` says whether to write one; ``reason`` why, in words. ``incident`` is the id of the
    alert that began it; the stretch to write is ``since_ns`` to ``until_ns`` (CLOCK_MONOTONIC)."""

    capture: bool
    reason: str
    incident: str
    since_ns: int
    until_ns: int


@dataclass(slots=True)
class WhenToCapture:
    """On an alert, unless it belongs to an incident already captured or the hourly allowance is spent.

    Alerts of one replica belong to one incident while less than ``quiet_s`` lies between them, or while
    they name the same onset step. ``before_s`` and ``after_s`` frame the capture; ``levels`` are the
    alert levels that count.
    """

    before_s: float = 20.0
    after_s: float = 5.0
    quiet_s: float = 60.0
    per_hour: int = 20
    levels: tuple[str, ...] = ("evidence", "page")
    skipped: int = 0
    _open: dict[tuple[str, int], tuple[str, int, int, bool]] = field(default_factory=dict)
    _taken_ns: deque[int] = field(default_factory=deque)

    def on_alert(self, alert: Alert, now_ns: int) -> Decision:
        """Decide, and remember the decision. ``now_ns`` is CLOCK_MONOTONIC."""
        key = (alert.engine, alert.replica)
        known = self._open.get(key)
        same = known is not None and (now_ns - known[1] < self.quiet_s * 1e9 or known[2] == alert.onset_step)
        if known is not None and same:
            incident, captured = known[0], known[3]
        else:
            incident, captured = alert.id, False
        refusal = self._refusal(alert, incident, captured, now_ns)
        self._open[key] = (incident, now_ns, alert.onset_step, captured or not refusal)
        if refusal:
            self.skipped += 1
        else:
            self._taken_ns.append(now_ns)
        return Decision(
            capture=not refusal,
            reason=refusal or f"first {alert.kind} alert of incident {incident}",
            incident=incident,
            since_ns=now_ns - int(self.before_s * 1e9),
            until_ns=now_ns + int(self.after_s * 1e9),
        )

    def _refusal(self, alert: Alert, incident: str, captured: bool, now_ns: int) -> str:
        if alert.level not in self.levels:
            return f"level {alert.level} is not captured"
        if captured:
            return f"incident {incident} is captured already"
        while self._taken_ns and now_ns - self._taken_ns[0] > 3600 * 10**9:
            self._taken_ns.popleft()
        if len(self._taken_ns) >= self.per_hour:
            return f"{self.per_hour} captures were written within the hour"
        return ""
