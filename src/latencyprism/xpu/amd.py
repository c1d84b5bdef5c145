"""AMD GPUs by the Python interface that ROCm brings along for AMD SMI (``amdsmi``)."""

from __future__ import annotations

import glob
import importlib
import sys
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

from latencyprism.errors import PrismError
from latencyprism.xpu.device import Device, DeviceProcess, Telemetry
from latencyprism.xpu.library import LibraryMissing
from latencyprism.xpu.place import numa_node_of

FOLDERS = "/opt/rocm*/share/amd_smi"
"""Where ROCm puts the interface for all Pythons of the machine; one that is installed comes first."""

_VIOLATIONS = {
    "active_prochot_thrm": "thermal (board)",
    "active_ppt_pwr": "power cap",
    "active_socket_thrm": "thermal (socket)",
    "active_vr_thrm": "thermal (voltage regulator)",
    "active_hbm_thrm": "thermal (memory)",
}


def load_interface() -> ModuleType:
    """The ``amdsmi`` module; LibraryMissing where neither it nor its library is."""
    why = "no module amdsmi"
    for folder in (None, *sorted(glob.glob(FOLDERS), reverse=True)):
        if folder is not None:
            sys.path.append(folder)
        try:
            return importlib.import_module("amdsmi")
        except (ImportError, OSError, KeyError, AttributeError) as error:
            # Its loader looks for libamd_smi.so while it is imported, and fails in ways of its own.
            why = str(error) or type(error).__name__
        finally:
            if folder is not None:
                sys.path.remove(folder)
    raise LibraryMissing("AMD's management library is not here", why[:300])


class Amd:
    """See ``Vendor``. ``interface``: a module to use instead of the system's."""

    name = "amd"

    def __init__(self, interface: ModuleType | None = None) -> None:
        self._smi: Any = interface or load_interface()
        try:
            self._smi.amdsmi_init()
            self._handles = list(self._smi.amdsmi_get_processor_handles())
        except Exception as error:  # noqa: BLE001  its exceptions have no common base outside the module
            raise PrismError("AMD's driver does not answer", str(error)[:300]) from None

    def _ask(self, name: str, *arguments: Any) -> Any:
        """What the function returns; None where it is missing or refuses."""
        function: Callable[..., Any] | None = getattr(self._smi, name, None)
        if function is None:
            return None
        try:
            return function(*arguments)
        except Exception:  # noqa: BLE001  "not supported" is an exception there, one class for each version
            return None

    def _kind(self, enumeration: str, member: str) -> Any:
        return getattr(getattr(self._smi, enumeration, None), member, None)

    # -- Vendor ----------------------------------------------------------------------------------

    def devices(self) -> list[Device]:
        return [self._device(index, handle) for index, handle in enumerate(self._handles)]

    def _device(self, index: int, handle: Any) -> Device:
        bus = _text(self._ask("amdsmi_get_gpu_device_bdf", handle))
        return Device(
            vendor=self.name,
            index=index,
            name=_text(_of(self._ask("amdsmi_get_gpu_asic_info", handle), "market_name")) or "AMD device",
            uuid=_text(self._ask("amdsmi_get_gpu_device_uuid", handle)),
            bus=bus.lower() if bus else None,
            numa_node=numa_node_of(bus),
            driver=_text(_of(self._ask("amdsmi_get_gpu_driver_info", handle), "driver_version")),
        )

    def _handle(self, device: Device) -> Any:
        if not 0 <= device.index < len(self._handles):
            raise PrismError(f"there is no AMD device {device.index}")
        return self._handles[device.index]

    def processes(self, device: Device) -> list[DeviceProcess]:
        found = self._ask("amdsmi_get_gpu_process_list", self._handle(device))
        if found is None:
            raise PrismError("AMD's driver does not tell processes")
        named = [(_whole(_of(each, "pid")), _of(_of(each, "memory_usage"), "vram_mem")) for each in found]
        return [DeviceProcess(pid, _whole(memory)) for pid, memory in named if pid]

    def telemetry(self, device: Device) -> Telemetry:
        handle = self._handle(device)
        clock = self._ask("amdsmi_get_clock_info", handle, self._kind("AmdSmiClkType", "GFX"))
        memory_clock = self._ask("amdsmi_get_clock_info", handle, self._kind("AmdSmiClkType", "MEM"))
        use = self._ask("amdsmi_get_gpu_activity", handle)
        power = self._ask("amdsmi_get_power_info", handle)
        cap = _number(_of(self._ask("amdsmi_get_power_cap_info", handle), "power_cap"))
        vram = self._kind("AmdSmiMemoryType", "VRAM")
        pcie = _of(self._ask("amdsmi_get_pcie_info", handle), "pcie_metric")
        ecc = self._ask("amdsmi_get_gpu_total_ecc_count", handle)
        links = self._links(handle)
        watts = _number(_of(power, "current_socket_power"))
        return Telemetry(
            time_ns=time.monotonic_ns(),
            clock_mhz=_whole(_of(clock, "clk")),
            clock_max_mhz=_whole(_of(clock, "max_clk")),
            memory_clock_mhz=_whole(_of(memory_clock, "clk")),
            throttled=self._throttled(handle),
            power_w=watts if watts is not None else _number(_of(power, "average_socket_power")),
            power_limit_w=None if cap is None else cap / 1e6,
            temperature_c=self._temperature(handle),
            compute_utilisation=_share(_of(use, "gfx_activity")),
            memory_utilisation=_share(_of(use, "umc_activity")),
            memory_used_bytes=_whole(self._ask("amdsmi_get_gpu_memory_usage", handle, vram)),
            memory_total_bytes=_whole(self._ask("amdsmi_get_gpu_memory_total", handle, vram)),
            pcie_replays=_whole(_of(pcie, "pcie_replay_count")),
            link_name="xGMI" if links else None,
            links_up=len(links) if links else None,
            link_received_bytes=_sum_kilobytes(links, "read"),
            link_sent_bytes=_sum_kilobytes(links, "write"),
            ecc_corrected=_whole(_of(ecc, "correctable_count")),
            ecc_uncorrected=_whole(_of(ecc, "uncorrectable_count")),
        )

    def _temperature(self, handle: Any) -> float | None:
        now = self._kind("AmdSmiTemperatureMetric", "CURRENT")
        for sensor in ("HOTSPOT", "EDGE"):
            kind = self._kind("AmdSmiTemperatureType", sensor)
            value = _number(self._ask("amdsmi_get_temp_metric", handle, kind, now))
            if value is not None:
                return value
        return None

    def _throttled(self, handle: Any) -> tuple[str, ...] | None:
        status = self._ask("amdsmi_get_violation_status", handle)
        if not isinstance(status, dict):
            return None
        known = {key: status.get(key) for key in _VIOLATIONS if isinstance(status.get(key), (bool, int))}
        return tuple(_VIOLATIONS[key] for key, active in known.items() if active) if known else None

    def _links(self, handle: Any) -> list[Any]:
        found = _of(self._ask("amdsmi_get_link_metrics", handle), "links")
        xgmi = self._kind("AmdSmiLinkType", "AMDSMI_LINK_TYPE_XGMI")
        return [link for link in found or [] if xgmi is None or _of(link, "link_type") in (xgmi, int(xgmi))]

    def close(self) -> None:
        """Give the library back."""
        self._ask("amdsmi_shut_down")


def _of(table: Any, key: str) -> Any:
    return table.get(key) if isinstance(table, dict) else None


def _number(value: Any) -> float | None:
    """A number; "N/A" and the like are None."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _whole(value: Any) -> int | None:
    found = _number(value)
    return None if found is None else int(found)


def _share(value: Any) -> float | None:
    found = _number(value)
    return None if found is None else found / 100


def _text(value: Any) -> str | None:
    return str(value) if isinstance(value, str) and value and value != "N/A" else None


def _sum_kilobytes(links: list[Any], key: str) -> int | None:
    values = [found for link in links if (found := _whole(_of(link, key))) is not None]
    return sum(values) * 1000 if values else None
