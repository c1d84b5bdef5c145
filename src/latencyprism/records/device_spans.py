"""Spans of what ran on a device, and of the calls that launched it: how they are told from all others.

``("GPU 0 (Worker 812)", "stream 7")`` has what ran on a stream; the device's number is that of its process.
``("Worker 812", "launches (thread 815)")`` has the calls. A call and what it launched have the same
``correlation`` among their details. ``xpu.kernel_spans`` makes them.
"""

from __future__ import annotations

import re

from latencyprism.records.span import Span

CORRELATION, COLLECTIVE, KIND = "correlation", "collective", "kind"
"""Details: of kernels of a collective operation, which; of what is no kernel, what it is."""
_STREAM, _LAUNCHES = re.compile(r"stream -?\d+$"), re.compile(r"launches \(thread -?\d+\)$")


def device_track(device: str, number: int, process: str, stream: int) -> tuple[str, str]:
    """``process`` as its own track is called. No number at the end of the first part: that would make a
    process of it where tracks are drawn."""
    return f"{device} {number} ({process})", f"stream {stream}"


def launch_track(process: str, thread: int) -> tuple[str, str]:
    return process, f"launches (thread {thread})"


def process_of(span: Span) -> str:
    """Whose it is; for those of ``on_a_device`` and ``is_launch``."""
    own = span.track[0]
    return own if is_launch(span) else own.partition(" (")[2][:-1]


def on_a_device(span: Span) -> bool:
    """It ran on a stream of a device."""
    return len(span.track) == 2 and span.track[0].endswith(")") and _STREAM.match(span.track[1]) is not None


def is_kernel(span: Span) -> bool:
    """It ran on a device and is no copy and no wait."""
    return on_a_device(span) and (not span.details or span.details[0][0] != KIND)


def is_launch(span: Span) -> bool:
    return len(span.track) == 2 and _LAUNCHES.match(span.track[1]) is not None


def from_a_window(span: Span) -> bool:
    """Either of the two: recorded in a short window alone, in which other probes see the same calls, too."""
    return on_a_device(span) or is_launch(span)
