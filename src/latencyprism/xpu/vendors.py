"""All vendors at once, each bounded in time: what is here, who uses it, how it fares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from latencyprism.errors import PrismError
from latencyprism.xpu.amd import Amd
from latencyprism.xpu.ascend import Ascend
from latencyprism.xpu.cpu import Cpu
from latencyprism.xpu.device import Device, DeviceProcess, Telemetry, Vendor
from latencyprism.xpu.intel import Intel
from latencyprism.xpu.library import Bounded, LibraryMissing
from latencyprism.xpu.nvidia import Nvidia

VENDORS: Mapping[str, Callable[[], Vendor]] = {
    "nvidia": Nvidia,
    "amd": Amd,
    "ascend": Ascend,
    "intel": Intel,
    "cpu": Cpu,
}
LIMIT_S = 3.0


@dataclass(frozen=True, slots=True)
class Seen:
    """One device with what could be had of it; ``processes`` and ``telemetry`` are None where refused."""

    device: Device
    processes: tuple[DeviceProcess, ...] | None
    telemetry: Telemetry | None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        users = None
        if self.processes is not None:
            users = [{"pid": each.pid, "memory_bytes": each.memory_bytes} for each in self.processes]
        return {
            **_plain(self.device),
            "processes": users,
            "telemetry": None if self.telemetry is None else _plain(self.telemetry),
        }


def _plain(value: Device | Telemetry) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in fields(value)}


class Watch:
    """One vendor, asked again and again: never longer than ``limit_s``, one warning, then null.

    ``warning`` is None while all is well. LibraryMissing where the vendor has nothing on this machine."""

    def __init__(self, name: str, limit_s: float = LIMIT_S, make: Callable[[], Vendor] | None = None) -> None:
        self.name = name
        self.warning: str | None = None
        self._bounded: Bounded[Any] = Bounded(limit_s)
        self._vendor: Vendor | None = None
        try:
            self._vendor = self._bounded.call(f"the library for {name}", make or VENDORS[name])
        except LibraryMissing:
            raise
        except (PrismError, OSError, ValueError) as error:
            self._warn(error)
        self.devices: list[Device] = list(self._ask("devices", lambda vendor: vendor.devices()) or ())

    @property
    def hung(self) -> bool:
        """A call did not come back: it is not asked any more."""
        return self._bounded.hung

    def _warn(self, error: Exception) -> None:
        self.warning = self.warning or str(error)

    def _ask(self, what: str, action: Callable[[Vendor], Any]) -> Any:
        vendor = self._vendor
        if vendor is None or self._bounded.hung:
            return None
        try:
            return self._bounded.call(f"{what} of {self.name}", lambda: action(vendor))
        except (PrismError, OSError, ValueError) as error:
            self._warn(error)
            return None

    def telemetry(self, device: Device) -> Telemetry | None:
        found: Telemetry | None = self._ask("telemetry", lambda vendor: vendor.telemetry(device))
        return found

    def processes(self, device: Device) -> tuple[DeviceProcess, ...] | None:
        found = self._ask("processes", lambda vendor: vendor.processes(device))
        return None if found is None else tuple(found)

    def look(self) -> list[Seen]:
        return [Seen(device, self.processes(device), self.telemetry(device)) for device in self.devices]

    def close(self) -> None:
        """Give the library back, unless it hangs."""
        self._ask("closing", lambda vendor: vendor.close())
        self._vendor = None


def survey(
    limit_s: float = LIMIT_S, vendors: tuple[str, ...] = tuple(VENDORS)
) -> tuple[list[Seen], list[str]]:
    """(every device of every vendor found here, warnings). A vendor without a library here is no warning."""
    seen: list[Seen] = []
    warnings: list[str] = []
    for name in vendors:
        try:
            watch = Watch(name, limit_s)
        except LibraryMissing:
            continue
        seen += watch.look()
        if watch.warning:
            warnings.append(watch.warning)
        watch.close()
    return seen, warnings
