"""The import on folders of tables: all cycles, few cycles at part of the strength, healthy against healthy;
and the paper's score on the same draws.

Strength is a blend: each abnormal value is mixed with one of a normal cycle. What is blended in is not part
of the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from latencyprism.bench import paper_score
from latencyprism.diagnose.artefact import Folder, judge, read_folder
from latencyprism.diagnose.artefact.features import LAYERS
from latencyprism.diagnose.artefact.fit import catalogue, moves, probabilities
from latencyprism.diagnose.artefact.judge import on_scale, periods
from latencyprism.diagnose.artefact.tables import PERIODS
from latencyprism.errors import BadInput

Array = npt.NDArray[np.float64]
Values = Mapping[str, Array]

CAUSE_OF = {
    "cpu_compute_squeeze_out": "cpu.neighbour",
    "cpu_frequency_reduction": "cpu.frequency",
    "gpu_instability": "xpu.clock",
    "gpu_memory_squeeze_out_NVLink": "xpu.link",
    "gpu_memory_squeeze_out_PCIe": "xpu.pcie",
}
"""What was injected, by the name of the folder."""
CYCLES, STRENGTHS = (1, 3, 5, 10), (0.05, 0.1, 0.25, 0.5, 1.0)


@dataclass(frozen=True, slots=True)
class Pair:
    name: str
    truth: str
    folder: Folder
    seconds_a_cycle: float


def run(root: Path, draws: int, seed: int, say: Callable[[str], None]) -> dict[str, Any]:
    """``root``: a folder of pairs named after their fault, or one of folders of such (engines)."""
    pairs = [_pair(path) for path in _find(root)]
    if not pairs:
        raise BadInput(f"{root} holds no pairs", f"looked for folders named {', '.join(CAUSE_OF)}")
    rng = np.random.default_rng(seed)
    whole = {pair.name: _whole(pair) for pair in pairs}
    say(f"{len(pairs)} pairs read; {sum(row['right'] for row in whole.values())} right with all cycles")
    return {
        "pairs": whole,
        "right": sum(bool(row["right"]) for row in whole.values()),
        "paper_right": sum(bool(row["paper_right"]) for row in whole.values()),
        "of": len(pairs),
        "draws": _drawn(pairs, draws, rng, say),
        "healthy": _healthy(pairs),
    }


def _find(root: Path) -> list[Path]:
    if not root.is_dir():
        raise BadInput(f"{root} is not a folder")
    if root.name in CAUSE_OF:
        return [root]
    found = [p for name in sorted(CAUSE_OF) for p in (root / name, *sorted(root.glob(f"*/{name}")))]
    return [path for path in found if path.is_dir()]


def _pair(path: Path) -> Pair:
    folder = read_folder(path, rows=True)
    lengths = [c.anchor_us / 1e6 for c in folder.cycles.get("abnormal", {}).values() if c.anchor_us > 0]
    return Pair(
        f"{path.parent.name}/{path.name}", CAUSE_OF[path.name], folder, float(np.median(lengths or [1.0]))
    )


def _whole(pair: Pair) -> dict[str, Any]:
    verdict = judge(pair.folder)
    kinds = paper_score.kinds(pair.folder.rows)
    return {
        "truth": pair.truth,
        "verdict": verdict.cause,
        "probability": round(verdict.probability, 4),
        "right": verdict.cause == pair.truth,
        "paper": kinds[:3],
        "paper_right": kinds[:1] == [pair.truth],
        "not_looked_at": verdict.not_looked_at,
    }


def _drawn(pairs: Sequence[Pair], draws: int, rng: Any, say: Callable[[str], None]) -> list[dict[str, Any]]:
    found = []
    measured = [(pair, periods(pair.folder).values) for pair in pairs]
    for cycles in CYCLES:
        for strength in STRENGTHS:
            first = third = sure = sure_right = 0
            for pair, values in measured:
                for _ in range(draws):
                    ranked = _draw(pair, values, cycles, strength, rng)
                    names = [name for name, _ in ranked]
                    first += names[0] == pair.truth
                    third += pair.truth in names[:3]
                    if ranked[0][1] > 0.9:
                        sure += 1
                        sure_right += names[0] == pair.truth
            total = draws * len(pairs)
            found.append(
                {
                    "cycles": cycles, "strength": strength, "draws": total, "top1": round(first / total, 4),
                    "top3": round(third / total, 4), "said_over_0.9": sure, "of_these_right": sure_right,
                }
            )  # fmt: skip
        say(f"{cycles} cycles drawn")
    return found


def _draw(
    pair: Pair, values: Mapping[str, Values], cycles: int, strength: float, rng: Any
) -> list[tuple[str, float]]:
    reference: dict[str, Array] = {}
    suspect: dict[str, Array] = {}
    seconds = max(1, round(cycles * pair.seconds_a_cycle))
    for name, normal in values["normal"].items():
        abnormal = values["abnormal"].get(name)
        if abnormal is None or len(normal) < 2:
            continue
        order = rng.permutation(len(normal))
        kept = max(1, int(0.6 * len(normal)))
        reference[name] = normal[order[:kept]]
        count = cycles if name in LAYERS else seconds
        blend = rng.choice(normal[order[kept:]], count)
        suspect[name] = strength * rng.choice(abnormal, count) + (1 - strength) * blend
    table = catalogue()
    chances = probabilities(moves(on_scale(reference), on_scale(suspect), table.floor), table)
    return sorted(chances.items(), key=lambda item: (-item[1], item[0]))


def _healthy(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Normal runs against each other, where they have as many ranks."""
    named, compared = [], 0
    for one in pairs:
        for other in pairs:
            both = [pair.folder.cycles.get("normal", {}) for pair in (one, other)]
            ranks = [{pid for pid, _ in cycles} for cycles in both]
            if (
                one is other
                or len(ranks[0]) != len(ranks[1])
                or one.name.split("/")[0] != other.name.split("/")[0]
            ):
                continue
            counters = [pair.folder.counters.get("normal", {}) for pair in (one, other)]
            verdict = judge(Folder(dict(zip(PERIODS, both)), dict(zip(PERIODS, counters))))
            compared += 1
            if verdict.cause not in ("none", "unknown"):
                named.append({"normal": one.name, "as_abnormal": other.name, "cause": verdict.cause})
    return {"compared": compared, "cause_named": len(named), "named": named}
