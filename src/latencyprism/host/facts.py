"""What is so about a machine and a process, not what it does: told once, by `check`."""

from __future__ import annotations

import os
import platform
from collections import Counter as Tally
from dataclasses import asdict
from glob import glob
from typing import Any

from latencyprism.host.cgroup import GroupChain, find_cpu_mount, find_mount, parse_membership
from latencyprism.host.container import container_of, group_paths, short_cgroup
from latencyprism.host.held import read_once
from latencyprism.host.memory_group import MemoryGroup
from latencyprism.host.network import ESTABLISHED, LISTEN, sockets_of
from latencyprism.host.numa import memory_by_node, nodes
from latencyprism.host.timekeeping import timekeeping


def machine_facts() -> dict[str, Any]:
    """Plain values for JSON; null where this kernel or user is not told."""
    numa = nodes()
    cpu_mount, memory_mount = find_cpu_mount(), find_mount("memory")
    return {
        "kernel": platform.release(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "frequency_governors": _governors(),
        "numa_nodes": [asdict(node) for node in numa],
        "clock": asdict(timekeeping()),
        "pressure": os.path.exists("/proc/pressure/cpu"),
        "cgroup_cpu_version": cpu_mount.version if cpu_mount else None,
        "cgroup_memory_version": memory_mount.version if memory_mount else None,
        "transparent_hugepages": _chosen("/sys/kernel/mm/transparent_hugepage/enabled"),
    }


def process_facts(pid: int) -> dict[str, Any]:
    """Where a process lives and what bounds it. On a machine of several NUMA nodes the kernel walks the
    process's page tables once, which takes some 10 ms for each GB."""
    text = (read_once(f"/proc/{pid}/cgroup") or b"").decode("utf-8", "replace")
    paths = group_paths(text)
    container = container_of(pid)
    try:
        affinity: list[int] | None = sorted(os.sched_getaffinity(pid))
    except OSError:
        affinity = None
    return {
        "container": asdict(container) if container else None,
        "cgroup": short_cgroup(paths[0]) if paths else None,
        "cpus_allowed": affinity,
        "quota_cpus": _quota(text),
        **_memory(text),
        "memory_by_node_bytes": _by_node(pid),
        "tcp": _tcp(pid),
    }


def _governors() -> dict[str, int] | None:
    """How many CPUs each frequency governor has."""
    found = Tally(
        data.decode("ascii", "replace").strip()
        for path in glob("/sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_governor")
        if (data := read_once(path, 64)) is not None
    )
    return dict(found) or None


def _chosen(path: str) -> str | None:
    """The word in brackets, as in ``always [madvise] never``."""
    words = (read_once(path, 256) or b"").decode("ascii", "replace").split()
    return next((word[1:-1] for word in words if word.startswith("[") and word.endswith("]")), None)


def _quota(text: str) -> float | None:
    mount = find_cpu_mount()
    path = parse_membership(text, mount.version) if mount else None
    if mount is None or path is None:
        return None
    chain = GroupChain(mount, path)
    try:
        found = chain.read()
    finally:
        chain.close()
    return found.quota_cpus if found else None


def _memory(text: str) -> dict[str, int | None]:
    mount = find_mount("memory")
    path = parse_membership(text, mount.version, "memory") if mount else None
    found: dict[str, int] = {}
    if mount is not None and path is not None:
        group = MemoryGroup(mount, path)
        try:
            found = group.read()
        finally:
            group.close()
    names = ("group_memory_bytes", "group_memory_limit_bytes", "group_oom_kills")
    return {name: found.get(name) for name in names}


def _by_node(pid: int) -> dict[str, int] | None:
    if len(nodes()) < 2:
        return None
    found = memory_by_node(pid)
    return None if found is None else {str(node): size for node, size in sorted(found.items())}


def _tcp(pid: int) -> dict[str, int | None] | None:
    """Connections, the longest smoothed round trip, what waits to be accepted and what the peers have not
    yet acknowledged."""
    sockets = sockets_of(pid)
    if sockets is None:
        return None
    open_now = [each for each in sockets if each.state == ESTABLISHED]
    return {
        "connections": len(open_now),
        "rtt_us_max": max((each.rtt_us for each in open_now if each.rtt_us is not None), default=None),
        "unsent_bytes": sum(each.unsent_bytes for each in open_now),
        "unread_bytes": sum(each.unread_bytes for each in open_now),
        "waiting_for_accept": sum(each.unread_bytes for each in sockets if each.state == LISTEN),
    }
