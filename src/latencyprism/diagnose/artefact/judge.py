"""A Verdict on a folder of tables."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from latencyprism.diagnose import advice
from latencyprism.diagnose.artefact.features import (
    COUNTERS,
    LAYERS,
    Array,
    counter_values,
    layer_values,
    on_log_scale,
    prices,
)
from latencyprism.diagnose.artefact.fit import Move, catalogue, moves, probabilities
from latencyprism.diagnose.artefact.tables import PERIODS, Cycle, CycleKey, Folder
from latencyprism.diagnose.evidence import survivors, t4_two_sided_p
from latencyprism.records import Evidence, Ranked, Verdict

_LEAST_MOVED = {"layer": 0.03, "counter": 0.05}
_MOST_LINES = 8
_SLOWER = 1.05
_UNITS = {"host_cpu": " %", "cpu_frequency": " MHz", "sm_frequency": " MHz"}


class Periods(NamedTuple):
    """By period the features as they are, and the microseconds that a call of a layer normally costs."""

    values: dict[str, dict[str, Array]]
    call_us: dict[str, float]


def periods(folder: Folder) -> Periods:
    values: dict[str, dict[str, Array]] = {period: {} for period in PERIODS}
    call_us: dict[str, float] = {}
    if "normal" in folder.cycles and "abnormal" in folder.cycles:
        normal = prices(folder.cycles["normal"].values())
        call_us = normal.layers
        for period in PERIODS:
            values[period].update(layer_values(folder.cycles[period], normal))
    for period, counters in folder.counters.items():
        values[period].update(counter_values(counters))
    return Periods(values, call_us)


def on_scale(values: Mapping[str, Array]) -> dict[str, Array]:
    return {name: on_log_scale(name, each) for name, each in values.items()}


def judge(folder: Folder) -> Verdict:
    """What sets the abnormal period apart from the normal one. Sources that are missing on either side are in
    ``not_looked_at``; ``seconds`` is what the abnormal cycles (or counters) span."""
    found = periods(folder)
    table = catalogue()
    shifts = moves(on_scale(found.values["normal"]), on_scale(found.values["abnormal"]), table.floor)
    chances = probabilities(shifts, table)
    ranking = [Ranked(cause, p) for cause, p in sorted(chances.items(), key=lambda item: (-item[1], item[0]))]
    top = ranking[0]
    said = _lines(top.cause, shifts, found)
    impact = _impact(folder)
    if impact is not None:
        said.append(impact)
    lost = list(folder.missing)
    names = {**LAYERS, **COUNTERS}
    unseen = [text for name, text in names.items() if name not in shifts]
    if not shifts:
        lost.append("anything: nothing was observed in both periods")
    elif unseen:
        lost.append("not in both periods: " + ", ".join(unseen))
    cycles = len(folder.cycles.get("abnormal", ()))
    seconds = round(_seconds(folder), 3)
    return Verdict(
        top.cause, top.probability, ranking, said, cycles, seconds, lost,
        remedy=advice.remedies([top.cause]), settle=advice.settle(ranking),
    )  # fmt: skip


def _lines(cause: str, shifts: Mapping[str, Move], found: Periods) -> list[Evidence]:
    """What moved beyond doubt, the cause's own features first, then by how clearly."""
    names = survivors({name: t4_two_sided_p(move.z) for name, move in shifts.items()})
    signature = catalogue().causes.get(cause)
    own = signature.moves if signature is not None else {}
    large = [n for n in names if abs(shifts[n].moved) > _LEAST_MOVED["layer" if n in LAYERS else "counter"]]
    large.sort(key=lambda name: (name not in own, -abs(shifts[name].z), name))
    return [_line(name, shifts[name], found) for name in large[:_MOST_LINES]]


def _line(name: str, move: Move, found: Periods) -> Evidence:
    ratio = math.exp(move.moved)
    before = float(np.median(found.values["normal"][name]))
    now = float(np.median(found.values["abnormal"][name]))
    if name in LAYERS:
        normal_us, now_us = (found.call_us[name] * value for value in (before, now))
        cost = f"{normal_us:.3g} -> {now_us:.3g} us"
        text = f"{LAYERS[name]}: {_change(ratio)} a call, mix of calls held fixed ({cost})"
        return Evidence(name, round(normal_us, 4), round(now_us, 4), text)
    unit = _UNITS.get(name, " bytes/s")
    text = f"{COUNTERS[name]}: {before:.3g} -> {now:.3g}{unit}"
    return Evidence(name, round(before, 4), round(now, 4), text)


def _change(ratio: float) -> str:
    return f"{ratio:.1f} times" if ratio >= 4 else f"{100 * (ratio - 1):+.0f} %"


def _impact(folder: Folder) -> Evidence | None:
    """Whether cycles take longer; only where both periods delimit them by the same function."""
    if not all(folder.cycles.get(period) for period in PERIODS):
        return None
    anchors = {period: {cycle.anchor for cycle in folder.cycles[period].values()} for period in PERIODS}
    if anchors["normal"] != anchors["abnormal"] or len(anchors["normal"]) != 1:
        text = "the periods delimit cycles by different functions: their lengths are not compared"
        return Evidence("cycle_ms", None, None, text)
    before, now = (_cycle_ms(folder.cycles[period]) for period in PERIODS)
    if before is None or now is None:
        return None
    text = f"a cycle takes {now:.0f} ms, normally {before:.0f} ms"
    if now < _SLOWER * before:
        text += ": whatever moved is hidden in waiting, latency does not suffer yet"
    return Evidence("cycle_ms", round(before, 3), round(now, 3), text)


def _cycle_ms(cycles: Mapping[CycleKey, Cycle]) -> float | None:
    lengths = [cycle.anchor_us / 1e3 for cycle in cycles.values() if cycle.anchor_us > 0]
    return float(np.median(lengths)) if lengths else None


def _seconds(folder: Folder) -> float:
    by_rank: dict[str, float] = {}
    for (pid, _), cycle in folder.cycles.get("abnormal", {}).items():
        if cycle.anchor_us > 0:
            by_rank[pid] = by_rank.get(pid, 0.0) + cycle.anchor_us / 1e6
    if by_rank:
        return max(by_rank.values())
    times = [at for points in folder.counters.get("abnormal", {}).values() for at, _ in points]
    return max(times) - min(times) if times else 0.0
