"""Kernels of a replica's workers for a few steps of a capture, by the framework's own profiler.

Only where it was asked for: what it costs an engine on a device to stop the profiler has not been measured,
and its first start in a process may take seconds. One process after the other, never two at once in a watch.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from latencyprism.engines.discovery import executing
from latencyprism.errors import PrismError, reason_of
from latencyprism.records import Span
from latencyprism.sentinel.priority import ordinary, start_alike
from latencyprism.timeline.device_time import DeviceWindow
from latencyprism.xpu.kernel_spans import described, doubtful_names, spans_of
from latencyprism.xpu.kernels import KernelCapture, capture_kernels
from latencyprism.xpu.symbols import accelerators_of

AFTER_S = 0.5
"""After the beginning of the deep window: other probes are armed by then."""
STEPS = 5
LEAST_S, LONGEST_S, UNKNOWN_S = 0.02, 0.25, 0.1
"""A window of ``STEPS`` usual steps, within these; where no step has been seen."""
TIMEOUT_S, LAST_S = 20.0, 0.5
APART_S = 300.0
MOST_EVENTS = 40_000
"""Of one capture, all processes together."""
SETTLE_NS = 300_000_000
"""So long after the last that was heard steps may still be late because of us."""
_DOUBTFUL_SHOWN = 3


class Turn:
    """Who may record: one at a time, ``apart_s`` after the one before."""

    def __init__(self, apart_s: float = APART_S) -> None:
        self._apart_s = apart_s
        self._busy = threading.Lock()
        self._last_s: float | None = None

    def take(self) -> str:
        """Empty: it is the caller's, until ``give_back``. Else why not."""
        if not self._busy.acquire(blocking=False):
            return "another capture records them"
        now_s = time.monotonic()
        if self._last_s is not None and now_s - self._last_s < self._apart_s:
            self._busy.release()
            return f"they were recorded less than {self._apart_s / 60:g} minutes ago"
        return ""

    def spend(self) -> None:
        """The profiler is about to be started: the next one has to wait."""
        self._last_s = time.monotonic()

    def give_back(self) -> None:
        self._busy.release()


MACHINE = Turn()


@dataclass(slots=True)
class _Stretch:
    """``end_ns`` None: it goes on."""

    begin_ns: int
    end_ns: int | None = None


class KernelDives:
    """One a replica. ``roles``: of each process that may use an accelerator; where there are workers, of
    these alone. ``step_ns``: how long a step usually takes with the gap before it, None: not known yet."""

    def __init__(
        self, roles: Mapping[int, str], step_ns: Callable[[], int | None], turn: Turn = MACHINE
    ) -> None:
        self.processes = {pid: f"{roles[pid]} {pid}" for pid in executing(roles)}
        self.turn = turn
        self._step_ns = step_ns
        self._stretches: deque[_Stretch] = deque(maxlen=64)

    def begin(self, until_ns: int, after_s: float = AFTER_S) -> KernelDive:
        """A dive within a deep window that ends at ``until_ns``."""
        return KernelDive(self, until_ns, after_s)

    @property
    def window_s(self) -> float:
        step_ns = self._step_ns()
        return UNKNOWN_S if step_ns is None else min(max(STEPS * step_ns / 1e9, LEAST_S), LONGEST_S)

    def at_work(self, stretch: _Stretch) -> None:
        self._stretches.append(stretch)

    def touch(self, start_ns: int, end_ns: int) -> bool:
        """Was a profiler of ours at work in a process of this replica at that time, or just before?"""
        return any(
            stretch.begin_ns < end_ns and (stretch.end_ns is None or start_ns < stretch.end_ns + SETTLE_NS)
            for stretch in self._stretches.copy()
        )


@dataclass(slots=True)
class Told:
    """What a dive saw, ready for a capture. ``meta``: one entry a process."""

    spans: list[Span] = field(default_factory=list)
    windows: list[DeviceWindow] = field(default_factory=list)
    meta: list[dict[str, Any]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


class KernelDive:
    """Begins ``after_s`` later, in a thread. ``finish``, then ``missing`` and ``told``."""

    def __init__(self, dives: KernelDives, until_ns: int, after_s: float) -> None:
        self.missing: list[str] = []
        self._seen: list[tuple[str, KernelCapture]] = []
        self._room = MOST_EVENTS
        self._dives = dives
        self._until_ns = until_ns
        self._after_s = after_s
        self._stop = threading.Event()
        self._finished = False
        self._thread = threading.Thread(target=self._run, name="kernels", daemon=True)
        start_alike(self._thread)

    def _run(self) -> None:
        ordinary()  # to attach and to listen takes tenths of a second: none of an engine's core is for that
        if self._stop.wait(self._after_s):
            self.missing.append("kernels: the capture was over before they were recorded")
            return
        refused = self._dives.turn.take()
        if refused:
            self.missing.append(f"kernels: {refused}")
            return
        try:
            for pid, process in self._dives.processes.items():
                try:
                    self._look_at(pid, process)
                except (PrismError, OSError) as error:
                    self.missing.append(f"kernels of {process}: {reason_of(error)}")
        finally:
            self._dives.turn.give_back()

    def _look_at(self, pid: int, process: str) -> None:
        window_s = self._dives.window_s
        left_s = (self._until_ns - time.monotonic_ns()) / 1e9
        if self._stop.is_set() or left_s < 2 * window_s:
            self.missing.append(f"kernels of {process}: the capture was over before they were recorded")
        elif self._room <= 0:
            self.missing.append(f"kernels of {process}: those of others left no room")
        elif not accelerators_of(pid):
            self.missing.append(f"kernels of {process}: it maps no accelerator's runtime that is known")
        else:
            self._record(pid, process, window_s, min(left_s, TIMEOUT_S))

    def _record(self, pid: int, process: str, window_s: float, timeout_s: float) -> None:
        stretch = _Stretch(time.monotonic_ns())
        self._dives.turn.spend()
        self._dives.at_work(stretch)
        try:
            capture = capture_kernels(
                pid, window_s, most_events=self._room, timeout_s=timeout_s,
                wanted=lambda: not self._stop.is_set(),
            )  # fmt: skip
        finally:
            stretch.end_ns = time.monotonic_ns()
        # A line holds a hundred events at most.
        self._room -= 100 * len(capture.lines)
        self._seen.append((process, capture))

    def finish(self) -> None:
        """Record no more. Harmless twice; takes half a second at most, where a profiler is being stopped."""
        if self._finished:
            return
        self._finished = True
        self._stop.set()
        self._thread.join(LAST_S)
        if self._thread.is_alive():
            self.missing.append("kernels: their recording did not come to its end in time")

    def told(self) -> Told:
        """What was seen so far. Takes tens of milliseconds: for the copy of the watch that writes."""
        found = Told()
        for process, capture in self._seen.copy():
            try:
                spans = spans_of(capture.events, process)
            except PrismError as error:
                found.missing.append(f"kernels of {process}: {reason_of(error)}")
                continue
            found.spans += spans
            found.meta.append(described(capture, process, spans))
            found.windows += _whole(capture, spans)
            if capture.left_out:
                found.missing.append(f"kernels of {process}: {capture.left_out} rows found no room")
        doubtful = doubtful_names(found.spans)
        if doubtful:
            names = ", ".join(name[:60] for name in doubtful[:_DOUBTFUL_SHOWN])
            found.missing.append(
                f"kernels: {len(doubtful)} called like a collective's and not known as one: {names}"
            )
        return found


def _whole(capture: KernelCapture, spans: Sequence[Span]) -> list[DeviceWindow]:
    """The window, where all of its kernels are known."""
    if capture.left_out or capture.window_ns is None:
        return []
    return [DeviceWindow.of(*capture.window_ns, spans)]
