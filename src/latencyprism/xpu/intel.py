"""Intel GPUs by Level Zero Sysman, which comes with the compute driver."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from ctypes import byref, c_char, c_double, c_int32, c_int64, c_uint8, c_uint32, c_uint64, c_void_p
from typing import Any, ClassVar, TypeVar

from latencyprism.errors import PrismError
from latencyprism.xpu.device import Device, DeviceProcess, Telemetry
from latencyprism.xpu.library import function, open_library
from latencyprism.xpu.place import numa_node_of

NAMES = ("libze_loader.so.1", "libze_loader.so")
_MOST = 64
_DEVICE_PROPERTIES, _PCI_PROPERTIES, _ENGINE_PROPERTIES, _FREQUENCY_PROPERTIES = 0x1, 0x2, 0x5, 0x9
_RAS_PROPERTIES, _TEMPERATURE_PROPERTIES, _PROCESS_STATE = 0xF, 0x14, 0x16
_FREQUENCY_STATE, _MEMORY_STATE, _RAS_STATE = 0x1B, 0x1E, 0x22
_DOMAIN_GPU, _DOMAIN_MEMORY = 0, 1
_SENSOR_GPU = 1
_ENGINES_ALL, _ENGINES_COMPUTE = 0, 1
_CORRECTABLE = 0
_REASONS = {
    1 << 0: "power cap (average)",
    1 << 1: "power cap (burst)",
    1 << 2: "current limit",
    1 << 3: "thermal limit",
    1 << 4: "power supply alert",
    1 << 5: "clock range (software)",
    1 << 6: "clock range (hardware)",
    1 << 7: "voltage",
    1 << 8: "thermal",
    1 << 9: "power",
}

H = TypeVar("H", bound=ctypes.Structure)


class _Described(ctypes.Structure):
    """The head of every structure that says what it is."""

    _fields_: ClassVar[Sequence[tuple[str, Any]]] = (("stype", c_uint32), ("next", c_void_p))


class _Core(_Described):
    _fields_ = (
        ("kind", c_uint32),
        ("vendor_id", c_uint32),
        ("device_id", c_uint32),
        ("flags", c_uint32),
        ("subdevice_id", c_uint32),
        ("core_clock", c_uint32),
        ("max_allocation", c_uint64),
        ("numbers", c_uint32 * 7),
        ("timer_resolution", c_uint64),
        ("valid_bits", c_uint32 * 2),
        ("uuid", c_uint8 * 16),
        ("name", c_char * 256),
    )


class _Properties(_Described):
    _fields_ = (
        ("core", _Core),
        ("subdevices", c_uint32),
        ("serial", c_char * 64),
        ("board", c_char * 64),
        ("brand", c_char * 64),
        ("model", c_char * 64),
        ("vendor", c_char * 64),
        ("driver", c_char * 64),
    )


class _Speed(ctypes.Structure):
    _fields_ = (("generation", c_int32), ("width", c_int32), ("bandwidth", c_int64))


class _Pci(_Described):
    _fields_ = (
        ("domain", c_uint32),
        ("bus", c_uint32),
        ("device", c_uint32),
        ("function", c_uint32),
        ("speed", _Speed),
        ("bandwidth_counters", c_uint8),
        ("packet_counters", c_uint8),
        ("replay_counters", c_uint8),
    )


class _PciStats(ctypes.Structure):
    _fields_ = (
        ("timestamp_us", c_uint64),
        ("replays", c_uint64),
        ("packets", c_uint64),
        ("received", c_uint64),
        ("sent", c_uint64),
        ("speed", _Speed),
    )


class _FrequencyProperties(_Described):
    _fields_ = (
        ("domain", c_uint32),
        ("on_subdevice", c_uint8),
        ("subdevice", c_uint32),
        ("can_control", c_uint8),
        ("throttle_events", c_uint8),
        ("least", c_double),
        ("most", c_double),
    )


class _Frequency(_Described):
    _fields_ = (
        ("voltage", c_double),
        ("request", c_double),
        ("tdp", c_double),
        ("efficient", c_double),
        ("actual", c_double),
        ("reasons", c_uint32),
    )


class _Placed(_Described):
    """Properties that begin with a kind: of engine groups, temperature sensors, error sets."""

    _fields_ = (
        ("kind", c_uint32),
        ("on_subdevice", c_uint8),
        ("subdevice", c_uint32),
        ("more", c_uint64 * 4),
    )


class _Counted(ctypes.Structure):
    """Energy (uJ) or active time (us), and when that was (us)."""

    _fields_ = (("value", c_uint64), ("timestamp_us", c_uint64))


class _Sustained(ctypes.Structure):
    _fields_ = (("enabled", c_uint8), ("power_mw", c_int32), ("interval_ms", c_int32))


class _Memory(_Described):
    _fields_ = (("health", c_uint32), ("free", c_uint64), ("size", c_uint64))


class _Bandwidth(ctypes.Structure):
    _fields_ = (("read", c_uint64), ("written", c_uint64), ("most", c_uint64), ("timestamp_us", c_uint64))


class _Process(_Described):
    _fields_ = (("pid", c_uint32), ("memory", c_uint64), ("shared", c_uint64), ("engines", c_uint32))


class _Errors(_Described):
    _fields_ = (("category", c_uint64 * 7),)


class Intel:
    """See ``Vendor``. Power, utilisation and PCIe rates are differences: null at a device's first reading."""

    name = "intel"

    def __init__(self, library: str | None = None) -> None:
        self._lib = open_library((library,) if library else NAMES, "Intel's Level Zero loader")
        code = self._call("zesInit", c_uint32(0))
        if code:
            raise PrismError("Intel's driver does not answer", f"zesInit: {code & 0xFFFFFFFF:#x}")
        self._handles: dict[int, c_void_p] = {}
        self._before: dict[tuple[int, str], tuple[int, int]] = {}

    def _call(self, name: str, *arguments: Any) -> int:
        found = function(self._lib, name)
        return -1 if found is None else found(*arguments)

    def _list(self, name: str, *owner: c_void_p) -> list[c_void_p]:
        """Handles from a function that is first asked how many there are."""
        count = c_uint32(0)
        if self._call(name, *owner, byref(count), None) or not count.value:
            return []
        count.value = min(count.value, _MOST)
        handles = (c_void_p * count.value)()
        if self._call(name, *owner, byref(count), handles):
            return []
        return [c_void_p(handle) for handle in handles[: count.value] if handle]

    def _get(self, name: str, handle: c_void_p, into: H) -> H | None:
        return None if self._call(name, handle, byref(into)) else into

    # -- Vendor ----------------------------------------------------------------------------------

    def devices(self) -> list[Device]:
        found: list[Device] = []
        for driver in self._list("zesDriverGet"):
            for handle in self._list("zesDeviceGet", driver):
                index = len(found)
                self._handles[index] = handle
                found.append(self._device(index, handle))
        return found

    def _device(self, index: int, handle: c_void_p) -> Device:
        known = self._get("zesDeviceGetProperties", handle, _Properties(stype=_DEVICE_PROPERTIES))
        pci = self._get("zesDevicePciGetProperties", handle, _Pci(stype=_PCI_PROPERTIES))
        bus = f"{pci.domain:04x}:{pci.bus:02x}:{pci.device:02x}.{pci.function:x}" if pci else None
        return Device(
            vendor=self.name,
            index=index,
            name=known.core.name.decode("utf-8", "replace") if known else "Intel device",
            uuid=bytes(known.core.uuid).hex() if known else None,
            bus=bus,
            numa_node=numa_node_of(bus),
            driver=known.driver.decode("utf-8", "replace") or None if known else None,
        )

    def _handle(self, device: Device) -> c_void_p:
        if device.index not in self._handles:
            self.devices()
        if device.index not in self._handles:
            raise PrismError(f"there is no Intel device {device.index}")
        return self._handles[device.index]

    def processes(self, device: Device) -> list[DeviceProcess]:
        handle, count = self._handle(device), c_uint32(0)
        if self._call("zesDeviceProcessesGetState", handle, byref(count), None):
            raise PrismError("Intel's driver does not tell processes")
        count.value = min(count.value + 8, 4 * _MOST)
        found = (_Process * count.value)()
        for each in found:
            each.stype = _PROCESS_STATE
        if self._call("zesDeviceProcessesGetState", handle, byref(count), found):
            raise PrismError("Intel's driver does not tell processes")
        return [DeviceProcess(int(each.pid), int(each.memory)) for each in found[: count.value]]

    def telemetry(self, device: Device) -> Telemetry:
        handle = self._handle(device)
        clock, clock_max, throttled = self._clock(handle, _DOMAIN_GPU)
        memory_clock, _, _ = self._clock(handle, _DOMAIN_MEMORY)
        power, limit = self._power(device.index, handle)
        used, total, busy = self._memory(device.index, handle)
        stats = self._get("zesDevicePciGetStats", handle, _PciStats())
        pci = self._get("zesDevicePciGetProperties", handle, _Pci(stype=_PCI_PROPERTIES))
        rates = stats if stats and pci and pci.bandwidth_counters else None
        correctable, uncorrectable = self._errors(handle)
        return Telemetry(
            time_ns=time.monotonic_ns(),
            clock_mhz=clock,
            clock_max_mhz=clock_max,
            memory_clock_mhz=memory_clock,
            throttled=throttled,
            power_w=power,
            power_limit_w=limit,
            temperature_c=self._temperature(handle),
            compute_utilisation=self._engines(device.index, handle),
            memory_utilisation=busy,
            memory_used_bytes=used,
            memory_total_bytes=total,
            pcie_received_bytes_per_s=self._per_s(
                device.index, "rx", rates.received if rates else None, rates
            ),
            pcie_sent_bytes_per_s=self._per_s(device.index, "tx", rates.sent if rates else None, rates),
            pcie_replays=int(stats.replays) if stats and pci and pci.replay_counters else None,
            ecc_corrected=correctable,
            ecc_uncorrected=uncorrectable,
        )

    def _since(self, index: int, what: str, value: int, timestamp_us: int) -> tuple[int, int] | None:
        """(growth, microseconds) since the reading before."""
        before = self._before.get((index, what))
        self._before[index, what] = (value, timestamp_us)
        if before is None or timestamp_us <= before[1] or value < before[0]:
            return None
        return value - before[0], timestamp_us - before[1]

    def _per_s(self, index: int, what: str, value: int | None, stats: _PciStats | None) -> float | None:
        if value is None or stats is None:
            return None
        grown = self._since(index, what, int(value), int(stats.timestamp_us))
        return None if grown is None else grown[0] / grown[1] * 1e6

    def _clock(self, handle: c_void_p, domain: int) -> tuple[int | None, int | None, tuple[str, ...] | None]:
        for each in self._list("zesDeviceEnumFrequencyDomains", handle):
            known = self._get(
                "zesFrequencyGetProperties", each, _FrequencyProperties(stype=_FREQUENCY_PROPERTIES)
            )
            state = self._get("zesFrequencyGetState", each, _Frequency(stype=_FREQUENCY_STATE))
            if known and state and known.domain == domain:
                words = tuple(text for bit, text in _REASONS.items() if state.reasons & bit)
                clock = int(state.actual) if state.actual >= 0 else None
                return clock, int(known.most) if known.most > 0 else None, words
        return None, None, None

    def _power(self, index: int, handle: c_void_p) -> tuple[float | None, float | None]:
        """Watts and the sustained limit of the first power domain, that of the card."""
        for each in self._list("zesDeviceEnumPowerDomains", handle):
            counted = self._get("zesPowerGetEnergyCounter", each, _Counted())
            grown = self._since(index, "energy", counted.value, counted.timestamp_us) if counted else None
            limit = _Sustained()
            known = self._call("zesPowerGetLimits", each, byref(limit), None, None) == 0 and limit.enabled
            return (grown[0] / grown[1] if grown else None, limit.power_mw / 1000 if known else None)
        return None, None

    def _temperature(self, handle: c_void_p) -> float | None:
        for each in self._list("zesDeviceEnumTemperatureSensors", handle):
            known = self._get("zesTemperatureGetProperties", each, _Placed(stype=_TEMPERATURE_PROPERTIES))
            value = c_double()
            if known and known.kind == _SENSOR_GPU:
                return None if self._call("zesTemperatureGetState", each, byref(value)) else value.value
        return None

    def _engines(self, index: int, handle: c_void_p) -> float | None:
        for wanted in (_ENGINES_COMPUTE, _ENGINES_ALL):
            for each in self._list("zesDeviceEnumEngineGroups", handle):
                known = self._get("zesEngineGetProperties", each, _Placed(stype=_ENGINE_PROPERTIES))
                counted = _Counted()
                if (
                    not known
                    or known.kind != wanted
                    or self._call("zesEngineGetActivity", each, byref(counted))
                ):
                    continue
                grown = self._since(index, f"engine {wanted}", counted.value, counted.timestamp_us)
                return None if grown is None else min(1.0, grown[0] / grown[1])
        return None

    def _memory(self, index: int, handle: c_void_p) -> tuple[int | None, int | None, float | None]:
        """Used and total bytes of all modules; the share of its bandwidth that the first one used."""
        used = total = 0
        busy = None
        for number, each in enumerate(self._list("zesDeviceEnumMemoryModules", handle)):
            state = self._get("zesMemoryGetState", each, _Memory(stype=_MEMORY_STATE))
            if state is None:
                return None, None, None
            used += state.size - state.free
            total += state.size
            moved = self._get("zesMemoryGetBandwidth", each, _Bandwidth()) if number == 0 else None
            if moved and moved.most:
                grown = self._since(index, "memory", moved.read + moved.written, moved.timestamp_us)
                busy = None if grown is None else min(1.0, grown[0] * 1e6 / (moved.most * grown[1]))
        return (used, total, busy) if total else (None, None, None)

    def _errors(self, handle: c_void_p) -> tuple[int | None, int | None]:
        sums: dict[bool, int] = {}
        for each in self._list("zesDeviceEnumRasErrorSets", handle):
            known = self._get("zesRasGetProperties", each, _Placed(stype=_RAS_PROPERTIES))
            state = _Errors(stype=_RAS_STATE)
            if known and not self._call("zesRasGetState", each, c_uint8(0), byref(state)):
                kind = known.kind == _CORRECTABLE
                sums[kind] = sums.get(kind, 0) + sum(state.category)
        return sums.get(True), sums.get(False)

    def close(self) -> None:
        """Level Zero has nothing to give back."""
