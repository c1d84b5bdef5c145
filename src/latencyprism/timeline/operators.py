"""Operators of a deep dive: starts and ends matched per thread, placed on the timeline, joined to steps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from latencyprism.agent.operator_ring import OperatorRecords
from latencyprism.records import NULL, Step
from latencyprism.records.operators import OPERATOR_DTYPE, Operators

BY_A_STRING = "(named by a string)"
MOST_CALLS = 600_000
"""Of one process in one capture: some 13 bytes each in the file."""

Words = npt.NDArray[np.int64]


def operators_of(
    seen: OperatorRecords, process: str, steps: Sequence[Step], most: int = MOST_CALLS
) -> list[Operators]:
    """``calls_of``, joined to ``steps``, of which all are kept or some: see ``thinned``."""
    return thinned(calls_of(seen, process), steps, most)


def calls_of(seen: OperatorRecords, process: str) -> list[Operators]:
    """What one dive saw of one process, one ``Operators`` a thread; times CLOCK_MONOTONIC, no steps yet.

    A call whose start or end was not recorded is left out, so that every call that is there is whole."""
    if not len(seen.chunks) or len(seen.readings) < 2:
        return []
    rows = np.concatenate(list(seen.chunks))
    times = _times(rows[:, 0], seen.readings)
    pointers = rows[:, 2] & ~1
    names, places = _names(rows[:, 1], seen)
    # Which records were lost is not known: nothing is matched across a loss.
    stretch = np.concatenate(([0], np.cumsum(np.diff(rows[:, 3]) != 1)))
    found: list[Operators] = []
    for pointer in _by_first(pointers):
        own = np.flatnonzero(pointers == pointer)
        begun, ended = _matched(rows[own, 2] & 1, stretch[own])
        if len(begun):
            table = np.empty(len(begun), OPERATOR_DTYPE)
            table["start_ns"], table["end_ns"] = times[own[begun]], times[own[ended]]
            table["name"], table["step"] = places[own[begun]], NULL
            found.append(Operators((process, _lane(seen, int(pointer), len(found))), names, table))
    return found


def thinned(found: Sequence[Operators], steps: Sequence[Step], most: int = MOST_CALLS) -> list[Operators]:
    """The calls of one process with the steps in whose time they began. Beyond ``most`` calls only every
    second, third, .. step (by its number) is kept, whole; what lies between steps goes then."""
    every = max(1, -(-sum(len(calls.rows) for calls in found) // most))
    return [Operators(calls.track, calls.names, _kept(calls.rows, steps, every), every) for calls in found]


def _times(ticks: Words, readings: Sequence[tuple[int, int]]) -> Words:
    """The counter as CLOCK_MONOTONIC, interpolated between the readings around."""
    at, at_ns = (np.array(column, dtype=np.int64) for column in zip(*readings))
    inside = np.interp(ticks - at[0], at - at[0], at_ns - at_ns[0])
    rate = (at_ns[-1] - at_ns[0]) / max(at[-1] - at[0], 1)
    outside = np.where(ticks < at[0], ticks - at[0], np.maximum(ticks - at[-1], 0)) * rate
    placed: Words = at_ns[0] + (inside + outside).astype(np.int64)
    return placed


def _names(schemas: Words, seen: OperatorRecords) -> tuple[list[str], npt.NDArray[np.uint32]]:
    """(names, the place of each row's name in them)."""
    distinct, places = np.unique(schemas, return_inverse=True)
    names = [
        BY_A_STRING if schema == 0 else seen.names.get(schema, f"schema {schema:x}")
        for schema in distinct.tolist()
    ]
    return names, places.astype(np.uint32).reshape(-1)


def _by_first(pointers: Words) -> list[int]:
    """Threads in order of their first record."""
    distinct, first = np.unique(pointers, return_index=True)
    return [int(pointer) for pointer in distinct[np.argsort(first)]]


def _matched(ends: Words, stretch: Words) -> tuple[Words, Words]:
    """(starts, ends) of one thread that belong together, in order of the starts: in each stretch, at each
    depth, a start and the end that follows it there."""
    depth = np.cumsum(1 - 2 * ends)
    level = depth + ends  # of a start its own depth, of an end that of its start
    order = np.lexsort((level, stretch))
    is_end, at, part = ends[order], level[order], stretch[order]
    same = (at[:-1] == at[1:]) & (part[:-1] == part[1:])
    pair = np.flatnonzero((is_end[:-1] == 0) & (is_end[1:] == 1) & same)
    begun, ended = order[pair], order[pair + 1]
    by_start = np.argsort(begun)
    return begun[by_start], ended[by_start]


def _kept(table: npt.NDArray[np.void], steps: Sequence[Step], every: int) -> npt.NDArray[np.void]:
    """The calls with their steps, or those of every so many steps."""
    table["step"] = NULL
    if steps:
        ordered = sorted(steps, key=lambda step: step.start_ns)
        starts = np.array([step.start_ns for step in ordered])
        ends = np.array([step.end_ns for step in ordered])
        numbers = np.array([step.step for step in ordered])
        place = np.searchsorted(starts, table["start_ns"], side="right") - 1
        inside = (place >= 0) & (table["start_ns"] < ends[place])
        table["step"][inside] = numbers[place[inside]]
    if every == 1:
        return table
    chosen: npt.NDArray[np.void] = table[(table["step"] != NULL) & (table["step"] % every == 0)]
    return chosen


def _lane(seen: OperatorRecords, pointer: int, number: int) -> str:
    """No name of a thread's own track: an operator need not nest with what else is drawn there."""
    thread = seen.threads.get(pointer)
    return f"operators (thread {thread})" if thread is not None else f"operators (thread no. {number + 1})"
