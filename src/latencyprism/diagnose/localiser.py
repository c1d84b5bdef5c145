"""localise: two windows in, a Verdict out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from latencyprism.diagnose import advice, evidence, posterior
from latencyprism.diagnose.accounts import culprits, per_normal_cpu, visited_cpus
from latencyprism.diagnose.location import where
from latencyprism.diagnose.shifts import Shift, blocks, compare
from latencyprism.diagnose.signals import Expectations, Values, WindowReader, worked
from latencyprism.diagnose.signatures import Table, builtin_table
from latencyprism.diagnose.waits import preemptors
from latencyprism.records import Evidence, Ranked, Verdict, Window

_NEEDED = {
    "slow": "step times (too few steps in the reference or none in the suspect window)",
    "runqueue": "run-queue latency of the engine's threads",
    "foreign": "CPU time of other processes",
    "throttled": "CPU quota throttling",
    "gc": "garbage collector time",
    "preempted": "preemptions",
    "stopped": "thread states",
}
_LEAST_CULPRIT_CORES = 0.05
_MOST_CULPRITS = 3


class Compared(NamedTuple):
    """``extents``: of the reference and the suspect window, None where one is empty."""

    before: WindowReader
    now: WindowReader
    extents: tuple[tuple[int, int], tuple[int, int]] | None
    shifts: dict[str, Shift]
    seconds: float


def localise(
    reference: Window,
    suspect: Window,
    *,
    roles: Mapping[int, str],
    not_available: Sequence[str] = (),
    table: Table | None = None,
) -> Verdict:
    """Names the cause that best explains how ``suspect`` differs from ``reference``.

    ``roles`` is the one that the host sampler was given (pid -> role). The reference should be several times
    longer than the suspect window: what stretches of that length do by themselves is learned from it. Any
    source may be missing; ``not_available`` and what is found missing here go to ``not_looked_at``. The
    probabilities include ``none`` (steps take what their work explains) and ``unknown``, and sum to 1.
    """
    table = table or builtin_table()
    seen = compared(reference, suspect, roles=roles, table=table)
    if seen.extents is None:
        lost = [*not_available, "the reference or the suspect window is empty"]
        return Verdict("unknown", 1.0, [Ranked("unknown", 1.0)], [], len(suspect.steps), seen.seconds, lost)
    before, now, shifts, expected = seen.before, seen.now, seen.shifts, seen.before.expected
    chances = posterior.judged(table, shifts)
    ranking = ranked(chances)
    together = together_of(chances)
    step_ms = expected.step.typical / 1e6 if expected is not None else None
    said = evidence.lines(table, ranking[0].cause, shifts, step_ms)
    if ranking[0].cause not in ("none", "unknown"):
        said = _culprit_lines(ranking[0].cause, before, now, seen.extents) + said
    place = where(reference, suspect, expected)
    if place not in ("not located", "no excess"):
        said.append(Evidence("where", None, None, f"most of the lost time is in: {place}"))
    missing = [what for signal, what in _NEEDED.items() if signal not in shifts]
    lost = list(dict.fromkeys([*not_available, *missing]))
    top = ranking[0]
    return Verdict(
        top.cause,
        top.probability,
        ranking,
        said,
        len(now.steps),
        seen.seconds,
        lost,
        together=together,
        together_probability=chances.together_probability if together else None,
        remedy=advice.remedies(together or [top.cause]),
        settle=advice.settle(ranking, together),
    )


def ranked(chances: posterior.Chances) -> list[Ranked]:
    """Causes by probability; ties by name, so that the same evidence gives the same order."""
    items = sorted(chances.causes.items(), key=lambda item: (-item[1], item[0]))
    return [Ranked(cause, p) for cause, p in items]


def together_of(chances: posterior.Chances) -> list[str]:
    """Two causes at once, where that alone is likelier than everything else."""
    if chances.together_probability <= 0.5:
        return []
    return sorted(chances.together, key=lambda cause: (-chances.causes[cause], cause))


def compared(
    reference: Window, suspect: Window, *, roles: Mapping[int, str], table: Table | None = None
) -> Compared:
    """The two windows, measured; the first half of ``localise``."""
    expected = Expectations.learn(worked(reference.steps))
    before, now = WindowReader(reference, roles, expected), WindowReader(suspect, roles, expected)
    extents = (before.extent(), now.extent())
    seconds = (extents[1][1] - extents[1][0]) / 1e9 if extents[1] is not None else 0.0
    if extents[0] is None or extents[1] is None or extents[0][0] == extents[0][1]:
        return Compared(before, now, None, {}, seconds)
    known = (extents[0], extents[1])
    return Compared(before, now, known, _shifts(table or builtin_table(), before, now, known), seconds)


def _shifts(
    table: Table,
    before: WindowReader,
    now: WindowReader,
    extents: tuple[tuple[int, int], tuple[int, int]],
) -> dict[str, Shift]:
    suspect_ns = max(1, extents[1][1] - extents[1][0])
    normal = before.measure(*extents[0])
    present = now.measure(*extents[1])
    if not now.steps:
        present.update(_silence(before, extents[0]))
    parts = [per_normal_cpu(part, normal) for part in blocks(before, extents[0], suspect_ns)]
    unfamiliar = before.expected.step.unfamiliar(now.steps) if before.expected is not None else 0.0
    return compare(table, per_normal_cpu(normal, normal), parts, per_normal_cpu(present, normal), unfamiliar)


def _silence(before: WindowReader, extent: tuple[int, int]) -> Values:
    """No step at all, from an engine that was hardly ever idle: the whole window is one stall."""
    busy_ns = sum(step.duration_ns for step in before.steps)
    if busy_ns < 0.8 * (extent[1] - extent[0]):
        return {}
    return {("slow", ""): 1.0, ("stall", ""): 1.0}


def _culprit_lines(
    cause: str, before: WindowReader, now: WindowReader, extents: tuple[tuple[int, int], tuple[int, int]]
) -> list[Evidence]:
    """The processes that burn more CPU now, by name, where the cause is one that others bring about."""
    if cause not in ("cpu.neighbour", "memory.bandwidth", "disk.stall", "memory.reclaim"):
        return []
    said: list[Evidence] = []
    if now.tracks.foreign is None:
        return preemptors(now.spans, now.roles)
    ours = visited_cpus(now.tracks, now.roles)
    for cores, normal, pid, cpu, name, cgroup in culprits(now.tracks.foreign, before.tracks.foreign, extents):
        if cores - normal < _LEAST_CULPRIT_CORES or len(said) == _MOST_CULPRITS:
            break
        if cause == "cpu.neighbour" and cpu not in ours:
            continue
        group = f", cgroup {cgroup}" if cgroup not in ("", "/") else ""
        said.append(
            Evidence(
                "culprit",
                round(normal, 4),
                round(cores, 4),
                f"process {pid} ({name}{group}) burns {100 * cores:.0f} % of CPU {cpu}, "
                f"normally {100 * normal:.0f} %",
            )
        )
    return said
