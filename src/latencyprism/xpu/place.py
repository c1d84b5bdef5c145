"""Where a PCI device sits in the machine."""

from __future__ import annotations

import re
from pathlib import Path

_BUS = re.compile(r"(?:([0-9a-f]{4,8}):)?([0-9a-f]{2}):([0-9a-f]{2})(?:\.([0-7]))?$")


def numa_node_of(bus: str | None) -> int | None:
    """The NUMA node of a PCI address such as ``00000000:3b:00.0``; None if the kernel does not say."""
    match = _BUS.match((bus or "").lower())
    if match is None:
        return None
    domain, number, device, part = match.groups()
    name = f"{int(domain or '0', 16):04x}:{number}:{device}.{part or '0'}"
    try:
        node = int(Path(f"/sys/bus/pci/devices/{name}/numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None
