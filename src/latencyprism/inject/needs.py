"""What each cause needs, and whether it can work on this machine, found out without disturbing anything."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from latencyprism.host.cgroup import directories, find_cpu_mount, parse_membership
from latencyprism.host.held import read_once
from latencyprism.xpu.library import LibraryMissing, open_library

Missing = Callable[[], str | None]
"""Why it cannot work here, in words; None where nothing is known against it."""


@dataclass(frozen=True, slots=True)
class Need:
    text: str
    missing: Missing


def _nothing() -> str | None:
    return None


def _second_cpu() -> str | None:
    return None if len(os.sched_getaffinity(0)) > 1 else "this process may use one CPU alone"


def _quota() -> str | None:
    mount = find_cpu_mount()
    text = (read_once("/proc/self/cgroup") or b"").decode("utf-8", "replace")
    path = parse_membership(text, mount.version) if mount is not None else None
    if mount is None or path is None:
        return "no CPU controller of control groups is mounted"
    folders = directories(mount, path)
    folder = folders[-2] if mount.version == 2 and len(folders) > 1 else folders[-1]
    return None if os.access(folder, os.W_OK) else f"{folder} cannot be written"


def _attach() -> str | None:
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return f"a running Python is entered on Linux and x86_64, this is {platform.machine()}"
    if os.geteuid() == 0:
        return None
    scope = (read_once("/proc/sys/kernel/yama/ptrace_scope") or b"0").strip()
    if scope in (b"0", b"1"):
        return None
    return f"ptrace is for root here (kernel.yama.ptrace_scope = {scope.decode('ascii', 'replace')})"


def _madvise() -> str | None:
    major, minor = (int(part) for part in os.uname().release.split("-")[0].split(".")[:2])
    if (major, minor) < (5, 10):
        return f"process_madvise came with Linux 5.10, this is {os.uname().release}"
    return None if os.geteuid() == 0 else "only root may take back pages of another process"


def device_missing() -> str | None:
    """Why no kernel can be run on an NVIDIA device here."""
    if not Path("/dev/nvidiactl").exists():
        return "there is no NVIDIA device (/dev/nvidiactl)"
    try:
        open_library(("libcuda.so.1",), "NVIDIA's driver library")
    except LibraryMissing as error:
        return str(error)
    return None


_PYTHON = "a target in Python, and the right to attach to it"
_DEVICE = "an NVIDIA device and its driver's library"
_URL = "--url of the engine on this machine"

NEEDS: dict[str, Need] = {
    "cpu.neighbour": Need("real-time priority (weaker without)", _nothing),
    "cpu.quota": Need("a control group with a CPU controller that can be written", _quota),
    "cpu.oversubscription": Need("two CPUs, or a target in Python", _second_cpu),
    "peer.stalled": Need("the right to send signals to the target", _nothing),
    "python.gil": Need(_PYTHON, _attach),
    "python.gc": Need(_PYTHON, _attach),
    "python.lock": Need(f"{_PYTHON}; a queue or a lock that its threads use", _attach),
    "log.flood": Need(f"{_PYTHON}; a log handler with a stream", _attach),
    "memory.reclaim": Need("root, Linux 5.10; a target with files mapped, such as weights", _madvise),
    "memory.bandwidth": Need("a CPU beside the target's", _second_cpu),
    "disk.stall": Need("a CPU beside the target's; a --directory on a disk", _second_cpu),
    "net.delay": Need(f"{_URL}; clients that go through the proxy", _nothing),
    "engine.tokenizer": Need(f"{_PYTHON}; Transformers' tokenizers, or --at", _attach),
    "engine.event_loop": Need(f"{_PYTHON}; an asyncio loop in it", _attach),
    "workload.long_prompt": Need(_URL, _nothing),
    "workload.preemption": Need(f"{_URL}; an engine that preempts and counts it", _nothing),
    "workload.prefix_cache_lost": Need(f"{_URL}; an engine with a prefix cache", _nothing),
    "xpu.contention": Need(_DEVICE, device_missing),
    "xpu.memory_bandwidth": Need(_DEVICE, device_missing),
    "xpu.pcie": Need(_DEVICE, device_missing),
    "xpu.link": Need("two NVIDIA devices", device_missing),
    "xpu.allocator": Need(f"{_DEVICE}; 2 GiB free on it", device_missing),
    "xpu.clock": Need(f"{_DEVICE}; root, and --allow-device-settings", device_missing),
    "xpu.power": Need(f"{_DEVICE}; root, and --allow-device-settings", device_missing),
}
