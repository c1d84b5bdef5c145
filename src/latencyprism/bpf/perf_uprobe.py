"""Uprobes by perf_event_open(2), for kernels before 6.6 that cannot attach many with one link.

They hit as cheaply but cost a grace period of the kernel each when they are taken away (0.05-0.3 s), and
they want CAP_SYS_ADMIN; so this is the second choice.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from latencyprism.bpf import kernel
from latencyprism.errors import PrismError

_NUMBERS = {"x86_64": 298, "aarch64": 241}
_PMU = Path("/sys/bus/event_source/devices/uprobe")
_CLOSE_ON_EXEC = 8
_ATTR = struct.Struct("<IIQQQQQIIQQ")
_ATTR_BYTES = 128
_libc = ctypes.CDLL(None, use_errno=True)


def _uprobe_type() -> int:
    try:
        return int((_PMU / "type").read_text())
    except (OSError, ValueError):
        raise PrismError("cannot attach uprobes", "this kernel has none", kernel.KERNEL) from None


def open_uprobe(path: str, offset: int, pid: int, returns: bool) -> int:
    """A perf event on the instruction at file ``offset`` (bytes) of ``path``, in all threads of ``pid``."""
    name = ctypes.create_string_buffer(os.fsencode(path))
    # config bit 0: at the return; then config1 and config2: path and offset.
    attribute = _ATTR.pack(
        _uprobe_type(), _ATTR_BYTES, int(returns), 0, 0, 0, 0, 0, 0, ctypes.addressof(name), offset
    ).ljust(_ATTR_BYTES, b"\0")
    buffer = ctypes.create_string_buffer(attribute, _ATTR_BYTES)
    descriptor: int = _libc.syscall(
        ctypes.c_long(_NUMBERS[kernel.supported_machine()]),
        buffer,
        pid,
        -1,
        -1,
        ctypes.c_ulong(_CLOSE_ON_EXEC),
    )
    if descriptor < 0:
        code = ctypes.get_errno()
        error = OSError(code, os.strerror(code))
        raise kernel.refused("cannot attach uprobes", error, "perf event; needs CAP_SYS_ADMIN")
    return descriptor


def attach(
    program: int, path: str, offsets: Sequence[int], cookies: Sequence[int], pid: int, *, returns: bool
) -> list[int]:
    """Descriptors to close with ``detach``: as ``kernel.link_uprobe_multi``, one event for each offset."""
    opened: list[int] = []
    try:
        for offset, cookie in zip(offsets, cookies):
            event = open_uprobe(path, offset, pid, returns)
            opened.append(event)
            opened.append(kernel.link_perf_event(program, event, cookie))
    except BaseException:
        detach(opened)
        raise
    return opened


def detach(descriptors: Sequence[int]) -> None:
    """Close all, several at a time: each waits for the kernel, and those waits overlap."""

    def close(descriptor: int) -> None:
        with suppress(OSError):
            os.close(descriptor)

    if len(descriptors) < 2:
        for descriptor in descriptors:
            close(descriptor)
        return
    with ThreadPoolExecutor(8) as closers:
        list(closers.map(close, reversed(descriptors)))
