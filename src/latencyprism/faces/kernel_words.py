"""Kernels of devices in words: what one window saw of each process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from latencyprism.faces.wording import clean, ms
from latencyprism.recorder import Capture
from latencyprism.records import Span, Step
from latencyprism.records.device_spans import is_kernel

_NAME = 100


def tell(capture: Capture) -> Iterator[str]:
    """Nothing where none were recorded. ``meta`` is a file's: any of it may be missing or another thing."""
    windows = [each for each in _list(capture.meta.get("kernels")) if isinstance(each, dict)]
    for window in windows:
        yield ""
        yield from _window(capture, window)


def _window(capture: Capture, window: dict[str, Any]) -> Iterator[str]:
    length, left_out = window.get("window_ms"), window.get("left_out")
    lasted = f"{ms(length)} by " if isinstance(length, (int, float)) else ""
    devices = ", ".join(clean(device) for device in _list(window.get("devices"))) or "no device ran anything"
    yield (
        f"KERNELS of {clean(window.get('process'))} ({lasted}{clean(window.get('framework'))}): "
        f"{clean(window.get('count'))} on {devices}"
    )
    if isinstance(left_out, int) and left_out > 0:
        yield f"  {left_out} rows more found no room"
    for entry in _list(window.get("longest")):
        yield f"  {_spent(entry)}"
    for entry in _list(window.get("collectives")):
        yield f"  of them collective: {_spent(entry)}"
    busy = [step for step in _inside(capture, window) if step.xpu_busy_ns is not None]
    if busy:
        share = sum(step.xpu_busy_ns or 0 for step in busy) / max(sum(step.duration_ns for step in busy), 1)
        steps = "1 step" if len(busy) == 1 else f"{len(busy)} steps"
        yield f"  in the {steps} wholly inside it the busiest device ran kernels for {share:.0%} of the time"


def _spent(entry: object) -> str:
    told = entry if isinstance(entry, dict) else {}
    total = told.get("total_ms")
    shown = ms(total) if isinstance(total, (int, float)) else "?"
    return f"{shown:>10} {clean(told.get('calls')):>7} calls  {clean(told.get('name'), _NAME)}"


def _inside(capture: Capture, window: dict[str, Any]) -> list[Step]:
    moments = window.get("moments")
    told = moments if isinstance(moments, dict) else {}
    begin_ns, end_ns = told.get("started"), told.get("stopping")
    if not isinstance(begin_ns, int) or not isinstance(end_ns, int):
        return []
    return [step for step in capture.steps if begin_ns <= step.start_ns and step.end_ns <= end_ns]


def of_step(spans: list[Span]) -> Iterator[str]:
    """Of the spans in a step: how many kernels there are on each device, and the longest."""
    by_device: dict[str, list[Span]] = {}
    for span in spans:
        if is_kernel(span):
            by_device.setdefault(span.track[0], []).append(span)
    for device, own in by_device.items():
        longest = max(own, key=lambda span: span.end_ns - span.start_ns)
        lasted = ms((longest.end_ns - longest.start_ns) / 1e6)
        kernels = "1 kernel" if len(own) == 1 else f"{len(own)} kernels"
        yield f"  {kernels} on {clean(device)}, the longest {lasted} {clean(longest.name, _NAME)}"


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
