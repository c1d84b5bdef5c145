"""Features: cost per call by layer, cycle by cycle, and counters second by second, as log values.

Cost per call does not depend on how a cycle is defined, nor on what else became slow, as a share of the cycle
does. Of collectives only the fastest rank counts: the others' time is waiting for it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from latencyprism.diagnose.artefact.tables import Counters, Cycle, CycleKey, OpKey

Array = npt.NDArray[np.float64]

LAYERS = {
    "oncpu": "threads on a CPU, per switch",
    "runq": "waiting for a CPU, per event",
    "write": "write calls",
    "gemm": "matrix multiplications",
    "kernel": "other kernels",
    "h2d": "copies host to device",
    "d2h": "copies device to host",
    "d2d": "copies within the device",
    "memset": "memory sets on the device",
    "collective": "collectives on the fastest rank",
}
COUNTERS = {
    "host_cpu": "CPU use of the host",
    "cpu_frequency": "CPU clock",
    "sm_frequency": "SM clock of the fastest device",
    "link_bytes": "bytes over device links",
    "pcie_bytes": "bytes over PCIe",
}
_QUIET_BYTES = 1e8
"""Bytes a second below which traffic on a link is not told apart."""


class Prices(NamedTuple):
    """What a call costs normally, by operation, microseconds, and a layer's mean cost of a call."""

    calls: dict[OpKey, float]
    layers: dict[str, float]


def prices(cycles: Iterable[Cycle]) -> Prices:
    spent: dict[OpKey, list[float]] = defaultdict(lambda: [0.0, 0.0])
    by_layer: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for cycle in cycles:
        for key, (microseconds, calls) in cycle.spent.items():
            for total in (spent[key], by_layer[key[0]]):
                total[0] += microseconds
                total[1] += calls
    each = {key: cost / calls for key, (cost, calls) in spent.items() if calls and cost > 0}
    return Prices(each, {layer: cost / calls for layer, (cost, calls) in by_layer.items() if calls})


def stretches(cycle: Cycle, normal: Prices) -> dict[str, float]:
    """By layer: how many times longer its calls took than the same calls normally take."""
    took: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for key, (microseconds, calls) in cycle.spent.items():
        if key[0] and key in normal.calls:
            took[key[0]][0] += microseconds
            took[key[0]][1] += calls * normal.calls[key]
    return {layer: spent / due for layer, (spent, due) in took.items() if due > 0 and spent > 0}


def layer_values(cycles: Mapping[CycleKey, Cycle], normal: Prices) -> dict[str, Array]:
    """Stretch by layer, one value for each cycle; of collectives the least over ranks."""
    found: dict[str, list[float]] = defaultdict(list)
    fastest: dict[str, float] = {}
    for (_, number), cycle in cycles.items():
        for layer, stretch in stretches(cycle, normal).items():
            if layer == "collective":
                fastest[number] = min(stretch, fastest.get(number, math.inf))
            else:
                found[layer].append(stretch)
    if fastest:
        found["collective"] = list(fastest.values())
    return {layer: np.array(values) for layer, values in found.items()}


def counter_values(counters: Counters) -> dict[str, Array]:
    """Each known counter, one value a second, on its own scale (percent, MHz, bytes a second)."""
    found = {
        "host_cpu": _by_second(counters, ("host_cpu_usage",), np.mean),
        "cpu_frequency": _by_second(counters, ("cpu_frequency",), np.mean),
        "sm_frequency": _by_second(counters, ("gpu_sm_frequency", "gpu_frequency"), np.max),
        "link_bytes": _by_second(counters, ("gpu_link_transmit", "gpu_link_receive"), np.sum),
        "pcie_bytes": _by_second(counters, ("gpu_pcie_transmit", "gpu_pcie_receive"), np.sum),
    }
    return {name: values for name, values in found.items() if len(values)}


def _by_second(counters: Counters, names: tuple[str, ...], join: object) -> Array:
    """The devices are not told apart: what was read within one second is joined."""
    points = next((counters[name] for name in names if counters.get(name)), [])
    seconds: dict[int, list[float]] = defaultdict(list)
    for at, value in points:
        seconds[int(at)].append(value)
    return np.array([float(join(seconds[s])) for s in sorted(seconds)])  # type: ignore[operator]


def on_log_scale(name: str, values: Array) -> Array:
    quiet = _QUIET_BYTES if name.endswith("_bytes") else 1e-3
    return np.asarray(np.log(np.maximum(values, 0.0) + quiet))
