"""Kernels of a window as spans (``records.device_spans``), and which of them took the time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from latencyprism.records import Span
from latencyprism.records.device_spans import (
    COLLECTIVE,
    CORRELATION,
    KIND,
    device_track,
    is_kernel,
    launch_track,
    on_a_device,
)
from latencyprism.xpu.kernel_names import KERNEL, RANGE, Meaning, meaning_of
from latencyprism.xpu.kernels import KernelCapture, KernelEvent

HOST = "CPU"
MOST_LONGEST = 10
_WORDS = {"CUDA": "GPU", "HIP": "GPU", "XPU": "GPU", "PrivateUse1": "NPU"}
"""How a device is called whose kind PyTorch calls so."""


def spans_of(events: Iterable[KernelEvent], process: str) -> list[Span]:
    """``process`` as its own track is called: role and PID. What is only a name for a stretch of other rows,
    and calls that launched nothing, are left out."""
    events = list(events)
    launched = {event.correlation for event in events if event.device_kind != HOST} - {0}
    found = []
    for event in events:
        if event.device_kind == HOST:
            if event.correlation in launched:
                track = launch_track(process, event.lane)
                told = ((CORRELATION, event.correlation),)
                found.append(Span(track, event.name, event.start_ns, event.end_ns, None, told))
            continue
        meaning = meaning_of(event.name)
        if meaning.kind != RANGE:
            device = _WORDS.get(event.device_kind, event.device_kind)
            track = device_track(device, event.device, process, event.lane)
            span = Span(track, event.name, event.start_ns, event.end_ns, None, _details(event, meaning))
            found.append(span)
    return found


def _details(event: KernelEvent, meaning: Meaning) -> tuple[tuple[str, str | int | float], ...]:
    told: list[tuple[str, str | int | float]] = []
    if meaning.kind != KERNEL:
        told.append((KIND, meaning.kind))
    if meaning.collective is not None:
        told.append((COLLECTIVE, meaning.collective))
    if event.correlation:
        told.append((CORRELATION, event.correlation))
    return tuple(told)


# -- telling of them --------------------------------------------------------------------------------


def described(capture: KernelCapture, process: str, spans: Sequence[Span]) -> dict[str, Any]:
    """What ``meta`` of a file says of one window whose spans these are. ``moments``: CLOCK_MONOTONIC ns;
    ``count``: kernels; ``longest``: those that took the most time, by name."""
    kernels = [span for span in spans if is_kernel(span)]
    window = capture.window_ns
    return {
        "process": process,
        "framework": capture.framework,
        "window_ms": None if window is None else round((window[1] - window[0]) / 1e6, 3),
        "moments": dict(capture.moments),
        "count": len(kernels),
        "left_out": capture.left_out,
        "devices": sorted({span.track[0] for span in spans if on_a_device(span)}),
        "longest": _longest(kernels, lambda span: span.name)[:MOST_LONGEST],
        "collectives": _longest([span for span in kernels if _collective(span)], _collective),
    }


def _longest(kernels: Sequence[Span], key: Callable[[Span], str]) -> list[dict[str, Any]]:
    """Calls and time by ``key``, most time first."""
    calls: Counter[str] = Counter()
    spent_ns: Counter[str] = Counter()
    for span in kernels:
        calls[key(span)] += 1
        spent_ns[key(span)] += span.end_ns - span.start_ns
    return [
        {"name": name, "calls": calls[name], "total_ms": round(ns / 1e6, 3)}
        for name, ns in spent_ns.most_common()
    ]


def _collective(span: Span) -> str:
    """Which operation, empty: none that is known."""
    return str(next((value for name, value in span.details if name == COLLECTIVE), ""))


def doubtful_names(spans: Iterable[Span]) -> list[str]:
    """Kernels that are called like a collective operation and are none that is known."""
    names = {span.name for span in spans if is_kernel(span)}
    return sorted(name for name in names if meaning_of(name).doubtful)
