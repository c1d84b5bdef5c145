"""What recorded runs say of the localiser: confusion, top-1 and top-3, calibration, verdicts on healthy runs.

Everything is worked out anew from the frozen features, with the signatures of today; nothing is fitted to the
runs, so leaving a run or an engine out changes nothing but the numbers that are shown by engine.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from latencyprism.diagnose import posterior
from latencyprism.diagnose.localiser import ranked
from latencyprism.diagnose.shifts import Shift
from latencyprism.diagnose.signatures import Table, builtin_table

Line = Mapping[str, Any]
NONE, UNKNOWN = "none", "unknown"
REACHED = (
    ("75 % and more", 0.75), ("35 to 75 %", 0.35), ("17 to 35 %", 0.17), ("6 to 17 %", 0.06),
    ("less than 6 %", -math.inf),
)  # fmt: skip
"""Slow-down of the steps and the least share that counts so: about 100, 50, 25, 10 %, and hardly any."""


def shifts(line: Line) -> dict[str, Shift]:
    """The frozen features of a run."""
    found = {}
    for name, (where, *numbers) in line["shifts"].items():
        normal, now, moved, sigma, spread = (math.nan if v is None else float(v) for v in numbers)
        found[name] = Shift(name, str(where), normal, now, moved, sigma, spread)
    return found


def causes_of(line: Line) -> list[str]:
    return [] if line["truth"] == NONE else str(line["truth"]).split("+")


def rank(line: Line, table: Table) -> list[tuple[str, float]]:
    return [(r.cause, r.probability) for r in ranked(posterior.judged(table, shifts(line)))]


def score(lines: Sequence[Line], table: Table | None = None) -> dict[str, Any]:
    """Runs whose injection took no effect are counted and left out of everything else."""
    table = table or builtin_table()
    used = [line for line in lines if line["effective"]]
    judged = [(line, rank(line, table)) for line in used]
    single = [(line, r) for line, r in judged if len(causes_of(line)) == 1]
    healthy = [r for line, r in judged if not causes_of(line)]
    return {
        "runs": len(lines),
        "without_effect": len(lines) - len(used),
        "causes": len({line["truth"] for line, _ in single}),
        "by_strength": {f"{s:g}": _hits(rows) for s, rows in _grouped(single, "strength")},
        "by_reached": {name: _hits(rows) for name, rows in _by_reached(single).items()},
        "by_engine": {str(e): _hits(rows) for e, rows in _grouped(single, "engine")},
        "by_cause": {str(c): _hits(rows) for c, rows in _grouped(single, "truth")},
        "strong": _hits([row for row in single if row[0]["strength"] >= 0.5]),
        "healthy": {
            "runs": len(healthy),
            "cause_named": sum(r[0][0] not in (NONE, UNKNOWN) for r in healthy),
        },
        "pairs": _pairs(judged),
        "unseen": _unseen([line for line, _ in single if line["strength"] >= 0.5], table),
        "calibration": _calibration(judged),
        "first_right_s": _times(single),
        "paper": _paper(single),
        "confusion": confusion(judged),
    }


def _grouped(rows: Iterable[tuple[Line, Any]], key: str) -> list[tuple[Any, list[tuple[Line, Any]]]]:
    found: dict[Any, list[tuple[Line, Any]]] = defaultdict(list)
    for row in rows:
        found[row[0][key]].append(row)
    return sorted(found.items(), key=lambda item: str(item[0]))


def _by_reached(rows: Sequence[tuple[Line, Any]]) -> dict[str, list[tuple[Line, Any]]]:
    """By the slow-down that was measured, whatever was aimed at: nothing can be seen in steps that took as
    long as before."""
    found: dict[str, list[tuple[Line, Any]]] = {name: [] for name, _ in REACHED}
    for row in rows:
        found[next(name for name, least in REACHED if row[0]["slow"] >= least)].append(row)
    return found


def _hits(rows: Sequence[tuple[Line, list[tuple[str, float]]]]) -> dict[str, Any]:
    first = sum(r[0][0] == line["truth"] for line, r in rows)
    third = sum(line["truth"] in [name for name, _ in r[:3]] for line, r in rows)
    count = len(rows)
    return {"runs": count, "top1": _share(first, count), "top3": _share(third, count)}


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None


def _pairs(judged: Sequence[tuple[Line, list[tuple[str, float]]]]) -> dict[str, Any]:
    rows = [(set(causes_of(line)), {name for name, _ in r[:3]}) for line, r in judged]
    rows = [(truth, top) for truth, top in rows if len(truth) == 2]
    return {
        "runs": len(rows),
        "both_in_top3": _share(sum(truth <= top for truth, top in rows), len(rows)),
        "one_in_top3": _share(sum(bool(truth & top) for truth, top in rows), len(rows)),
    }


def _unseen(lines: Sequence[Line], table: Table) -> dict[str, Any]:
    """Each cause taken out of the catalogue: is it then unknown, or at least called by its family?"""
    count = said = family = 0
    for line in lines:
        less = replace(table, causes={c: s for c, s in table.causes.items() if c != line["truth"]})
        name = rank(line, less)[0][0]
        count += 1
        said += name == UNKNOWN
        family += name == UNKNOWN or name.split(".")[0] == str(line["truth"]).split(".")[0]
    return {"runs": count, "unknown": _share(said, count), "unknown_or_family": _share(family, count)}


def _calibration(judged: Sequence[tuple[Line, list[tuple[str, float]]]]) -> list[dict[str, Any]]:
    found = []
    for low, high in ((0.0, 0.5), (0.5, 0.7), (0.7, 0.9), (0.9, 0.99), (0.99, 1.01)):
        rows = [(line, r[0]) for line, r in judged if low < r[0][1] <= high]
        right = sum(_right(line, name) for line, (name, _) in rows)
        found.append({"above": low, "runs": len(rows), "right": _share(right, len(rows))})
    return found


def _right(line: Line, name: str) -> bool:
    return name in causes_of(line) if causes_of(line) else name == NONE


def _times(single: Sequence[tuple[Line, Any]]) -> dict[str, Any]:
    """Seconds of suspect steps after which the verdict was first right, as it was told at the time."""
    seconds = []
    for line, _ in single:
        right = [at for at, name, _ in line.get("looks", []) if name == line["truth"]]
        if right:
            seconds.append(min(right))
    counts = {f"{at:g}": seconds.count(at) for at in sorted(set(seconds))}
    return {"runs": len(single), "ever": len(seconds), "at_seconds": counts}


def paper_kinds(line: Line, table: Table) -> list[str]:
    """The paper's score on the same features, read generously: signals by change of share x (Z of share +
    Z of value); each stands for every cause that it is a key of."""
    scores: dict[str, float] = {}
    slow = max(0.05, 1 + line["slow"])
    for name, shift in shifts(line).items():
        spread = max(shift.spread if shift.spread == shift.spread else 0.0, 1e-9)
        share = abs(shift.now / slow - shift.normal)
        scores[name] = share * (share / spread + abs(shift.now - shift.normal) / spread)
    found: list[str] = []
    for name in sorted(scores, key=lambda n: (-scores[n], n)):
        found += [c for c, s in table.causes.items() if name in s.key and c not in found]
    return found


def _paper(single: Sequence[tuple[Line, Any]]) -> dict[str, Any]:
    """A signal that is the key of several causes counts as right if any of them is."""
    table = builtin_table()
    first = third = 0
    for line, _ in single:
        kinds = paper_kinds(line, table)
        keys = table.causes[line["truth"]].key if line["truth"] in table.causes else ()
        sharing = {c for c, s in table.causes.items() if set(s.key) & set(keys)}
        first += bool(kinds) and kinds[0] in sharing
        third += line["truth"] in kinds[:3]
    return {"runs": len(single), "top1": _share(first, len(single)), "top3": _share(third, len(single))}


def confusion(judged: Sequence[tuple[Line, list[tuple[str, float]]]]) -> dict[str, dict[str, int]]:
    """Truth -> what was named first -> runs; of two causes at once either is counted as itself."""
    found: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for line, ranking in judged:
        if len(causes_of(line)) <= 1:
            found[str(line["truth"])][ranking[0][0]] += 1
    return {truth: dict(row) for truth, row in sorted(found.items())}
