"""How long a device was at work in a step, by the kernels of a window in which all were recorded."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from latencyprism.records import Span, Step
from latencyprism.records.device_spans import is_kernel

Times = npt.NDArray[np.int64]


class Busy(NamedTuple):
    """Stretches (CLOCK_MONOTONIC ns) in which a kernel at least ran on one device: in order, not touching."""

    begins: Times
    ends: Times

    @classmethod
    def of(cls, kernels: Sequence[Span]) -> Busy:
        """``kernels`` of one device, one at least, in any order; they may overlap."""
        times = np.array([(span.start_ns, span.end_ns) for span in kernels], dtype=np.int64)
        times = times[np.argsort(times[:, 0], kind="stable")]
        begins, ends = times[:, 0], np.maximum.accumulate(times[:, 1])
        first = np.concatenate(([True], begins[1:] > ends[:-1]))
        last = np.concatenate((first[1:], [True]))
        return cls(begins[first], ends[last])

    def within_ns(self, start_ns: int, end_ns: int) -> int:
        """How much of that time they cover."""
        covered = np.minimum(self.ends, end_ns) - np.maximum(self.begins, start_ns)
        return int(np.maximum(covered, 0).sum())


class DeviceWindow(NamedTuple):
    """From ``start_ns`` to ``end_ns`` every kernel of one process was recorded; ``busy`` by device."""

    start_ns: int
    end_ns: int
    busy: dict[str, Busy]

    @classmethod
    def of(cls, start_ns: int, end_ns: int, spans: Iterable[Span]) -> DeviceWindow:
        """Of ``spans`` the kernels count, not copies, waits or calls."""
        by_device: dict[str, list[Span]] = defaultdict(list)
        for span in filter(is_kernel, spans):
            by_device[span.track[0]].append(span)
        return cls(start_ns, end_ns, {device: Busy.of(own) for device, own in by_device.items()})


def with_busy(steps: Sequence[Step], windows: Sequence[DeviceWindow]) -> list[Step]:
    """The steps, with ``xpu_busy_ns`` where one lies wholly inside a window: that of the busiest device.

    A window in which no device ran anything says nothing: a profiler that records no kernel and a device
    that runs none look alike."""
    told = [window for window in windows if window.busy]
    return [_filled(step, told) for step in steps] if told else list(steps)


def _filled(step: Step, windows: Sequence[DeviceWindow]) -> Step:
    seen = [
        busy.within_ns(step.start_ns, step.end_ns)
        for window in windows
        if window.start_ns <= step.start_ns and step.end_ns <= window.end_ns
        for busy in window.busy.values()
    ]
    return step._replace(xpu_busy_ns=max(seen)) if seen else step
