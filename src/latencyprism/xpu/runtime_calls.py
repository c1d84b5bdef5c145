"""Calls into the accelerator libraries of one process, timed from outside, within a budget."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from latencyprism.attach.maps import open_mapped
from latencyprism.bpf.budget import CallBudget
from latencyprism.bpf.calls import CallProbe, Function
from latencyprism.bpf.prices import Prices
from latencyprism.errors import TargetRefused
from latencyprism.records import Span
from latencyprism.xpu.symbols import Mapped, Symbol, find_libraries

RING_BYTES = 2 << 20
"""Some 37,000 calls between two looks. Its pages are mapped twice, and count as the watch's memory."""
DEFAULT_KINDS = ("launch", "graph", "copy", "wait", "matmul", "collective")


class CallsOf(NamedTuple):
    """One function since the probe began; times in ns."""

    library: str
    symbol: str
    kind: str
    calls: int
    total_ns: int
    longest_ns: int


class RuntimeProbe:
    """Attached until ``close``, or the end of this process.

    ``kinds``: which functions (``symbols.KINDS``). ``min_ns``: calls at least this long also become spans,
    all are in the totals. With ``prices`` the dearest functions are given up by ``look`` while the
    estimated cost is above ``limit`` of one CPU. ``libraries``: as found before. ``notes`` says what is not
    as it should be.

    Raises TargetRefused where the process maps none of the known libraries or functions, PrismError without
    the rights or the kernel's features."""

    def __init__(
        self,
        pid: int,
        kinds: Sequence[str] = DEFAULT_KINDS,
        *,
        min_ns: int = 0,
        prices: Prices | None = None,
        limit: float = 0.05,
        libraries: Sequence[Mapped] | None = None,
    ) -> None:
        self.pid = pid
        self.libraries = list(find_libraries(pid, kinds) if libraries is None else libraries)
        self.notes = [library.note for library in self.libraries if library.note]
        self.given_up: list[str] = []
        chosen = [(library, symbol) for library in self.libraries for symbol in library.symbols]
        if not chosen:
            why = f"none of {len(self.libraries)} known libraries has any of the functions looked for"
            raise TargetRefused(
                f"cannot see runtime calls of {pid}", why if self.libraries else "it maps no known runtime"
            )
        self._files: list[int] = []
        self._symbols: list[tuple[Mapped, Symbol]] = []
        functions: list[Function] = []
        try:
            for library in self.libraries:
                if not library.symbols:
                    continue
                number = len(self._files)
                self._files.append(open_mapped(pid, library.mapping))
                for symbol in library.symbols:
                    self._symbols.append((library, symbol))
                    functions.append(Function(symbol.name, number, symbol.offset, min_ns=min_ns))
            self._probe = CallProbe(pid, self._files, functions, ring_bytes=RING_BYTES)
        except BaseException:
            self._close_files()
            raise
        self._budget = CallBudget(self._probe, prices, limit) if prices is not None else None

    @property
    def lost(self) -> int:
        """Calls that are in the totals but found no room as a span."""
        return self._probe.lost

    @property
    def cost_share(self) -> float | None:
        """The running estimate: share of one CPU that the probes take; None without prices or before two
        looks."""
        return None if self._budget is None else self._budget.budget.share

    def look(self, now_ns: int) -> list[str]:
        """Call about once a second: functions given up now because their probes cost too much."""
        gone = [] if self._budget is None else self._budget.look(now_ns)
        self.given_up += gone
        return gone

    def totals(self) -> list[CallsOf]:
        """Of every function that was probed, also of those given up."""
        return [
            CallsOf(library.library.name, symbol.name, symbol.kind, *total)
            for (library, symbol), total in zip(self._symbols, self._probe.totals())
        ]

    def calls(self) -> npt.NDArray[np.void]:
        """Calls of at least ``min_ns`` since the last look; for ``drawn``."""
        return self._probe.read()

    def spans(self, threads: Mapping[int, tuple[str, ...]]) -> list[Span]:
        """The same as spans."""
        return self.drawn(self.calls(), threads)

    def drawn(self, calls: npt.NDArray[np.void], threads: Mapping[int, tuple[str, ...]]) -> list[Span]:
        """Calls as spans, on the track that ``threads`` gives their thread (TID)."""
        found = []
        for call in calls:
            library, symbol = self._symbols[int(call["function"])]
            tid = int(call["tid"])
            track = threads.get(tid, (f"process {self.pid}", f"thread {tid}"))
            details = (("library", library.library.name), ("kind", symbol.kind))
            span = Span(track, symbol.name, int(call["start_ns"]), int(call["end_ns"]), None, details)
            found.append(span)
        return found

    def close(self) -> None:
        """Take the probes out of the process; safe to repeat."""
        self._probe.close()
        self._close_files()

    def _close_files(self) -> None:
        while self._files:
            os.close(self._files.pop())
