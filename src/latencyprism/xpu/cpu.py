"""The processors themselves as devices: one for each NUMA node, by what /sys and /proc say."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from pathlib import Path

from latencyprism.errors import PrismError
from latencyprism.xpu.device import Device, DeviceProcess, Telemetry
from latencyprism.xpu.symbols import load_libraries

_NODE = re.compile(r"node(\d+)$")
_LOOK_S = 1.0


def parse_cpu_list(text: str) -> list[int]:
    """``0-3,8`` as [0, 1, 2, 3, 8]; what is no such list is empty."""
    found: list[int] = []
    for part in text.strip().split(","):
        first, dash, last = part.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            return []
        found += range(int(first), int(last if dash else first) + 1)
    return found


class Cpu:
    """See ``Vendor``. ``processes``: those that map an OpenMP runtime, the threads of which do the work.
    Rates are differences: null at a node's first reading."""

    name = "cpu"

    def __init__(self, root: str = "/") -> None:
        self._root = Path(root)
        self._before: dict[tuple[int, str], tuple[float, float]] = {}
        self._cpus: dict[int, list[int]] = {}

    def devices(self) -> list[Device]:
        model = self._model()
        self._cpus = {}
        for folder in sorted(self._paths("sys/devices/system/node", "node[0-9]*")):
            match = _NODE.search(folder.name)
            cpus = parse_cpu_list(_read(folder / "cpulist") or "")
            if match and cpus:
                self._cpus[int(match[1])] = cpus
        if not self._cpus:
            self._cpus[0] = parse_cpu_list(self._text("sys/devices/system/cpu/online") or "0")
        return [
            Device(self.name, index, f"{model}, {len(cpus)} CPUs", numa_node=node)
            for index, (node, cpus) in enumerate(self._cpus.items())
        ]

    def processes(self, device: Device) -> list[DeviceProcess]:
        deadline = time.monotonic() + _LOOK_S
        runtimes = [library.file for library in load_libraries() if library.vendor == self.name]
        found: list[DeviceProcess] = []
        for entry in sorted(os.listdir(self._root / "proc"), key=lambda name: (len(name), name)):
            if not entry.isdigit():
                continue
            if time.monotonic() > deadline:
                raise PrismError(
                    "who uses the CPUs is not told", f"more processes than {_LOOK_S:g} s suffice for"
                )
            maps = self._text(f"proc/{entry}/maps") or ""
            names = {os.path.basename(line.rpartition(" ")[2]) for line in maps.splitlines() if ".so" in line}
            if any(pattern.match(name) for pattern in runtimes for name in names):
                found.append(DeviceProcess(int(entry)))
        return found

    def telemetry(self, device: Device) -> Telemetry:
        if device.index >= len(self._cpus):
            self.devices()
        node = device.numa_node or 0
        cpus = self._cpus.get(node, [])
        now = time.monotonic_ns()
        total, free = self._memory(node)
        return Telemetry(
            time_ns=now,
            clock_mhz=self._frequency(cpus, "scaling_cur_freq", "mean"),
            clock_max_mhz=self._frequency(cpus, "cpuinfo_max_freq", "most"),
            throttled=self._throttled(node, cpus),
            power_w=self._power(node, now),
            temperature_c=self._temperature(),
            compute_utilisation=self._busy(node, cpus),
            memory_used_bytes=None if total is None or free is None else total - free,
            memory_total_bytes=total,
            ecc_corrected=self._errors("ce_count"),
            ecc_uncorrected=self._errors("ue_count"),
        )

    def close(self) -> None:
        """Nothing is held."""

    # -- sources ---------------------------------------------------------------------------------

    def _text(self, path: str) -> str | None:
        return _read(self._root / path)

    def _paths(self, folder: str, pattern: str) -> list[Path]:
        return list((self._root / folder).glob(pattern))

    def _model(self) -> str:
        for line in (self._text("proc/cpuinfo") or "").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Processor", "cpu model"):
                return value.strip()
        return "CPU"

    def _frequency(self, cpus: Sequence[int], name: str, of: str) -> int | None:
        base = "sys/devices/system/cpu"
        texts = [self._text(f"{base}/cpu{cpu}/cpufreq/{name}") for cpu in cpus]
        values = [int(text) for text in texts if text and text.isdigit()]
        if not values:
            return None
        return (max(values) if of == "most" else sum(values) // len(values)) // 1000

    def _throttled(self, node: int, cpus: Sequence[int]) -> tuple[str, ...] | None:
        """Thermal throttling since the reading before."""
        counts = [
            self._text(f"sys/devices/system/cpu/cpu{cpu}/thermal_throttle/core_throttle_count")
            for cpu in cpus
        ]
        known = [int(text) for text in counts if text and text.isdigit()]
        if not known:
            return None
        grown = self._since(node, "throttled", sum(known), 0.0)
        return None if grown is None else (("thermal",) if grown[0] > 0 else ())

    def _power(self, node: int, now: int) -> float | None:
        """Watts of the package of this number; right where each package is one node."""
        energy = self._text(f"sys/class/powercap/intel-rapl:{node}/energy_uj")
        if not energy or not energy.isdigit():
            return None
        grown = self._since(node, "energy", int(energy), now / 1e3)
        return grown[0] / grown[1] if grown and grown[0] >= 0 and grown[1] > 0 else None

    def _temperature(self) -> float | None:
        found = []
        for zone in self._paths("sys/class/thermal", "thermal_zone*"):
            value = _read(zone / "temp") or ""
            if _read(zone / "type") == "x86_pkg_temp" and value.isdigit():
                found.append(int(value) / 1000)
        return max(found, default=None)

    def _busy(self, node: int, cpus: Sequence[int]) -> float | None:
        """Share of the node's CPU time that was not idle since the reading before."""
        wanted = {f"cpu{cpu}" for cpu in cpus}
        busy = total = 0
        for line in (self._text("proc/stat") or "").splitlines():
            words = line.split()
            if words and words[0] in wanted and len(words) >= 9:
                ticks = [int(word) for word in words[1:9]]
                total += sum(ticks)
                busy += sum(ticks) - ticks[3] - ticks[4]
        grown = self._since(node, "busy", busy, total)
        return grown[0] / grown[1] if grown and grown[1] > 0 else None

    def _memory(self, node: int) -> tuple[int | None, int | None]:
        text = self._text(f"sys/devices/system/node/node{node}/meminfo") or self._text("proc/meminfo") or ""
        table = {}
        for line in text.splitlines():
            match = re.search(r"(\w+):\s+(\d+) kB", line)
            if match:
                table[match[1]] = int(match[2]) * 1024
        return table.get("MemTotal"), table.get("MemFree")

    def _errors(self, name: str) -> int | None:
        texts = [_read(folder / name) for folder in self._paths("sys/devices/system/edac/mc", "mc[0-9]*")]
        values = [int(text) for text in texts if text and text.isdigit()]
        return sum(values) if values else None

    def _since(self, node: int, what: str, value: float, against: float) -> tuple[float, float] | None:
        before = self._before.get((node, what))
        self._before[node, what] = (value, against)
        return None if before is None else (value - before[0], against - before[1])


def _read(path: Path) -> str | None:
    try:
        return path.read_text("utf-8", "replace").strip()
    except OSError:
        return None
