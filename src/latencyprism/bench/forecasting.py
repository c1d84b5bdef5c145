"""Was the forecast right? Each prediction against what became of its request."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from latencyprism.records import Request
from latencyprism.slo.forecast import Outlook

GRID_NS = 200_000_000
AHEAD_NS = 1_000_000_000
BINS = 10
FEW = 100


class Sample(NamedTuple):
    """One request in one outlook, before its outcome was settled."""

    time_ns: int
    request: int
    chance: float
    waiting: bool


class Scorer:
    """Feed it outlooks and ended requests; ``result`` compares."""

    def __init__(self, limits_ns: Mapping[str, int]) -> None:
        self.limits_ns = dict(limits_ns)
        self._samples: dict[str, list[Sample]] = {"ttft": [], "tpot": []}
        self._outlooks: list[Outlook] = []
        self._ends: dict[int, Request] = {}
        self._sampled_ns = 0

    def look(self, outlook: Outlook) -> None:
        if outlook.time_ns - self._sampled_ns < GRID_NS:
            return
        self._sampled_ns = outlook.time_ns
        self._outlooks.append(outlook)
        for fate in outlook.fates:
            if fate.ttft is not None and fate.waiting:
                self._samples["ttft"].append(Sample(outlook.time_ns, fate.request, fate.ttft, True))
            if fate.tpot is not None:
                self._samples["tpot"].append(Sample(outlook.time_ns, fate.request, fate.tpot, fate.waiting))

    def ended(self, requests: Iterable[Request]) -> None:
        for request in requests:
            self._ends[request.request] = request

    def result(self) -> dict[str, Any]:
        return {
            "requests": len(self._ends),
            **{metric: self._metric(metric) for metric in ("ttft", "tpot")},
            "share": self._shares(),
        }

    def _metric(self, metric: str) -> dict[str, Any]:
        limit_ns = self.limits_ns[metric]
        values = [_value(request, metric) for request in self._ends.values()]
        known = [value for value in values if value is not None]
        everywhere, ahead, running = [], [], []
        for number, samples in _by_request(self._samples[metric]).items():
            request = self._ends.get(number)
            value = _value(request, metric) if request is not None else None
            if request is None or value is None or request.arrival_ns is None:
                continue
            violated = value > limit_ns
            if metric == "ttft":  # once its limit is over nothing is left to foretell
                samples = [s for s in samples if s.time_ns < request.arrival_ns + limit_ns]
            everywhere += [(sample.chance, violated) for sample in samples]
            due_ns = _due_ns(request, metric, limit_ns)
            before = [s for s in samples if s.time_ns <= due_ns - AHEAD_NS]
            if before and due_ns - AHEAD_NS - before[-1].time_ns <= 2 * GRID_NS:
                ahead.append((before[-1].chance, violated))
                if not before[-1].waiting:
                    running.append(ahead[-1])
        told = {
            "limit_ms": round(limit_ns / 1e6, 2),
            "violated_share": round(sum(v > limit_ns for v in known) / len(known), 4) if known else None,
            "one_second_ahead": {"n": len(ahead), "violated": sum(v for _, v in ahead), "auc": auc(ahead)},
            "any_time_before": {
                "n": len(everywhere), "auc": auc(everywhere), "calibration": calibration(everywhere),
            },
        }  # fmt: skip
        if running:
            violated_running = sum(v for _, v in running)
            told["running_one_second_ahead"] = {
                "n": len(running), "violated": violated_running, "auc": auc(running),
            }  # fmt: skip
        return told

    def _shares(self) -> dict[str, Any]:
        """How often the share that came true lay within the interval that was told."""
        inside, off, told = 0, [], 0
        for outlook in self._outlooks:
            truths = [self._violates(fate.request) for fate in outlook.fates]
            known = [truth for truth in truths if truth is not None]
            if len(known) < 3 or len(known) < len(truths) or outlook.share is None:
                continue
            told += 1
            true_share = sum(known) / len(known)
            assert outlook.low is not None and outlook.high is not None
            inside += outlook.low - 1e-9 <= true_share <= outlook.high + 1e-9
            off.append(outlook.share - true_share)
        return {
            "outlooks": told,
            "inside_interval": round(inside / told, 3) if told else None,
            "mean_error": round(float(np.mean(off)), 4) if off else None,
            "mean_absolute_error": round(float(np.mean(np.abs(off))), 4) if off else None,
        }

    def _violates(self, number: int) -> bool | None:
        request = self._ends.get(number)
        if request is None:
            return None
        values = {metric: _value(request, metric) for metric in self.limits_ns}
        return any(value is not None and value > self.limits_ns[metric] for metric, value in values.items())


def _value(request: Request, metric: str) -> int | None:
    return request.ttft_ns if metric == "ttft" else request.tpot_ns


def _due_ns(request: Request, metric: str, limit_ns: int) -> int:
    """TTFT: when its limit was over for those that still waited, at the same age for all, so that the time of
    the forecast does not give the outcome away. TPOT: when the answer was complete."""
    arrival = request.arrival_ns or 0
    return arrival + limit_ns if metric == "ttft" else arrival + (request.e2e_ns or 0)


def _by_request(samples: Sequence[Sample]) -> dict[int, list[Sample]]:
    found: dict[int, list[Sample]] = {}
    for sample in samples:
        found.setdefault(sample.request, []).append(sample)
    return found


def auc(pairs: Sequence[tuple[float, bool]]) -> float | None:
    """Probability that one that violated was told the higher chance of two; None where none or all did."""
    if not pairs:
        return None
    chances = np.array([chance for chance, _ in pairs])
    truth = np.array([violated for _, violated in pairs])
    good, bad = int((~truth).sum()), int(truth.sum())
    if not good or not bad:
        return None
    ranks = _ranks(chances)
    return round(float((ranks[truth].sum() - bad * (bad + 1) / 2) / (bad * good)), 4)


def _ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """1 for the smallest; ties share their mean."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    mean = ends - (counts - 1) / 2.0
    return np.asarray(mean[inverse], dtype=np.float64)


def calibration(pairs: Sequence[tuple[float, bool]]) -> dict[str, Any]:
    """Told chance against what came true, in ten bins; points of a hundred. ``mean_gap``: weighted by the
    number of predictions; ``worst_gap``: of the bins with at least ``FEW``."""
    rows, gaps = [], []
    for place in range(BINS):
        low, high = place / BINS, (place + 1) / BINS
        inside = [(c, v) for c, v in pairs if low <= c < high or (place == BINS - 1 and c == 1.0)]
        if not inside:
            continue
        told = 100 * sum(c for c, _ in inside) / len(inside)
        true = 100 * sum(v for _, v in inside) / len(inside)
        rows.append({"told": round(told, 1), "true": round(true, 1), "n": len(inside)})
        gaps.append((len(inside), abs(told - true)))
    total = sum(n for n, _ in gaps)
    large = [gap for n, gap in gaps if n >= FEW]
    return {
        "mean_gap": round(sum(n * gap for n, gap in gaps) / total, 2) if total else None,
        "worst_gap": round(max(large), 2) if large else None,
        "bins": rows,
    }
