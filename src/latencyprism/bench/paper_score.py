"""The score of the LatencyPrism paper, read generously: which kind of fault its ranking names first.

Score of a row = |difference of mean beta| x (|Z of beta| + |Z of log(1 + mu)|), with the spread of the normal
period; a row that is missing in a period counts as 0 there. A row speaks for the fault that its counter
stands for, else for that of its operation.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from latencyprism.diagnose.artefact.layers import layer_of
from latencyprism.diagnose.artefact.tables import CycleKey, Row

_SMALLEST = 1e-9
_BY_COUNTER = (
    ("host_cpu_usage", "cpu.neighbour"), ("cpu_frequency", "cpu.frequency"), ("sm_frequency", "xpu.clock"),
    ("gpu_frequency", "xpu.clock"), ("gpu_link", "xpu.link"), ("pcie", "xpu.pcie"),
)  # fmt: skip
_BY_LAYER = {
    "oncpu": "cpu.neighbour", "runq": "cpu.neighbour", "write": "cpu.neighbour", "collective": "xpu.link",
    "h2d": "xpu.pcie", "d2h": "xpu.pcie", "gemm": "xpu.clock", "kernel": "xpu.clock", "d2d": "xpu.clock",
    "memset": "xpu.clock",
}  # fmt: skip

Identity = tuple[str, str, str, str]


def kinds(rows: Mapping[str, Sequence[Row]]) -> list[str]:
    """Kinds of fault in the order of their best row; empty where a period has no table."""
    if not rows.get("normal") or not rows.get("abnormal"):
        return []
    found: list[str] = []
    for (operation, device, metric, kind), _ in ranking(rows):
        named = next((cause for word, cause in _BY_COUNTER if word in metric), None)
        named = named or _BY_LAYER.get(layer_of(kind, operation, device))
        if named is not None and named not in found:
            found.append(named)
    return found


def ranking(rows: Mapping[str, Sequence[Row]]) -> list[tuple[Identity, float]]:
    """Rows by score, the highest first; those with no metric are dropped, as the paper does."""
    cycles = {period: len({row.cycle for row in each}) for period, each in rows.items()}
    betas = {period: _collect(each, "beta_pct") for period, each in rows.items()}
    mus = {period: _collect(each, "mu_pct") for period, each in rows.items()}
    scores = []
    for identity in betas["normal"].keys() | betas["abnormal"].keys():
        before = _padded(betas["normal"].get(identity, {}), cycles["normal"])
        now = _padded(betas["abnormal"].get(identity, {}), cycles["abnormal"])
        mu_before = np.log1p(_padded(mus["normal"].get(identity, {}), cycles["normal"]))
        mu_now = np.log1p(_padded(mus["abnormal"].get(identity, {}), cycles["abnormal"]))
        moved = abs(float(now.mean() - before.mean()))
        score = moved * (_z(before, now) + _z(mu_before, mu_now))
        scores.append((identity, score))
    return sorted(scores, key=lambda item: (-item[1], item[0]))


def _collect(rows: Sequence[Row], field: str) -> dict[Identity, dict[CycleKey, float]]:
    found: dict[Identity, dict[CycleKey, float]] = defaultdict(dict)
    for row in rows:
        value = getattr(row, field)
        if row.metric and row.metric != "N/A":
            found[row.operation, row.device, row.metric, row.kind][row.cycle] = (
                value if value == value else 0.0
            )
    return found


def _padded(values: Mapping[CycleKey, float], cycles: int) -> np.typing.NDArray[np.float64]:
    out = np.zeros(max(1, cycles))
    out[: len(values)] = np.maximum(list(values.values()), 0.0) if values else 0.0
    return out


def _z(before: np.typing.NDArray[np.float64], now: np.typing.NDArray[np.float64]) -> float:
    return abs(float(now.mean() - before.mean())) / max(float(before.std()), _SMALLEST)
