"""Operators of a deep dive: starts and ends matched per thread, placed on the timeline, joined to steps."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

from latencyprism.agent.operators import OperatorRecords
from latencyprism.records import Span, Step

USER_SCOPE = "(named by a string)"


def operator_spans(seen: OperatorRecords, process: str, steps: Sequence[Step]) -> list[Span]:
    """One span an operator, in order of their starts, nested as they were called; times CLOCK_MONOTONIC.

    An operator whose start or end was not recorded is left out. ``step``: the one in whose interval it
    began, None between steps."""
    if not seen.chunks or len(seen.readings) < 2:
        return []
    rows = np.concatenate(seen.chunks)
    ticks, at_ns = (np.array(column, dtype=np.int64) for column in zip(*seen.readings))
    times = (at_ns[0] + np.interp(rows[:, 0] - ticks[0], ticks - ticks[0], at_ns - at_ns[0])).astype(np.int64)
    starts = [step.start_ns for step in steps]
    found: list[Span] = []
    open_ones: dict[int, list[tuple[int, int]]] = {}
    threads: dict[int, str] = {}
    for (_, schema, thread, _), when in zip(rows.tolist(), times.tolist()):
        stack = open_ones.setdefault(thread & ~1, [])
        if not thread & 1:
            stack.append((schema, when))
        elif stack:
            name, begin = stack.pop()
            lane = threads.setdefault(thread & ~1, _lane(seen.thread, len(threads)))
            place = bisect_right(starts, begin) - 1
            inside = place >= 0 and begin < steps[place].end_ns
            found.append(
                Span(
                    (process, lane),
                    seen.names.get(name, USER_SCOPE if name == 0 else f"schema {name:x}"),
                    begin,
                    when,
                    steps[place].step if inside else None,
                )
            )
    found.sort(key=lambda span: (span.start_ns, -span.end_ns))
    return found


def _lane(thread: int, known: int) -> str:
    return f"operators {thread}" if known == 0 else f"operators, further thread {known}"
