"""PyTorch's own profiler in a process of the lab for some steps: the truth for the operator probe.

Its stop and its reading hold up the process for as long as they take; nothing is measured after it.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from latencyprism.agent.assemble import bootstrap
from latencyprism.agent.operator_ring import OperatorRecords
from latencyprism.attach.inject import Injector
from latencyprism.attach.shared_folder import owner_of, shared_folder
from latencyprism.errors import PrismError
from latencyprism.records import NULL, Step
from latencyprism.timeline.operators import BY_A_STRING, operators_of

START = """
import sys
if "_latencyprism_bench_profiler" not in sys.modules:
    from torch.profiler import ProfilerActivity, profile
    kept = type(sys)("_latencyprism_bench_profiler")
    sys.modules[kept.__name__] = kept
    kept.profile = profile(activities=[ProfilerActivity.CPU])
    kept.profile.start()
    open({answer!r}, "w").write("1")
"""
STOP = """
import json, os, sys
kept = sys.modules.pop("_latencyprism_bench_profiler", None)
if kept is not None:
    kept.profile.stop()
    names = [event.name() for event in kept.profile.profiler.kineto_results.events()]
    with open({answer!r} + ".part", "w") as file:
        json.dump(names, file)
    os.rename({answer!r} + ".part", {answer!r})
"""
TIMEOUT_S = 30.0


class ProfilerWindow:
    """Context manager: the profiler runs on the main thread in it. ``names`` afterwards: of all operators in
    order of their starts."""

    def __init__(self, injector: Injector) -> None:
        self._injector = injector
        self.names: list[str] = []

    def __enter__(self) -> ProfilerWindow:
        self._run(START)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        told = json.loads(self._run(STOP))
        self.names = [str(name) for name in told]

    def _run(self, text: str) -> str:
        folder, inside = shared_folder(self._injector.pid)
        name = f"lprism-{secrets.randbits(62):016x}"
        source, answer = folder / f"{name}.py", folder / f"{name}.out"
        source.write_text(text.format(answer=f"{inside}/{name}.out"))
        try:
            if os.geteuid() == 0:
                os.chown(source, *owner_of(self._injector.pid))
            self._injector.run(bootstrap(f"{inside}/{name}.py"), lambda: _whole(answer), timeout_s=TIMEOUT_S)
            return answer.read_text()
        finally:
            for path in (source, answer):
                path.unlink(missing_ok=True)


def _whole(path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_size > 0
    return False


def compare(told: Sequence[str], seen: OperatorRecords | None, steps: Sequence[Step]) -> dict[str, Any]:
    """``told`` by the profiler, ``missed`` by the probe of them; ``per_step``: what the profiler told of each
    whole step, the commonest number. PrismError if the two cannot be laid side by side."""
    found = operators_of(seen, "", steps, most=10**9) if seen is not None else []
    if not found or len(told) < 100:
        raise PrismError("the profiler cannot be compared with", f"it told of {len(told)} operators")
    own = max(found, key=lambda calls: len(calls.rows))
    names = [own.names[place].partition(".")[0] for place in own.rows["name"].tolist()]
    at, same = _aligned(told, names)
    numbers = own.rows["step"][at : at + len(told)][same]
    per_step = Counter(int(number) for number in numbers if number != NULL)
    whole = [per_step[number] for number in sorted(per_step)[1:-1]]
    return {
        "told": len(told),
        "missed": int(len(told) - same.sum()),
        "steps": len(whole),
        "per_step": Counter(whole).most_common(1)[0][0] if whole else None,
    }


def _aligned(told: Sequence[str], names: Sequence[str]) -> tuple[int, np.ndarray[Any, np.dtype[np.bool_]]]:
    """Where in ``names`` the other list lies best, and which of its entries are the same there. One that was
    named by a string fits any."""
    places = {name: place for place, name in enumerate({*told, *names})}
    wanted = np.array([places[name] for name in told])
    have = np.array([places[name] for name in names])
    by_string = have == places.get(BY_A_STRING, -1)
    room = len(have) - len(wanted)
    if room < 0:
        raise PrismError("the profiler cannot be compared with", "it told of more than the probe saw")
    head = min(64, len(wanted))
    fits = [
        int(((have[at : at + head] == wanted[:head]) | by_string[at : at + head]).sum())
        for at in range(room + 1)
    ]
    best = sorted(range(room + 1), key=lambda at: -fits[at])[:200]
    scored = [((have[at : at + len(wanted)] == wanted) | by_string[at : at + len(wanted)], at) for at in best]
    same, at = max(scored, key=lambda pair: int(pair[0].sum()))
    return at, same
