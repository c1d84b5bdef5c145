"""Signals: what a stretch of time says, per step and per unit of work.

Kinds and units:

* *time*: nanoseconds spent, over the nanoseconds that the stretch's steps should have taken for their work
  (the reference's ``WorkLine``). All share one scale: 0.5 means half a normal step for every step, so that a
  slow-down and the account that explains it have the same size whatever its strength.
* *share*: part of a CPU that others take.
* *count*: events per step.
* *level*: a mean as it is.

A signal has one value per place (a process, a thread, ``""`` for the machine or the step itself).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from latencyprism.diagnose.accounts import frozen_signals, host_signals
from latencyprism.diagnose.request_signals import request_signals
from latencyprism.diagnose.tracks import Tracks
from latencyprism.diagnose.waits import Waits
from latencyprism.diagnose.workline import WorkLine, column
from latencyprism.records import Step, Window

Array = npt.NDArray[np.float64]
Values = dict[tuple[str, str], float]

PHASE_COLUMNS = ("schedule_ns", "execute_ns", "sample_ns", "update_ns")
_STEP_TIMES = {
    "runqueue_ns": "waited", "offcpu_ns": "slept", "throttled_ns": "throttled", "gc_ns": "gc",
}  # fmt: skip
_STEP_COUNTS = {"major_faults": "major_faults", "preempted": "preempted"}
_STEP_LEVELS = {"waiting": "waiting", "prefill_tokens": "prefill_tokens", "cached_tokens": "cached_tokens"}
_SPIKE = 1.0
"""A step that took this much more than expected (1.0: twice) is a stall, not part of the level."""


class Expectations(NamedTuple):
    """What the reference says a step and each of its phases should take."""

    step: WorkLine
    phases: dict[str, WorkLine]
    spike: float
    """Relative excess above which a step counts as stalled, not less than ``_SPIKE``."""

    @classmethod
    def learn(cls, steps: list[Step]) -> Expectations | None:
        if len(steps) < 4:
            return None
        durations = column(steps, "end_ns") - column(steps, "start_ns")
        line = WorkLine(steps, durations)
        phases = {}
        for name in PHASE_COLUMNS:
            values = column(steps, name)
            if np.isfinite(values).mean() > 0.9:
                phases[name] = WorkLine(steps, np.nan_to_num(values))
        relative = durations / line.predict(steps) - 1
        noise = 1.4826 * float(np.median(np.abs(relative - np.median(relative))))
        return cls(line, phases, max(_SPIKE, 6 * noise))


class WindowReader:
    """A window prepared for being measured stretch by stretch."""

    def __init__(self, window: Window, roles: Mapping[int, str], expected: Expectations | None) -> None:
        self.steps = [step for step in worked(window.steps) if step.end_ns >= step.start_ns]
        self.steps.sort(key=lambda step: step.end_ns)
        self.roles = roles
        self.tracks = Tracks.of(window.counters, roles)
        self.spans = window.spans
        self.waits = Waits(window.spans, roles)
        self.requests = window.requests
        self.expected = expected
        self._ends = column(self.steps, "end_ns")
        self._durations = self._ends - column(self.steps, "start_ns")
        self._predicted = expected.step.predict(self.steps) if expected else np.zeros(0)
        self._phases: dict[str, tuple[Array, Array]] = {}
        for name, line in (expected.phases if expected else {}).items():
            self._phases[name] = (column(self.steps, name), line.predict(self.steps))
        names = (*_STEP_TIMES, *_STEP_COUNTS, *_STEP_LEVELS, "gap_ns", "decode_requests")
        self._columns = {name: column(self.steps, name) for name in names}

    def extent(self) -> tuple[int, int] | None:
        """From the first to the last thing seen; None for an empty window."""
        times = [time for step in self.steps for time in (step.start_ns, step.end_ns)]
        if not times:
            series = (s for named in self.tracks.series.values() for s in named.values())
            times = [int(time) for each in series for time in (each.times[0], each.times[-1])]
        return (min(times), max(times)) if times else None

    def measure(self, start_ns: int, end_ns: int) -> Values:
        """Every signal that the stretch allows; what was not observed is absent."""
        picked = slice(*np.searchsorted(self._ends, [start_ns, end_ns + 1]))
        predicted_ns = float(self._predicted[picked].sum()) if self.expected else 0.0
        steps = len(self._ends[picked])
        out: Values = {}
        if steps and predicted_ns > 0:
            out.update(self._step_signals(picked, predicted_ns, steps))
        base_ns = predicted_ns if predicted_ns > 0 else float(end_ns - start_ns)
        if steps and predicted_ns > 0:
            stalls = self._stalls(picked)
            out.update(frozen_signals(self.tracks, self.roles, stalls, start_ns, end_ns, predicted_ns))
        stretched = (1 + out["slow", ""]) if ("slow", "") in out else 1.0
        out.update(host_signals(self.tracks, self.roles, start_ns, end_ns, base_ns, stretched, max(steps, 1)))
        if self.expected is not None:
            step_ns = self.expected.step.typical
            out.update(request_signals(self.requests, start_ns, end_ns, step_ns))
        counted = {signal for signal, _ in out}
        for key, value in self.waits.measure(start_ns, end_ns, base_ns).items():
            # Spans may cover only a deep look of seconds: the sampler counts all the time.
            if key[0] not in counted or key[0] == "stopped":
                out[key] = value
        return {key: value for key, value in out.items() if np.isfinite(value)}

    def _step_signals(self, picked: slice, predicted_ns: float, steps: int) -> Values:
        assert self.expected is not None
        out: Values = {}
        predicted, excess = self._predicted[picked], self._durations[picked] - self._predicted[picked]
        out["stall", ""] = sum(lost for _, _, lost in self._stalls(picked)) / predicted_ns
        out["slow", ""] = float(excess.sum()) / predicted_ns
        out["level", ""] = float(np.median(excess / predicted))
        out["work", ""] = predicted_ns / steps / max(self.expected.step.typical, 1.0) - 1
        for name, (values, normal) in self._phases.items():
            seen = values[picked]
            if np.isfinite(seen).mean() > 0.8:
                out[name[:-3], ""] = float(np.nansum(seen - normal[picked])) / predicted_ns
        self._column_signals(picked, predicted_ns, out)
        return out

    def _stalls(self, picked: slice) -> list[tuple[float, float, float]]:
        """Start, end and lost time of the steps that stand out of their own stretch: a general slow-down,
        however strong, is no stall."""
        assert self.expected is not None
        predicted = self._predicted[picked]
        excess = self._durations[picked] - predicted
        level = max(0.0, float(np.median(excess / predicted)))
        beyond = excess - level * predicted
        ends, durations = self._ends[picked], self._durations[picked]
        found = np.flatnonzero(beyond > self.expected.spike * (1 + level) * predicted)
        return [(float(ends[i] - durations[i]), float(ends[i]), float(beyond[i])) for i in found]

    def _column_signals(self, picked: slice, predicted_ns: float, out: Values) -> None:
        seen = {name: values[picked] for name, values in self._columns.items()}
        known = {name: values[np.isfinite(values)] for name, values in seen.items()}
        for name, signal in _STEP_TIMES.items():
            if len(known[name]):
                out[signal, ""] = float(known[name].mean()) * len(seen[name]) / predicted_ns
        for table in (_STEP_COUNTS, _STEP_LEVELS):
            for name, signal in table.items():
                if len(known[name]):
                    out[signal, ""] = float(known[name].mean())
        # With requests already decoding, the engine had work to do: only then is a gap a loss.
        busy_gap = seen["gap_ns"][np.nan_to_num(seen["decode_requests"]) > 0]
        if np.isfinite(busy_gap).any():
            out["gap", ""] = float(np.nansum(busy_gap)) / predicted_ns


def worked(steps: list[Step]) -> list[Step]:
    """The steps that scheduled tokens; all of them where the engine does not say."""
    kept = [step for step in steps if step.phase is not None]
    return kept or list(steps)
