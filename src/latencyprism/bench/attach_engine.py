"""Attach to a live engine and detach again, over and over, while clients are served: what do they notice?"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from latencyprism.attach.footprint import Footprint, take
from latencyprism.attach.inject import Injector, InjectReport
from latencyprism.bench.attaching import timing
from latencyprism.engines.discovery import Replica, discover
from latencyprism.engines.packs import load_pack
from latencyprism.errors import PrismError, TargetRefused
from latencyprism.lab import serve
from latencyprism.lab.load import Load
from latencyprism.lab.outcome import Result
from latencyprism.lab.profiles import profile
from latencyprism.timeline.python_source import PythonSource

_SETTLE_S = 3.0
_WARM_UP_CYCLES = 3
_RECORDS_WITHIN_S = 1.0
_CLIENTS = 8
_Windows = list[tuple[int, int]]


class _Cycles:
    def __init__(self) -> None:
        self.attached: _Windows = []
        self.left_alone: _Windows = []
        self.reports: list[InjectReport] = []
        self.refused: Counter[str] = Counter()
        self.steps = 0
        self.silent = 0


def run(engine: str, cycles: int, say: Callable[[str], None]) -> dict[str, Any]:
    """``cycles`` whole attachments to every process of a lab engine under decode load, in turn with windows
    of the same length without one. Raises PrismError when the engine does not start, TargetRefused when it
    cannot be attached to."""
    if engine == "llama.cpp":
        raise PrismError("nothing is attached to llama.cpp", "its steps are read through kernel probes")
    with serve.start(engine) as server:  # type: ignore[arg-type]
        say(f"{engine} serves, started in {server.start_s:.0f} s")
        return measure(server, cycles, say)


def measure(server: serve.Server, cycles: int, say: Callable[[str], None]) -> dict[str, Any]:
    """``run`` on an engine that serves already."""
    engine = server.engine
    (replica,) = discover(server.pid)
    with Load(server, profile("decode").but(clients=_CLIENTS)) as load:
        time.sleep(_SETTLE_S)
        for _ in range(_WARM_UP_CYCLES):
            _cycle(replica, _Cycles())
        first = _look(replica)
        time.sleep(_SETTLE_S)
        before = _look(replica)
        done = _Cycles()
        for number in range(cycles):
            _turn(replica, done)
            if number % 50 == 49:
                say(f"{number + 1} cycles")
        after = _look(replica)
    alive = server.alive()
    result = load.result()
    if not done.reports:
        raise TargetRefused(f"{engine} was never attached to", next(iter(done.refused), ""))
    return {
        "engine": engine,
        "cycles": cycles,
        "attached": cycles - sum(done.refused.values()),
        "crashes": int(not alive),
        "refused": dict(done.refused),
        "steps": done.steps,
        "silent": done.silent,
        "requests": len(result.requests),
        "failed_requests": len(result.failures),
        **_left(first, before, after),
        **_gaps(result, done),
        **timing(done.reports),
    }


def _look(replica: Replica) -> dict[int, Footprint]:
    """What is seen of each process that is attached to, by pid."""
    hooks = load_pack(replica.engine).choose(replica.version)[0].hooks.values()
    owners = sorted({(module, name) for module, names, _ in hooks for name in names.split("|")})
    found = {}
    for member in replica.members:
        if member.role != "api":
            found[member.pid] = take(Injector(member.pid), owners)
    return found


def _left(
    first: dict[int, Footprint], before: dict[int, Footprint], after: dict[int, Footprint]
) -> dict[str, Any]:
    """What is other after the cycles than before; what had changed without any, seconds before, is the
    engine's own and told apart."""
    left: list[str] = []
    own: list[str] = []
    for pid, seen in after.items():
        by_itself = {name.rpartition(":")[0] for name in before[pid].left_since(first[pid])}
        for difference in seen.left_since(before[pid]):
            (own if difference.rpartition(":")[0] in by_itself else left).append(
                f"process {pid}: {difference}"
            )
    compared: Counter[str] = Counter()
    for seen in after.values():
        compared.update(seen.counts())
    return {"leftovers": len(left), "left": left, "changed_by_itself": own, "compared": dict(compared)}


def _turn(replica: Replica, done: _Cycles) -> None:
    """One window with a cycle and one without, the one or the other first."""
    first = len(done.attached) % 2 == 0
    started = time.monotonic_ns()
    if not first and done.attached:
        before = done.attached[-1]
        time.sleep((before[1] - before[0]) / 1e9)
        done.left_alone.append((started, time.monotonic_ns()))
        started = time.monotonic_ns()
    _cycle(replica, done)
    ended = time.monotonic_ns()
    done.attached.append((started, ended))
    if first:
        time.sleep((ended - started) / 1e9)
        done.left_alone.append((ended, time.monotonic_ns()))


def _cycle(replica: Replica, done: _Cycles) -> None:
    try:
        source = PythonSource(replica)
    except TargetRefused as refusal:
        done.refused[refusal.why or refusal.what] += 1
        return
    try:
        done.reports += source.attach_reports().values()
        until, seen = time.monotonic() + _RECORDS_WITHIN_S, 0
        while not seen and time.monotonic() < until:
            time.sleep(0.005)
            seen = len(source.poll().steps)
        done.steps += seen
        done.silent += not seen
    finally:
        source.close()


def _gaps(result: Result, done: _Cycles) -> dict[str, Any]:
    """Inter-token gaps (ms) of arrivals within the two kinds of windows."""
    during, without = _within(result, done.attached), _within(result, done.left_alone)
    most, least = (float(one.max()) if len(one) else None for one in (during, without))
    return {
        "itl_ms_max_attach": None if most is None else round(most, 2),
        "itl_ms_max_without": None if least is None else round(least, 2),
        "gap_ratio": None if most is None or not least else round(most / least, 2),
        "largest_ms_attach": _largest(result, done.attached),
        "largest_ms_without": _largest(result, done.left_alone),
        "itl_ms_p99_attach": _p99(during),
        "itl_ms_p99_without": _p99(without),
        "gaps": [len(during), len(without)],
        "window_ms": round(float(np.median([end - start for start, end in done.attached])) / 1e6, 1),
    }


def _largest(result: Result, windows: _Windows) -> list[float]:
    """The largest gap (ms) of each of the five windows with the largest."""
    each = [float(gaps.max()) for start, end in windows if len(gaps := result.itl_ms(start, end))]
    return [round(gap, 1) for gap in sorted(each, reverse=True)[:5]]


def _within(result: Result, windows: _Windows) -> np.ndarray[Any, np.dtype[np.float64]]:
    parts = [result.itl_ms(start, end) for start, end in windows]
    return np.concatenate(parts) if parts else np.empty(0)


def _p99(values: np.ndarray[Any, np.dtype[np.float64]]) -> float | None:
    return round(float(np.quantile(values, 0.99)), 2) if len(values) else None
