"""Waits of threads as the scheduler's spans tell them, added up by reason and by who had the CPU instead.

Names are those that ``timeline.attribution`` gives them: ``run-queue (after PID NAME)``, ``run-queue
(throttled)``, ``off-CPU (futex)``; also older ones, such as ``off-CPU`` with a detail that says *stopped*.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from latencyprism.records import Evidence, Span

Values = dict[tuple[str, str], float]

REASONS = {
    "futex": "wait_lock",
    "sync": "wait_disk", "files": "wait_disk", "device": "wait_disk", "write": "wait_disk",
    "memory": "wait_memory", "fault": "wait_memory",
}  # fmt: skip
"""Reason of a wait -> signal."""
_AFTER = re.compile(r"run-queue \(after (\d+) ")
_OF_A_THREAD = ("runqueue", "offcpu", "queued_own", "queued_foreign", "wait_lock", "wait_disk", "wait_memory")


def scheduler_signal(span: Span) -> str | None:
    """The signal that a scheduler span speaks for; None for any other span."""
    kind = _kind(span.name)
    if kind == "offcpu":
        for _, value in span.details:
            if isinstance(value, str) and "stopp" in value.lower():
                return "stopped"
    return kind


@lru_cache(maxsize=4096)
def _kind(name: str) -> str | None:
    """By the name alone: there are few, and a window has tens of thousands of spans."""
    name = name.lower()
    if name.startswith("run-queue"):
        return "runqueue"
    if name.startswith("off-cpu"):
        return "stopped" if "stopp" in name else "offcpu"
    return None


def _signals(span: Span, own: frozenset[int]) -> tuple[str, ...]:
    """What a span counts for: the wait itself, and why or because of whom."""
    whole = scheduler_signal(span)
    if whole == "runqueue":
        match = _AFTER.match(span.name)
        if match is None:
            return ("runqueue",)
        return ("runqueue", "queued_own" if int(match[1]) in own else "queued_foreign")
    if whole == "offcpu":
        reason = REASONS.get(span.name[9:-1])
        return ("offcpu", reason) if reason is not None else ("offcpu",)
    return (whole,) if whole is not None else ()


class Waits:
    """The spans of a window, prepared for being added up over any stretch of it."""

    def __init__(self, spans: Sequence[Span], roles: Mapping[int, str]) -> None:
        own = frozenset(roles)
        lanes: dict[tuple[str, str], list[tuple[int, int]]] = {}
        self.threads: set[str] = set()
        for span in spans:
            names = _signals(span, own)
            if names:
                where = " ".join(span.track)
                self.threads.add(where)
                for name in names:
                    lanes.setdefault((name, where), []).append((span.start_ns, span.end_ns))
        self._lanes: dict[tuple[str, str], npt.NDArray[np.int64]] = {
            key: np.array(each, dtype=np.int64) for key, each in lanes.items()
        }

    def measure(self, start_ns: int, end_ns: int, base_ns: float) -> Values:
        """Time waited in the stretch over ``base_ns``; zero where a thread that is followed did not wait."""
        out: Values = {(name, where): 0.0 for where in self.threads for name in _OF_A_THREAD}
        for key, spans in self._lanes.items():
            overlap = np.minimum(spans[:, 1], end_ns) - np.maximum(spans[:, 0], start_ns)
            out[key] = float(np.maximum(overlap, 0).sum()) / base_ns
        return out


def preemptors(spans: Sequence[Span], roles: Mapping[int, str]) -> list[Evidence]:
    """The process that took the CPU away for the longest, as the scheduler's spans name it."""
    taken_ns: dict[tuple[int, str], float] = {}
    for span in spans:
        if not span.details or scheduler_signal(span) != "runqueue":
            continue
        details = dict(span.details)
        pid = details.get("preempted_by")
        if isinstance(pid, int) and pid not in roles:
            who = (pid, str(details.get("preempted_by_comm", "?")))
            taken_ns[who] = taken_ns.get(who, 0.0) + span.end_ns - span.start_ns
    if not taken_ns:
        return []
    pid, name = max(taken_ns, key=lambda who: taken_ns[who])
    total_ms = round(taken_ns[pid, name] / 1e6, 2)
    text = f"process {pid} ({name}) took the CPU away for {total_ms} ms in this window"
    return [Evidence("culprit", None, total_ms, text)]
