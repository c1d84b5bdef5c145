"""NUMA: the nodes of the machine, and on which of them a process's memory lies."""

from __future__ import annotations

import glob
import re
from dataclasses import dataclass

from latencyprism.host.held import parse_table, read_once

_NODE = re.compile(r"/node(\d+)$")
_PAGES = re.compile(rb" N(\d+)=(\d+)")
_PAGE_SIZE = re.compile(rb" kernelpagesize_kB=(\d+)")
_MEMORY = re.compile(rb"(Mem\w+):\s+(\d+) kB")
_MOST_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Node:
    """``cpus`` as the kernel writes it (``0-3,8``); ``distances`` to every node in order, 10 is itself;
    ``misses``: allocations that had to be made elsewhere, since the machine was started."""

    number: int
    cpus: str
    memory_bytes: int | None
    free_bytes: int | None
    distances: tuple[int, ...]
    misses: int | None


def nodes() -> list[Node]:
    """Every node; empty where the kernel has no NUMA support."""
    found = []
    for folder in glob.glob("/sys/devices/system/node/node[0-9]*"):
        match = _NODE.search(folder)
        if match is None:
            continue
        memory = {name.decode(): int(kb) * 1024 for name, kb in _MEMORY.findall(_read(folder, "meminfo"))}
        distances = _read(folder, "distance").split()
        found.append(
            Node(
                number=int(match[1]),
                cpus=_read(folder, "cpulist").decode("ascii", "replace").strip(),
                memory_bytes=memory.get("MemTotal"),
                free_bytes=memory.get("MemFree"),
                distances=tuple(int(word) for word in distances if word.isdigit()),
                misses=parse_table(_read(folder, "numastat")).get(b"numa_foreign"),
            )
        )
    return sorted(found, key=lambda node: node.number)


def _read(folder: str, name: str) -> bytes:
    return read_once(f"{folder}/{name}") or b""


def parse_numa_maps(data: bytes) -> dict[int, int]:
    """Node -> bytes, from the content of /proc/PID/numa_maps."""
    found: dict[int, int] = {}
    for line in data.splitlines():
        size = _PAGE_SIZE.search(line)
        page = int(size[1]) * 1024 if size else 4096
        for node, pages in _PAGES.findall(line):
            found[int(node)] = found.get(int(node), 0) + int(pages) * page
    return found


def memory_by_node(pid: int) -> dict[int, int] | None:
    """Where a process's resident memory lies, in bytes. The kernel walks the process's page tables for this,
    some 10 ms for each GB: not for a timer. None where it may not be read."""
    try:
        with open(f"/proc/{pid}/numa_maps", "rb") as file:
            return parse_numa_maps(file.read(_MOST_BYTES))
    except OSError:
        return None
