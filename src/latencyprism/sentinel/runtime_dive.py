"""Runtime calls while a capture is open: launches, copies, waits, matrix products, collectives.

To find the libraries and their functions, and to take probes away again, takes tenths of a second: that is
done by threads, beforehand and afterwards. To attach takes some milliseconds of work, at the watch's own
priority: an ordinary thread can be kept off the CPU for seconds, with the interpreter's lock in its hands.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from latencyprism.bpf.prices import Prices, measure_calls
from latencyprism.engines.discovery import executing
from latencyprism.errors import PrismError, reason_of
from latencyprism.host.processes import thread_name
from latencyprism.records import Span
from latencyprism.sentinel.priority import start_alike
from latencyprism.xpu.runtime_calls import DEFAULT_KINDS, RuntimeProbe
from latencyprism.xpu.symbols import Mapped, find_libraries

LANE = "runtime"
LOOK_S, BUDGET_NS = 0.1, 1_000_000_000
LEAST_SPAN_NS, MOST_SPANS, MOST_CALLS = 20_000, 50_000, 40
DEAREST_NS, LAST_S = 6_000.0, 0.5


class RuntimeDives:
    """One a replica. ``roles``: of each process that may use an accelerator; where there are workers, of
    these alone."""

    def __init__(self, roles: Mapping[int, str]) -> None:
        self.pids = executing(roles)
        self.libraries: dict[int, list[Mapped]] = {}
        self.prices = Prices({}, {})
        self.missing: list[str] = []
        self._thread = threading.Thread(target=self._prepare, name="runtimes", daemon=True)
        self._thread.start()

    def _prepare(self) -> None:
        try:
            found = {pid: find_libraries(pid, DEFAULT_KINDS) for pid in self.pids}
            if any(library.symbols for libraries in found.values() for library in libraries):
                self.prices = Prices(measure_calls(pairs_only=True), {})
            for pid, libraries in found.items():
                chosen = [cheap for library in libraries if (cheap := self._affordable(library)).symbols]
                if chosen:
                    self.libraries[pid] = chosen
        except (PrismError, OSError) as error:
            self.missing.append(f"runtime calls: {reason_of(error)}")
            self.libraries.clear()

    def _affordable(self, library: Mapped) -> Mapped:
        """Without the functions that cost too much to probe, however seldom they are called."""
        prices = {symbol.name: self.prices.of_call(symbol.probed_class) for symbol in library.symbols}
        dear = [name for name, price_ns in prices.items() if price_ns > DEAREST_NS]
        if dear:
            self.missing.append(f"runtime calls: too dear to probe here: {', '.join(dear)}")
        return replace(library, symbols=tuple(s for s in library.symbols if s.name not in dear))

    def begin(self) -> RuntimeDive | None:
        """None where no process maps a runtime that is known, or that is not found out yet."""
        return RuntimeDive(self) if self.libraries and not self._thread.is_alive() else None


class RuntimeDive:
    """Begins at once, in a thread. ``finish``, then ``spans``, ``calls`` and ``missing``."""

    def __init__(self, dives: RuntimeDives) -> None:
        # As they came, 56 bytes each: made into spans by the copy of the watch that writes the capture.
        self._seen: list[tuple[RuntimeProbe, npt.NDArray[np.void]]] = []
        self._room = MOST_SPANS
        self._tracks: dict[int, tuple[str, ...]] = {}
        self.calls: list[dict[str, Any]] = []
        """Those that took the most time: library, symbol, calls, total_ms, longest_ms."""
        self.missing: list[str] = []
        self._dives = dives
        self._stop, self._handed_over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="runtimes", daemon=True)
        start_alike(self._thread)

    def _run(self) -> None:
        probes: list[RuntimeProbe] = []
        try:
            for pid, libraries in self._dives.libraries.items():
                try:
                    probes.append(
                        RuntimeProbe(
                            pid, min_ns=LEAST_SPAN_NS, prices=self._dives.prices, libraries=libraries
                        )
                    )
                except (PrismError, OSError) as error:
                    self.missing.append(f"runtime calls: {reason_of(error)}")
            looked_ns = 0
            while not self._stop.wait(LOOK_S):
                for probe in probes:
                    self._take(probe)
                if (now_ns := time.monotonic_ns()) - looked_ns >= BUDGET_NS:
                    looked_ns = now_ns
                    for probe in probes:
                        for name in probe.look(now_ns):
                            self.missing.append(f"runtime calls: {name} was given up for its cost")
            self._end(probes)
        finally:
            self._handed_over.set()
            for probe in probes:
                with contextlib.suppress(OSError):
                    probe.close()

    def _take(self, probe: RuntimeProbe) -> None:
        calls = probe.calls()[: self._room]
        if len(calls):
            self._room -= len(calls)
            self._seen.append((probe, calls))

    def _end(self, probes: list[RuntimeProbe]) -> None:
        totals = []
        for probe in probes:
            self._take(probe)
            self._tracks |= _tracks(probe.pid)
            totals += [(call.total_ns, probe.pid, call) for call in probe.totals() if call.calls]
            if probe.lost:
                self.missing.append(f"runtime calls: {probe.lost} were lost as spans of their own")
        totals.sort(key=lambda entry: -entry[0])
        self.calls = [
            {
                "pid": pid,
                "library": call.library,
                "symbol": call.symbol,
                "calls": call.calls,
                "total_ms": round(call.total_ns / 1e6, 3),
                "longest_ms": round(call.longest_ns / 1e6, 3),
            }
            for _, pid, call in totals[:MOST_CALLS]
        ]

    def spans(self) -> list[Span]:
        """Calls of 20 us and longer, on the lane ``runtime`` of their thread."""
        return [span for probe, calls in self._seen for span in probe.drawn(calls, self._tracks)]

    def finish(self) -> None:
        """Have the last calls; the probes go away after that, by the thread. Takes milliseconds."""
        self._stop.set()
        if not self._handed_over.wait(LAST_S):
            self.missing.append("runtime calls: they did not come in time")


def _tracks(pid: int) -> dict[int, tuple[str, ...]]:
    try:
        tids = [int(name) for name in os.listdir(f"/proc/{pid}/task")]
    except OSError:
        return {}
    return {tid: (f"{thread_name(tid)} {tid}", LANE) for tid in tids}
