"""Captures of a watch: which alert is worth one, those under way, and what is told of them."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from latencyprism.errors import PrismError
from latencyprism.recorder.trigger import PER_HOUR as ASKED_PER_HOUR
from latencyprism.recorder.trigger import Asked, Occasion, WhenToCapture
from latencyprism.records import Alert
from latencyprism.sentinel.incident_capture import LEAVE_S, IncidentCapture
from latencyprism.sentinel.replica_watch import ReplicaWatch
from latencyprism.sentinel.sinks import JsonLines

INCIDENT_QUIET_S = 10.0
PER_HOUR = {"evidence": 6, "page": 30}
APART_S = {"evidence": 300.0, "page": 0.0}
"""A restless machine gives evidence every few seconds; that must not spend the hour's captures at once."""
EVIDENCE_AFTER_STEPS = 500
LEAST_S = 1.0


class Captures:
    """``folder`` None: nothing is written. ``written`` are the paths of those that are whole."""

    def __init__(
        self, folder: Path | None, levels: tuple[str, ...], out: JsonLines,
        say: Callable[[str], None], on_verdict: Callable[[IncidentCapture], None], *, deep: bool,
    ) -> None:  # fmt: skip
        self.folder = folder
        self.written: list[str] = []
        self.under_way: list[IncidentCapture] = []
        self._out = out
        self._say = say
        self._on_verdict = on_verdict
        self._deep = deep
        # A page is captured even where evidence of the same trouble was captured before.
        self._triggers = {
            level: WhenToCapture(
                levels=(level,), quiet_s=INCIDENT_QUIET_S, per_hour=PER_HOUR[level], apart_s=APART_S[level]
            )
            for level in levels
        }
        self._when_asked = {kind: WhenToCapture.for_kind(kind) for kind in ASKED_PER_HOUR}

    def choose(self, watch: ReplicaWatch, alert: Alert, now_ns: int) -> bool:
        """Sets ``alert.capture``; True if that capture is to be begun. A page is always worth a capture;
        evidence only once the expectation has something to stand on."""
        if self.folder is None:
            return False
        trigger = self._triggers.get(alert.level)
        young = alert.level == "evidence" and watch.counts.steps < EVIDENCE_AFTER_STEPS
        if trigger is not None and not young and trigger.on_alert(alert, now_ns).capture:
            alert.capture = str(self.folder / f"{alert.id}.pftrace")
            return True
        open_one = next((c for c in self.under_way if c.watch is watch and c.open), None)
        alert.capture = str(open_one.path) if open_one else None
        return False

    def begin(self, watch: ReplicaWatch, alert: Alert) -> None:
        """The one that ``choose`` named."""
        assert alert.capture is not None
        kind = "slo" if alert.kind == "slo" else "alert"
        self._begin(watch, alert, Path(alert.capture), {"trigger": {"kind": kind, "reason": alert.kind}})

    def begin_for(self, watch: ReplicaWatch, asked: Asked) -> Path | None:
        """One that no alert asked for, where it is worth one: its path. Says which, and why not."""
        identity = secrets.token_hex(8)
        refused = self._refusal(watch, asked, identity)
        path = None if refused or self.folder is None else self.folder / f"{identity}.pftrace"
        trigger = {"kind": asked.kind, "reason": asked.reason, "incident": asked.incident}
        if path is not None and not self._begin(watch, None, path, {"trigger": trigger}):
            path, refused = None, "it could not be begun"
        self._out.event(
            "asked", kind=asked.kind, reason=asked.reason, engine=watch.replica.engine,
            pid=watch.replica.engine_pid, capture=None if path is None else str(path),
            refused=refused or None,
        )  # fmt: skip
        return path

    def _refusal(self, watch: ReplicaWatch, asked: Asked, identity: str) -> str:
        """Why there is to be none, in words; empty: there is."""
        if self.folder is None:
            return "this watch writes no captures"
        under_way = next((c for c in self.under_way if c.watch is watch), None)
        if under_way is not None:
            return f"{under_way.path} is under way"
        who, now_ns = (watch.replica.engine, watch.replica.number), time.monotonic_ns()
        if asked.kind == "webhook":
            for trigger in self._triggers.values():
                incident = trigger.captured_lately(who, now_ns)
                if incident is not None:
                    return f"it belongs to incident {incident}, which is captured"
        decision = self._when_asked[asked.kind].decide(Occasion.of_asked(asked, who, identity), now_ns)
        return "" if decision.capture else decision.reason

    def _begin(self, watch: ReplicaWatch, alert: Alert | None, path: Path, meta: dict[str, object]) -> bool:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            kernels = alert is None or alert.level == "page"
            self.under_way.append(
                IncidentCapture(watch, alert, path, deep=self._deep, meta=meta, kernels=kernels)
            )
        except (PrismError, OSError) as error:
            self._say(f"no capture: {error}")
            return False
        return True

    def add_alert(self, watch: ReplicaWatch, alert: Alert) -> None:
        """A further alert of an incident that is being captured."""
        for capture in self.under_way:
            if capture.watch is watch and capture.open:
                capture.add_alert(alert)

    def advance(self) -> None:
        """Call often: each moves on by some milliseconds at most."""
        now_ns = time.monotonic_ns()
        for capture in list(self.under_way):
            known, told = capture.verdict, len(capture.early)
            capture.step(now_ns)
            for verdict in capture.early[told:]:
                self._say_verdict(capture, verdict, final=False)
            if capture.verdict is not None and known is None:
                self._say_verdict(capture)
            if capture.result is not None:
                self.under_way.remove(capture)
                self._finished(capture)

    def abandon(self, watch: ReplicaWatch) -> None:
        """The watch of this replica ends: write what there is. Waits."""
        until = time.monotonic() + LEAVE_S
        for capture in [c for c in self.under_way if c.watch is watch]:
            self.under_way.remove(capture)
            known = capture.verdict
            capture.abandon(max(LEAST_S, until - time.monotonic()))
            try:
                if capture.verdict is not None and known is None:
                    self._say_verdict(capture)
                self._finished(capture)
            except BrokenPipeError:
                self._say(f"capture written: {capture.path}")

    def _say_verdict(
        self, capture: IncidentCapture, early: dict[str, Any] | None = None, *, final: bool = True
    ) -> None:
        """As soon as it is known; the capture's own line follows when the file is whole."""
        verdict = early if early is not None else capture.verdict or {}
        identity = capture.alert.id if capture.alert else None
        after_s = round((time.monotonic_ns() - capture.begun_ns) / 1e9, 3)
        self._out.event(
            "verdict",
            alert=identity,
            capture=str(capture.path),
            final=final,
            after_s=after_s,
            verdict=verdict,
        )
        word = "verdict" if final else "first look"
        self._say(f"{word}: {verdict.get('cause')} (probability {verdict.get('probability', 0.0):.2f})")

    def _finished(self, capture: IncidentCapture) -> None:
        result = capture.result or {}
        self.written.append(str(capture.path))
        identity = capture.alert.id if capture.alert else None
        told = {name: value for name, value in result.items() if name not in ("event", "verdict")}
        if capture.verdict is None and result.get("verdict"):
            capture.verdict = result["verdict"]
            self._say_verdict(capture)
        self._out.event("capture", alert=identity, **told)
        self._on_verdict(capture)
