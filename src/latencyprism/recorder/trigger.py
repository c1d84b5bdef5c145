"""When a capture is worth its disk: one per incident, and not too many an hour, whoever asks for it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from latencyprism.records import Alert

KINDS = ("alert", "slo", "webhook", "signal", "file", "http", "schedule")
PER_HOUR = {"webhook": 12, "signal": 30, "file": 30, "http": 30, "schedule": 60}
"""How many captures each kind may ask for; alerts have limits by their level."""
_QUIET_S = {"webhook": 300.0}


@dataclass(frozen=True, slots=True)
class Asked:
    """Somebody other than a detector wants a capture: ``kind`` one of ``KINDS``, ``reason`` in words.
    ``incident``: what belongs together by the name the asker has for it; None: each is its own."""

    kind: str
    reason: str
    incident: str | None = None


@dataclass(frozen=True, slots=True)
class Occasion:
    """One reason to capture ``who`` (engine, replica). Occasions of the same ``incident`` belong together;
    None: all of one replica do while less than the quiet time lies between them."""

    kind: str
    who: tuple[str, int]
    identity: str
    reason: str
    incident: str | None = None
    level: str | None = None
    onset_step: int | None = None

    @staticmethod
    def of_alert(alert: Alert) -> Occasion:
        kind = "slo" if alert.kind == "slo" else "alert"
        who = (alert.engine, alert.replica)
        return Occasion(
            kind, who, alert.id, f"{alert.kind} alert", level=alert.level, onset_step=alert.onset_step
        )

    @staticmethod
    def of_asked(asked: Asked, who: tuple[str, int], identity: str) -> Occasion:
        return Occasion(asked.kind, who, identity, asked.reason, asked.incident or identity)


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
class _Open:
    identity: str
    last_ns: int
    onset_step: int | None
    captured: bool


@dataclass(slots=True)
class WhenToCapture:
    """On an occasion, unless it belongs to an incident already captured or the hourly allowance is spent.

    Alerts of one replica belong to one incident while less than ``quiet_s`` lies between them, or while
    they name the same onset step. ``before_s`` and ``after_s`` frame the capture; ``levels`` are the
    alert levels that count. Captures of two incidents begin at least ``apart_s`` from each other.
    """

    before_s: float = 20.0
    after_s: float = 5.0
    quiet_s: float = 60.0
    per_hour: int = 20
    apart_s: float = 0.0
    levels: tuple[str, ...] = ("evidence", "page")
    skipped: int = 0
    _open: dict[tuple[str, int, str | None], _Open] = field(default_factory=dict)
    _taken_ns: deque[int] = field(default_factory=deque)

    @staticmethod
    def for_kind(kind: str) -> WhenToCapture:
        """For those who ask: ``kind`` but alert and slo."""
        return WhenToCapture(quiet_s=_QUIET_S.get(kind, 0.0), per_hour=PER_HOUR[kind])

    def on_alert(self, alert: Alert, now_ns: int) -> Decision:
        """Decide, and remember the decision. ``now_ns`` is CLOCK_MONOTONIC."""
        return self.decide(Occasion.of_alert(alert), now_ns)

    def decide(self, occasion: Occasion, now_ns: int) -> Decision:
        """Decide, and remember the decision. ``now_ns`` is CLOCK_MONOTONIC."""
        key = (*occasion.who, occasion.incident)
        known = self._open.get(key)
        if known is None or not self._continues(known, occasion, now_ns):
            known = _Open(occasion.identity, now_ns, occasion.onset_step, captured=False)
        refusal = self._refusal(occasion, known, now_ns)
        self._remember(key, _Open(known.identity, now_ns, occasion.onset_step, known.captured or not refusal))
        if refusal:
            self.skipped += 1
        else:
            self._taken_ns.append(now_ns)
        return Decision(
            capture=not refusal,
            reason=refusal or f"first {occasion.reason} of incident {known.identity}",
            incident=known.identity,
            since_ns=now_ns - int(self.before_s * 1e9),
            until_ns=now_ns + int(self.after_s * 1e9),
        )

    def captured_lately(self, who: tuple[str, int], now_ns: int) -> str | None:
        """The incident of ``who`` that goes on and has its capture, if any."""
        known = self._open.get((*who, None))
        goes_on = known is not None and known.captured and now_ns - known.last_ns < self.quiet_s * 1e9
        return known.identity if known is not None and goes_on else None

    def _continues(self, known: _Open, occasion: Occasion, now_ns: int) -> bool:
        quiet = now_ns - known.last_ns >= self.quiet_s * 1e9
        same_onset = occasion.onset_step is not None and known.onset_step == occasion.onset_step
        return not quiet or same_onset

    def _remember(self, key: tuple[str, int, str | None], now: _Open) -> None:
        """Names of incidents come from outside: only so many are kept."""
        self._open.pop(key, None)
        self._open[key] = now
        while len(self._open) > 1000:
            del self._open[next(iter(self._open))]

    def _refusal(self, occasion: Occasion, known: _Open, now_ns: int) -> str:
        if occasion.level is not None and occasion.level not in self.levels:
            return f"level {occasion.level} is not captured"
        if known.captured:
            return f"incident {known.identity} is captured already"
        while self._taken_ns and now_ns - self._taken_ns[0] > 3600 * 10**9:
            self._taken_ns.popleft()
        if len(self._taken_ns) >= self.per_hour:
            return f"{self.per_hour} captures were written within the hour"
        if self._taken_ns and now_ns - self._taken_ns[-1] < self.apart_s * 1e9:
            return f"the last capture was begun less than {self.apart_s:.0f} s before"
        return ""
