"""From an alert to a capture file: arm deeper probes, wait, hand the records to a process of low priority."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from latencyprism.recorder.capture import Capture
from latencyprism.recorder.deferred import CaptureJob
from latencyprism.records import Alert
from latencyprism.sentinel.early_verdict import FIRST_S, NEXT_S, EarlyVerdict, reap
from latencyprism.sentinel.kernel_dive import KernelDive, Told
from latencyprism.sentinel.operator_dive import ENDING_S, OperatorDive
from latencyprism.sentinel.provenance import describe_watch
from latencyprism.sentinel.replica_watch import ReplicaWatch
from latencyprism.timeline.clocks import Timeline, read_machine_clocks
from latencyprism.timeline.device_time import with_busy

BEFORE_S, AFTER_S = 30.0, 5.0
DRAIN_PERIOD_NS = 250_000_000
DISARMED_NS = 300_000_000
"""After its end a deep window may take so long to be disarmed and copied."""
FINISH = "latencyprism.sentinel.finish:finish"
LEAVE_S = 20.0
"""When a watch ends, all captures under way together may take so long."""


class IncidentCapture:
    """One capture under way. ``step`` moves it on; ``result`` is set when the file is written or given up.
    ``kernels``: those of devices, too, where the watch records any and looks deep."""

    def __init__(
        self, watch: ReplicaWatch, alert: Alert | None, path: Path, *,
        after_s: float = AFTER_S, deep: bool = True, meta: dict[str, Any] | None = None,
        kernels: bool = False,
    ) -> None:  # fmt: skip
        self.watch = watch
        self.alert = alert
        self.path = path
        self.alerts = [alert] if alert else []
        self.onset_ns = watch.onset_of(alert) if alert else None
        """The earliest of its alerts: a stall that is told amid a shift is not where that began."""
        self.begun_ns = time.monotonic_ns()
        self.until_ns = self.begun_ns + int(after_s * 1e9)
        self.result: dict[str, Any] | None = None
        self.verdict: dict[str, Any] | None = None
        """The final verdict as soon as it is known, which is before the file is whole."""
        self.early: list[dict[str, Any]] = []
        """Verdicts on what was seen so far, the newest last."""
        self._early: EarlyVerdict | None = None
        self._early_at_s = [FIRST_S, NEXT_S] if alert is not None else []
        self._meta = meta or {}
        self._missing: list[str] = []
        self._job: CaptureJob | None = None
        self._deep = False
        self.operators: OperatorDive | None = None
        self.kernels: KernelDive | None = None
        self._drain_at_ns = 0
        self._looks_deep = deep
        self._clocks = Timeline("monotonic")
        read_machine_clocks(self._clocks)
        if deep:
            self._arm(after_s)
            if kernels and watch.kernels is not None:
                self.kernels = watch.kernels.begin(self.until_ns)
        self.armed_ns = time.monotonic_ns()

    def _arm(self, seconds: float) -> None:
        self.watch.diving(self.begun_ns, self.until_ns + DISARMED_NS)
        if self.watch.operators is not None:
            self.operators = self.watch.operators.begin(seconds, self.path.parent)
        self.watch.attachment.source.arm_deep(seconds)
        if self.watch.below is None:
            self._missing.append(self.watch.below_missing or "scheduler events")
            return
        self.watch.below.go_deep()
        self._deep = True

    @property
    def open(self) -> bool:
        """True while further alerts can still become part of it."""
        return self._job is None

    def add_alert(self, alert: Alert) -> None:
        """A further alert of the same incident, the watch's latest."""
        self.alerts.append(alert)
        onset_ns = self.watch.onset_of(alert)
        self.onset_ns = onset_ns if self.onset_ns is None else min(self.onset_ns, onset_ns)

    def step(self, now_ns: int) -> None:
        """Call often while it is under way; takes some milliseconds at most."""
        reap()
        if self._job is not None:
            self.result = self._job.poll()
            self.verdict = self._job.verdict
            return
        if now_ns >= self._drain_at_ns:
            self._drain_at_ns = now_ns + DRAIN_PERIOD_NS
            read_machine_clocks(self._clocks)
            if self.watch.below is not None:
                self.watch.below.drain()
        if now_ns >= self.until_ns:
            # Beside engines that spin its thread may take its time, for which the watch has none.
            late = now_ns >= self.until_ns + int(ENDING_S * 1e9)
            ended = self.operators is None or self.operators.end()
            # Steps that the watch still holds are in it, too.
            self.watch.wanted_ns = self.until_ns
            if late or (ended and self.watch.handed_ns >= self.until_ns):
                self._write(0.0)
        else:
            self._look_early(now_ns)

    def _look_early(self, now_ns: int) -> None:
        if self._early is not None:
            self._early.poll()
            if self._early.over:
                self.early += [self._early.verdict] if self._early.verdict is not None else []
                self._early = None
        elif self._early_at_s and now_ns >= self.begun_ns + int(self._early_at_s[0] * 1e9):
            self._early_at_s.pop(0)
            self._early = EarlyVerdict(self._make)

    def abandon(self, within_s: float = LEAVE_S) -> None:
        """The watch ends: stop the probes; write what there is if the deep window was still open. Waits."""
        if self._job is None:
            self.until_ns = min(self.until_ns, time.monotonic_ns())
            self._write()
        assert self._job is not None
        self.result = self._job.wait(within_s)
        self.verdict = self._job.verdict
        if self.result is None:
            self._job.close()
            self.result = {"path": None, "error": "the capture was not written in time"}

    def _write(self, within_s: float = ENDING_S) -> None:
        watch = self.watch
        if self._early is not None:
            self._early.close()
            self._early = None
        if self.operators is not None:
            self.operators.finish(within_s)
            self._missing += self.operators.missing
        if self.kernels is not None:
            self.kernels.finish()
            self._missing += self.kernels.missing
        if watch.below is not None:
            if self._deep:
                watch.below.go_back()
                self._deep = False
            watch.below.drain()
            if watch.below.probe.lost:
                self._missing.append(f"{watch.below.probe.lost} scheduler events were lost")
            self._missing += watch.below.missing
        kept_in = self.operators.kept_in if self.operators is not None else []
        self._job = CaptureJob(self.path, self._make, finish=FINISH, keep=kept_in)
        if self.operators is not None:
            self.operators.forget()  # the copy has them

    def _make(self) -> Capture:
        """Runs in the forked copy: nothing of it holds up the watch."""
        watch = self.watch
        begun_ns = self.begun_ns if self.onset_ns is None else min(self.onset_ns, self.begun_ns)
        since_ns = begun_ns - int(BEFORE_S * 1e9)
        seen = watch.recorder.window(since_ns, self.until_ns)
        deep_ns = self.begun_ns if self._looks_deep else self.until_ns
        below = watch.below.spans(since_ns, self.until_ns, deep_ns) if watch.below is not None else []
        expected = dict(watch.expected)
        kernels = self.kernels.told() if self.kernels is not None else Told()
        self._missing += kernels.missing
        return Capture(
            meta={**self._describe(), "kernels": kernels.meta or None},
            steps=with_busy(seen.steps, kernels.windows),
            spans=[*seen.spans, *below, *kernels.spans],
            counters=seen.counters,
            requests=seen.requests,
            operator_records=self.operators.records if self.operators is not None else [],
            alerts=list(self.alerts),
            expected_ms=[expected.get(step.step) for step in seen.steps],
        )

    def _describe(self) -> dict[str, Any]:
        watch = self.watch
        requests = getattr(watch.attachment.source, "requests", None)
        described = describe_watch(watch, self._clocks)
        return {
            **described,
            "alert_ns": self.begun_ns if self.alerts else None,
            "onset_ns": self.onset_ns,
            "deep_probe": {"armed_ns": self.armed_ns, "disarmed_ns": self.until_ns},
            "operators": self._describe_operators(),
            "requests_in_flight": requests.in_flight if requests is not None else None,
            "below": watch.below.describe() if watch.below is not None else None,
            "not_available": [*described["not_available"], *self._missing],
            **self._meta,
        }

    def _describe_operators(self) -> dict[str, Any] | None:
        """How they were seen, None where they were not."""
        if self.operators is None or not self.operators.records:
            return None
        return {
            "armed_ms": {str(pid): round(ms, 3) for pid, ms in self.operators.armed_ms.items()},
            "lost": sum(seen.lost for _, seen in self.operators.records),
            "clock_error_ns": max(seen.error_ns for _, seen in self.operators.records),
        }
