"""The first lines of /proc/stat: what each CPU spent its time on, in ticks."""

from __future__ import annotations

from collections.abc import Sequence


def parse_cpu_lines(data: bytes) -> dict[int, list[int]]:
    """CPU number -> ticks (user, nice, system, idle, iowait, irq, softirq, steal, …) from /proc/stat."""
    cpus: dict[int, list[int]] = {}
    for line in data.splitlines():
        if not line.startswith(b"cpu"):
            break
        words = line.split()
        if words[0] != b"cpu" and words[0][3:].isdigit() and all(word.isdigit() for word in words[1:]):
            cpus[int(words[0][3:])] = [int(word) for word in words[1:]]
    return cpus


def busy_ticks(ticks: Sequence[int]) -> int:
    """Of a CPU's line (with at least seven columns). Guest time is already within user time."""
    return ticks[0] + ticks[1] + ticks[2] + ticks[5] + ticks[6]
