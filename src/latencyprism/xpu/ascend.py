"""Huawei Ascend devices by DCMI, which comes with the driver."""

from __future__ import annotations

import ctypes
import time
from ctypes import byref, c_char, c_int, c_uint, c_ulong, c_ulonglong
from typing import Any

from latencyprism.errors import PrismError
from latencyprism.xpu.device import Device, DeviceProcess, Telemetry
from latencyprism.xpu.library import function, open_library
from latencyprism.xpu.place import numa_node_of

NAMES = ("libdcmi.so", "/usr/local/dcmi/libdcmi.so", "/usr/local/Ascend/driver/lib64/driver/libdcmi.so")
_MOST_CARDS, _MOST_PROCESSES, _MOST_FAULTS = 64, 64, 128
_USE_CORES, _USE_MEMORY_BANDWIDTH = 2, 10
_CLOCK_MEMORY, _CLOCK_CORES, _CLOCK_CORES_MAX = 6, 7, 9
_ECC_OF_MEMORY = 2
_MEGABYTE = 1 << 20


class _Chip(ctypes.Structure):
    _fields_ = (("kind", c_char * 32), ("name", c_char * 32), ("version", c_char * 32), ("cores", c_uint))


class _Memory(ctypes.Structure):
    _fields_ = (
        ("size", c_ulonglong),
        ("clock", c_uint),
        ("used", c_ulonglong),
        ("temperature", c_int),
        ("bandwidth_use", c_uint),
    )


class _Ecc(ctypes.Structure):
    _fields_ = (
        ("enabled", c_int),
        ("single", c_uint),
        ("double", c_uint),
        ("total_single", c_uint),
        ("total_double", c_uint),
        ("isolated_single", c_uint),
        ("isolated_double", c_uint),
    )


class _Pci(ctypes.Structure):
    _fields_ = (
        ("ids", c_uint * 4),
        ("domain", c_int),
        ("bus", c_uint),
        ("device", c_uint),
        ("function", c_uint),
        ("reserved", c_char * 32),
    )


class _Process(ctypes.Structure):
    _fields_ = (("pid", c_int), ("memory", c_ulong))


class Ascend:
    """See ``Vendor``. A device is one chip of a card; DCMI tells no throttle reasons, power limit or rates of
    PCIe and HCCS without a measurement of its own, so those stay null."""

    name = "ascend"

    def __init__(self, library: str | None = None) -> None:
        self._lib = open_library((library,) if library else NAMES, "Ascend's device management library")
        self._must("dcmi_init", self._call("dcmi_init"))
        self._places: dict[int, tuple[c_int, c_int]] = {}
        self._faults: dict[int, frozenset[int]] = {}

    def _call(self, name: str, *arguments: Any) -> int:
        found = function(self._lib, name)
        return -1 if found is None else found(*arguments)

    def _must(self, what: str, code: int) -> None:
        if code:
            raise PrismError("Ascend's driver does not answer", f"{what}: {code}")

    # -- Vendor ----------------------------------------------------------------------------------

    def devices(self) -> list[Device]:
        count, cards = c_int(), (c_int * _MOST_CARDS)()
        code = self._call("dcmi_get_card_list", byref(count), cards, c_int(_MOST_CARDS))
        if code == -1:
            code = self._call("dcmi_get_card_num_list", byref(count), cards, c_int(_MOST_CARDS))
        self._must("dcmi_get_card_list", code)
        found: list[Device] = []
        for card in cards[: max(0, min(count.value, _MOST_CARDS))]:
            chips = c_int()
            if self._call("dcmi_get_device_num_in_card", c_int(card), byref(chips)):
                continue
            for chip in range(max(0, min(chips.value, 8))):
                place = (c_int(card), c_int(chip))
                self._places[len(found)] = place
                found.append(self._device(len(found), place))
        return found

    def _device(self, index: int, place: tuple[c_int, c_int]) -> Device:
        chip, pci = _Chip(), _Pci()
        named = self._call("dcmi_get_device_chip_info", *place, byref(chip)) == 0
        located = self._call("dcmi_get_device_pcie_info_v2", *place, byref(pci)) == 0
        bus = (
            f"{pci.domain & 0xFFFF:04x}:{pci.bus:02x}:{pci.device:02x}.{pci.function:x}" if located else None
        )
        name = f"{chip.kind.decode('ascii', 'replace')} {chip.name.decode('ascii', 'replace')}".strip()
        return Device(
            vendor=self.name,
            index=index,
            name=name if named and name else "Ascend device",
            bus=bus,
            numa_node=numa_node_of(bus),
            driver=self._version(),
        )

    def _version(self) -> str | None:
        text = ctypes.create_string_buffer(64)
        code = self._call("dcmi_get_driver_version", text, c_uint(64))
        return None if code else text.value.decode("ascii", "replace")

    def _place(self, device: Device) -> tuple[c_int, c_int]:
        if device.index not in self._places:
            self.devices()
        if device.index not in self._places:
            raise PrismError(f"there is no Ascend device {device.index}")
        return self._places[device.index]

    def processes(self, device: Device) -> list[DeviceProcess]:
        found, count = (_Process * _MOST_PROCESSES)(), c_int(_MOST_PROCESSES)
        name = "dcmi_get_device_resource_info"
        self._must(name, self._call(name, *self._place(device), found, byref(count)))
        known = found[: max(0, min(count.value, _MOST_PROCESSES))]
        return [DeviceProcess(int(each.pid), int(each.memory)) for each in known]

    def telemetry(self, device: Device) -> Telemetry:
        place = self._place(device)
        memory, ecc, watts, degrees = _Memory(), _Ecc(), c_int(), c_int()
        has_memory = self._call("dcmi_get_device_hbm_info", *place, byref(memory)) == 0
        has_ecc = self._call("dcmi_get_device_ecc_info", *place, c_int(_ECC_OF_MEMORY), byref(ecc)) == 0
        has_power = self._call("dcmi_get_device_power_info", *place, byref(watts)) == 0
        has_heat = self._call("dcmi_get_device_temperature", *place, byref(degrees)) == 0
        cores = self._number("dcmi_get_device_utilization_rate", place, _USE_CORES)
        bandwidth = self._number("dcmi_get_device_utilization_rate", place, _USE_MEMORY_BANDWIDTH)
        return Telemetry(
            time_ns=time.monotonic_ns(),
            clock_mhz=self._number("dcmi_get_device_frequency", place, _CLOCK_CORES),
            clock_max_mhz=self._number("dcmi_get_device_frequency", place, _CLOCK_CORES_MAX),
            memory_clock_mhz=self._number("dcmi_get_device_frequency", place, _CLOCK_MEMORY),
            power_w=watts.value / 10 if has_power else None,
            temperature_c=float(degrees.value) if has_heat else None,
            compute_utilisation=None if cores is None else cores / 100,
            memory_utilisation=None if bandwidth is None else bandwidth / 100,
            memory_used_bytes=int(memory.used) * _MEGABYTE if has_memory else None,
            memory_total_bytes=int(memory.size) * _MEGABYTE if has_memory else None,
            ecc_corrected=int(ecc.total_single) if has_ecc else None,
            ecc_uncorrected=int(ecc.total_double) if has_ecc else None,
            events=self._new_faults(device.index, place),
        )

    def _number(self, name: str, place: tuple[c_int, c_int], which: int) -> int | None:
        value = c_uint()
        return None if self._call(name, *place, c_int(which), byref(value)) else int(value.value)

    def _new_faults(self, index: int, place: tuple[c_int, c_int]) -> tuple[str, ...] | None:
        """Fault codes that stand now and did not at the reading before."""
        count, codes = c_int(), (c_uint * _MOST_FAULTS)()
        name = "dcmi_get_device_errorcode_v2"
        if self._call(name, *place, byref(count), codes, c_uint(_MOST_FAULTS)):
            return None
        now = frozenset(int(code) for code in codes[: max(0, min(count.value, _MOST_FAULTS))])
        new = now - self._faults.get(index, frozenset())
        self._faults[index] = now
        return tuple(f"fault {code:#010x}" for code in sorted(new))

    def close(self) -> None:
        """DCMI has nothing to give back."""
