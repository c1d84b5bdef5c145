"""What the probe costs a step of the engine, by its own clock, at different numbers of running requests.

It reads a clock around its work in the engine's process; the record of each step carries the figure of the
step before. Critical is what it does while the engine does not wait for a worker.
"""

from __future__ import annotations

import select
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from latencyprism.engines.discovery import discover
from latencyprism.errors import PrismError
from latencyprism.lab import serve
from latencyprism.lab.launch import Options
from latencyprism.lab.load import Load
from latencyprism.lab.profiles import Length, Profile
from latencyprism.records import Step
from latencyprism.sentinel.priority import OnTime
from latencyprism.sentinel.targets import attach
from latencyprism.timeline.python_source import PythonSource

STEPS, LEAST_STEPS, LEVEL_S, FILL_S = 400, 50, 30.0, 60.0
POLL_S = 0.05


def run(engine: str, running: Sequence[int], seed: int, say: Callable[[str], None]) -> dict[str, Any]:
    """``probe_us_per_step`` for each number of ``running`` requests; ``growth_us``: mean at the most
    less mean at the fewest."""
    most = max(running)
    options = Options(slots=most, batch_tokens=max(256, 2 * most))
    with serve.start(engine, options) as server:  # type: ignore[arg-type]
        say(f"{engine} serves, started in {server.start_s:.0f} s")
        attachment = attach(discover(server.pid)[0])
        source = attachment.source
        if not isinstance(source, PythonSource):
            attachment.close()
            raise PrismError(f"{engine} is not watched by a probe inside it")
        source.allow(1_000_000)
        try:
            # Beside engines that spin, an ordinary reader can be held up for longer than the probe's lease.
            with OnTime():
                levels = {str(level): _level(server, source, level, seed, say) for level in sorted(running)}
        finally:
            attachment.close()
    means, means_95 = ([figures[name] for figures in levels.values()] for name in ("mean", "mean_95"))
    return {
        "engine": engine,
        "probe_us_per_step": levels,
        "growth_us": round(means[-1] - means[0], 2),
        "growth_95_us": round(means_95[-1] - means_95[0], 2),
        "lost": source.lost,
    }


def _level(
    server: serve.Server, source: PythonSource, level: int, seed: int, say: Callable[[str], None]
) -> dict[str, Any]:
    steady = Profile(
        "steady", clients=level, prompt=Length(16), output=Length(384, 0.3, 128, 1024),
        duration_s=FILL_S + 2 * LEVEL_S, seed=seed,
    )  # fmt: skip
    with Load(server, steady) as load:
        _watch(source, lambda steps: len(steps) > 20 and (steps[-1].running or 0) >= 0.95 * level, FILL_S)
        figures = _window(source, level, wakes=False)
        woken = _window(source, level, wakes=True)
        # The lease must be renewed while the load drains.
        stopping = threading.Thread(target=load.stop)
        stopping.start()
        _watch(source, lambda _: not stopping.is_alive(), FILL_S)
        stopping.join()
    for name in ("p50", "mean", "mean_95", "critical_p50", "critical_mean", "critical_mean_95"):
        figures[f"woken_{name}"] = woken[name]
    say(f"{level} running: {figures['p50']} us a step, {figures['critical_p50']} us of it critical")
    return figures


def _window(source: PythonSource, level: int, *, wakes: bool) -> dict[str, Any]:
    source.totals.forget_costs()
    steps = _watch(source, lambda steps: len(steps) >= STEPS, LEVEL_S, wakes=wakes)
    if len(steps) < LEAST_STEPS:
        raise PrismError(f"only {len(steps)} steps at {level} running requests")
    return _figures(source, steps)


def _watch(
    source: PythonSource, enough: Callable[[list[Step]], bool], seconds: float, *, wakes: bool = False
) -> list[Step]:
    """Steps until there are ``enough``, read from time to time, or (``wakes``) as the watch does, which asks
    to be woken at each step: on a machine without a free core the kernel may then run it in the engine's
    place."""
    steps: list[Step] = []
    until = time.monotonic() + seconds
    descriptor = source.fileno()
    assert descriptor is not None
    while time.monotonic() < until and not enough(steps):
        source.renew()
        steps += source.poll().steps
        if not wakes:
            time.sleep(POLL_S)
        elif source.settle():
            select.select([descriptor], [], [], 0.2)
    return steps


def _figures(source: PythonSource, steps: Sequence[Step]) -> dict[str, Any]:
    cost = np.asarray(source.totals.probe_self_ns, dtype=np.float64) / 1e3
    critical = np.asarray(source.totals.probe_critical_ns, dtype=np.float64) / 1e3
    duration_us = float(np.median([step.duration_ns for step in steps])) / 1e3
    return {
        "steps": len(cost),
        "running": float(np.median([step.running or 0 for step in steps])),
        "step_ms": round(duration_us / 1e3, 3),
        "p50": round(float(np.median(cost)), 2),
        "mean": round(float(np.mean(cost)), 2),
        "mean_95": round(_mean_95(cost), 2),
        "p99": round(float(np.quantile(cost, 0.99)), 2),
        "critical_p50": round(float(np.median(critical)), 2),
        "critical_mean": round(float(np.mean(critical)), 2),
        "critical_mean_95": round(_mean_95(critical), 2),
        "share_of_step": round(float(np.median(cost)) / duration_us, 6),
    }


def _mean_95(values: npt.NDArray[np.float64]) -> float:
    """Mean without the largest twentieth: in these somebody else had the processor, where it is shared."""
    return float(np.mean(np.sort(values)[: max(1, len(values) * 19 // 20)]))
