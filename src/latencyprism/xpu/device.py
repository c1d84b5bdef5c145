"""What is said of an accelerator, whoever made it: devices, who uses them, and how they fare now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Device:
    """``index`` counts from 0 as the vendor's library does; ``uuid`` and ``bus`` (PCI address) as it writes
    them; ``numa_node``: the node that its bus hangs on."""

    vendor: str
    index: int
    name: str
    uuid: str | None = None
    bus: str | None = None
    numa_node: int | None = None
    driver: str | None = None


@dataclass(frozen=True, slots=True)
class DeviceProcess:
    """A process with work on a device; ``pid`` as the driver gives it, which may be another namespace's."""

    pid: int
    memory_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Telemetry:
    """One reading. None is not given by this device, driver or user's rights; never a zero in its place.

    ``*_utilisation``: share of the driver's own sampling time (0 to 1) in which any kernel ran, or memory was
    read or written: 1.0 does not mean that the device could not do more. Totals count from a moment of the
    driver's choosing (``pcie_replays``, ``ecc_*``, ``link_*_bytes``): take differences. ``throttled``: why
    clocks are held down, in words, empty when they are not. ``events``: faults told since the reading
    before (XID, RAS), in words. ``pcie_*`` and ``link_*_bytes_per_s`` are rates over the driver's own window.
    """

    time_ns: int
    clock_mhz: int | None = None
    clock_max_mhz: int | None = None
    memory_clock_mhz: int | None = None
    throttled: tuple[str, ...] | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    temperature_c: float | None = None
    compute_utilisation: float | None = None
    memory_utilisation: float | None = None
    memory_used_bytes: int | None = None
    memory_total_bytes: int | None = None
    pcie_received_bytes_per_s: float | None = None
    pcie_sent_bytes_per_s: float | None = None
    pcie_replays: int | None = None
    link_name: str | None = None
    links_up: int | None = None
    link_received_bytes: int | None = None
    link_sent_bytes: int | None = None
    ecc_corrected: int | None = None
    ecc_uncorrected: int | None = None
    events: tuple[str, ...] | None = None


class Vendor(Protocol):
    """One vendor's library, opened on construction. Every call may hang with the driver: ``vendors.Watch``
    bounds them. PrismError where the library answers with an error that leaves nothing to say."""

    @property
    def name(self) -> str: ...

    def devices(self) -> Sequence[Device]: ...

    def processes(self, device: Device) -> Sequence[DeviceProcess]: ...

    def telemetry(self, device: Device) -> Telemetry: ...

    def close(self) -> None: ...
