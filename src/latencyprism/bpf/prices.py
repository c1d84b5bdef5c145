"""What a probe costs on this very machine: measured at the start, per way in which a function begins."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from latencyprism.bpf import kernel
from latencyprism.bpf.below import BelowProbe
from latencyprism.bpf.calls import CallProbe, Function
from latencyprism.bpf.loader import LoadedObject, read_object
from latencyprism.bpf.stubs import ENDBR64, StubFile
from latencyprism.errors import PrismError

_HITS, _ROUNDS = 500, 5


class Price(NamedTuple):
    """ns that one call of a probed function takes longer: probed on entry alone, on entry and return, and
    the latter with an empty program, which is what the trap itself costs. None: could not be measured."""

    entry_ns: float | None
    pair_ns: float | None
    empty_pair_ns: float | None


@dataclass(frozen=True)
class Prices:
    """``calls``: by class of first instruction (``stubs.CLASSES``); ``endbr64`` is probed behind it.
    ``tracepoints``: ns for each run of a program, by the names of ``below.HITS``; absent: not measured."""

    calls: dict[str, Price]
    tracepoints: dict[str, float]

    def of_call(self, kind: str, returns: bool = True) -> float:
        """The price of one call, ns; of a class that was not measured, the dearest known."""
        known = self.calls.get(kind)
        value = (known.pair_ns if returns else known.entry_ns) if known else None
        if value is None:
            all_known = [p.pair_ns if returns else p.entry_ns for p in self.calls.values()]
            value = max((ns for ns in all_known if ns is not None), default=0.0)
        return value


def measure_calls(hits: int = _HITS, rounds: int = _ROUNDS, pairs_only: bool = False) -> dict[str, Price]:
    """Price by class, on functions of our own in this process; some 0.3 s on an idle machine, a third of it
    for ``pairs_only``. PrismError without the rights."""
    file = StubFile()
    try:
        return {kind: _price(file, kind, hits, rounds, pairs_only) for kind in file.stubs}
    finally:
        file.close()


def _price(file: StubFile, kind: str, hits: int, rounds: int, pairs_only: bool) -> Price:
    offset = file.stubs[kind].offset + (4 if kind == ENDBR64 else 0)
    bare = _best(file, kind, 100 * hits, rounds) / 100
    pair = _probed(file, kind, Function(kind, offset=offset), hits, rounds)
    if pairs_only:
        return Price(None, (pair - bare) / hits, None)
    entry = _probed(file, kind, Function(kind, offset=offset, returns=False), hits, rounds)
    with EmptyPair(os.getpid(), file.descriptor, [offset]):
        empty = _best(file, kind, hits, rounds)
    return Price((entry - bare) / hits, (pair - bare) / hits, (empty - bare) / hits)


def _probed(file: StubFile, kind: str, function: Function, hits: int, rounds: int) -> float:
    probe = CallProbe(os.getpid(), [file.descriptor], [function], ring_bytes=1 << 20)
    try:
        best = _best(file, kind, hits, rounds)
        seen = probe.totals()[0].calls
        if seen != hits * rounds:
            raise PrismError("uprobes do not work", f"{seen} of {hits * rounds} calls were seen")
    finally:
        probe.close()
    return best


def _best(file: StubFile, kind: str, hits: int, rounds: int) -> float:
    """The quickest of several rounds, ns: whatever disturbs makes a round longer, never shorter."""
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter_ns()
        file.run(kind, hits)
        best = min(best, float(time.perf_counter_ns() - start))
    return best


class EmptyPair:
    """Probes with an empty program on entry and return: the yardstick. A context manager."""

    def __init__(self, pid: int, file: int, offsets: Sequence[int]) -> None:
        self._object = LoadedObject(read_object(f"calls.{kernel.supported_machine()}"), {"target_tgid": pid})
        path, cookies = f"/proc/self/fd/{file}", list(range(len(offsets)))
        self._links: list[int] = []
        try:
            for returns in (True, False):
                program = self._object.load("uprobe/empty", kernel.PROG_KPROBE, kernel.ATTACH_UPROBE_MULTI)
                self._links.append(
                    kernel.link_uprobe_multi(program, path, offsets, cookies, pid, returns=returns)
                )
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> EmptyPair:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        while self._links:
            os.close(self._links.pop())
        self._object.close()


WAY_NS = 30.0
"""The way into a tracepoint's program and out, which the kernel's own clock leaves out."""


def measure_tracepoints(seconds: float = 0.03) -> dict[str, float]:
    """ns for each run of the always-on programs: ``switch`` one that concerns no watched thread, ``mine``
    what each watched thread in it adds. By the kernel's clock, on switches as they follow each other on a
    busy machine, which is when the price matters."""
    own, found = os.getpid(), {}
    with BelowProbe([own]) as probe, kernel.run_time_statistics():
        probe.aim([])
        foreign, _ = _timed(probe, seconds)
        for name, (ns, runs) in foreign.items():
            if runs:
                found[name] = ns / runs + WAY_NS
        probe.aim([own])
        mine, hits = _timed(probe, seconds)
    ns, runs = mine.get("switch", (0, 0))
    if "switch" in found and hits.get("mine"):
        found["mine"] = max(0.0, (ns + runs * WAY_NS - runs * found["switch"]) / hits["mine"])
    return found


def _timed(probe: BelowProbe, seconds: float) -> tuple[dict[str, tuple[int, int]], dict[str, int]]:
    """Run times and hits by name, while two threads of this process hand each other the CPU."""
    ns_before, before = probe.run_times(), probe.hits()
    _hand_over(seconds)
    ns_after, after = probe.run_times(), probe.hits()
    times = {n: (t - ns_before[n][0], r - ns_before[n][1]) for n, (t, r) in ns_after.items()}
    return times, {name: after[name] - before.get(name, 0) for name in after}


def _hand_over(seconds: float) -> None:
    """Two threads that wake each other, as fast as they can."""
    here, there = os.pipe(), os.pipe()

    def answer() -> None:
        while os.read(here[0], 1) == b"x":
            os.write(there[1], b"x")

    partner = threading.Thread(target=answer)
    partner.start()
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            os.write(here[1], b"x")
            os.read(there[0], 1)
    finally:
        os.write(here[1], b"e")
        partner.join()
        for descriptor in (*here, *there):
            os.close(descriptor)
