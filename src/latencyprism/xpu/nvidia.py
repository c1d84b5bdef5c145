"""NVIDIA devices by NVML, which comes with the driver."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from ctypes import byref, c_char_p, c_int, c_longlong, c_uint, c_ulong, c_ulonglong, c_void_p
from typing import Any

from latencyprism.errors import PrismError
from latencyprism.xpu.device import Device, DeviceProcess, Telemetry
from latencyprism.xpu.library import function, open_library
from latencyprism.xpu.place import numa_node_of

NAMES = ("libnvidia-ml.so.1", "libnvidia-ml.so", "/usr/local/nvidia/lib64/libnvidia-ml.so.1")
_SIZE = 96
_MOST_PROCESSES = 256
_MOST_LINKS = 18
_TOO_SMALL = 7
_CLOCK_SM, _CLOCK_MEMORY = 1, 2
_PCIE_SENT, _PCIE_RECEIVED = 0, 1
_CORRECTED, _UNCORRECTED, _VOLATILE = 0, 1, 0
_EVENT_XID, _EVENT_DOUBLE_BIT = 8, 2
_FIELD_LINK_SENT, _FIELD_LINK_RECEIVED = 138, 139
_ALL_LINKS = 0xFFFFFFFF
_INTEGER_KINDS = {1: "ui", 2: "ul", 3: "ull", 4: "sll"}

# Bits of the "clocks event reasons" word, as documented; a bit of another driver is told by its number.
# Idle (bit 0) and clocks set by an application (bit 1) are no throttling.
_QUIET_BITS = 0x3
_REASONS = {
    0x4: "power cap (software)",
    0x8: "hardware slowdown",
    0x10: "sync boost with a slower device",
    0x20: "thermal (software)",
    0x40: "thermal (hardware)",
    0x80: "power brake (hardware)",
    0x100: "display clock",
}


class _Pci(ctypes.Structure):
    _fields_ = (
        ("legacy", ctypes.c_char * 16),
        ("domain", c_uint),
        ("bus", c_uint),
        ("device", c_uint),
        ("vendor_device", c_uint),
        ("subsystem", c_uint),
        ("text", ctypes.c_char * 32),
    )


class _Memory(ctypes.Structure):
    _fields_ = (("total", c_ulonglong), ("free", c_ulonglong), ("used", c_ulonglong))


class _Utilisation(ctypes.Structure):
    _fields_ = (("gpu", c_uint), ("memory", c_uint))


class _Process(ctypes.Structure):
    _fields_ = (
        ("pid", c_uint),
        ("memory", c_ulonglong),
        ("gpu_instance", c_uint),
        ("compute_instance", c_uint),
    )


class _Value(ctypes.Union):
    _fields_ = (
        ("d", ctypes.c_double),
        ("ui", c_uint),
        ("ul", c_ulong),
        ("ull", c_ulonglong),
        ("sll", c_longlong),
    )


class _Field(ctypes.Structure):
    _fields_ = (
        ("field", c_uint),
        ("scope", c_uint),
        ("timestamp", c_longlong),
        ("latency", c_longlong),
        ("kind", c_int),
        ("result", c_int),
        ("value", _Value),
    )


class _Event(ctypes.Structure):
    _fields_ = (
        ("device", c_void_p),
        ("kind", c_ulonglong),
        ("data", c_ulonglong),
        ("gpu_instance", c_uint),
        ("compute_instance", c_uint),
    )


class Nvidia:
    """See ``Vendor``. ``library``: a path to use instead of the system's."""

    name = "nvidia"

    def __init__(self, library: str | None = None) -> None:
        self._lib = open_library((library,) if library else NAMES, "NVIDIA's management library")
        self._lib.nvmlErrorString.restype = c_char_p
        self._must("nvmlInit_v2", self._call(("nvmlInit_v2", "nvmlInit")))
        self._handles: dict[int, c_void_p] = {}
        self._events: dict[int, c_void_p] = {}

    def _call(self, names: tuple[str, ...], *arguments: Any) -> int:
        """NVML's return code; -1 where this version has none of the functions."""
        found = function(self._lib, *names)
        return -1 if found is None else found(*arguments)

    def _must(self, what: str, code: int) -> None:
        if code:
            raise PrismError("NVIDIA's driver does not answer", f"{what}: {self._text(code)}")

    def _text(self, code: int) -> str:
        if code < 0:
            return "this version of the library has no such function"
        text = self._lib.nvmlErrorString(c_int(code))
        return text.decode("utf-8", "replace") if text else str(code)

    def _number(self, names: str | tuple[str, ...], *arguments: Any, kind: Any = c_uint) -> int | None:
        """The number that a getter writes through its last argument; None if it refuses."""
        value = kind()
        names = (names,) if isinstance(names, str) else names
        return None if self._call(names, *arguments, byref(value)) else int(value.value)

    def _string(self, name: str, *arguments: Any) -> str | None:
        text = ctypes.create_string_buffer(_SIZE)
        code = self._call((name,), *arguments, text, c_uint(_SIZE))
        return None if code else text.value.decode("utf-8", "replace")

    # -- Vendor ----------------------------------------------------------------------------------

    def devices(self) -> list[Device]:
        count = c_uint()
        names = ("nvmlDeviceGetCount_v2", "nvmlDeviceGetCount")
        self._must(names[0], self._call(names, byref(count)))
        driver = self._string("nvmlSystemGetDriverVersion")
        return [device for n in range(count.value) if (device := self._device(n, driver)) is not None]

    def _device(self, index: int, driver: str | None) -> Device | None:
        handle = c_void_p()
        names = ("nvmlDeviceGetHandleByIndex_v2", "nvmlDeviceGetHandleByIndex")
        if self._call(names, c_uint(index), byref(handle)):
            return None  # of another user's container: counted, but not to be looked at
        self._handles[index] = handle
        pci = _Pci()
        known = self._call(("nvmlDeviceGetPciInfo_v3", "nvmlDeviceGetPciInfo_v2"), handle, byref(pci)) == 0
        bus = pci.text.decode("ascii", "replace").lower() if known else None
        return Device(
            vendor=self.name,
            index=index,
            name=self._string("nvmlDeviceGetName", handle) or "NVIDIA device",
            uuid=self._string("nvmlDeviceGetUUID", handle),
            bus=bus,
            numa_node=numa_node_of(bus),
            driver=driver,
        )

    def _handle(self, device: Device) -> c_void_p:
        if device.index not in self._handles:
            self.devices()
        if device.index not in self._handles:
            raise PrismError(f"there is no NVIDIA device {device.index}")
        return self._handles[device.index]

    def processes(self, device: Device) -> list[DeviceProcess]:
        handle = self._handle(device)
        count = c_uint(_MOST_PROCESSES)
        found = (_Process * _MOST_PROCESSES)()
        name = "nvmlDeviceGetComputeRunningProcesses_v3"
        code = self._call((name,), handle, byref(count), found)
        if code == _TOO_SMALL:
            count.value = _MOST_PROCESSES
        else:
            self._must(name, code)
        known = found[: min(count.value, _MOST_PROCESSES)]
        return [
            DeviceProcess(int(each.pid), None if each.memory >= 2**63 else int(each.memory)) for each in known
        ]

    def telemetry(self, device: Device) -> Telemetry:
        handle = self._handle(device)
        number = self._number
        power, limit = number("nvmlDeviceGetPowerUsage", handle), self._limit(handle)
        memory, use = _Memory(), _Utilisation()
        has_memory = self._call(("nvmlDeviceGetMemoryInfo",), handle, byref(memory)) == 0
        has_use = self._call(("nvmlDeviceGetUtilizationRates",), handle, byref(use)) == 0
        received, sent = (self._pcie(handle, way) for way in (_PCIE_RECEIVED, _PCIE_SENT))
        links = self._links_up(handle)
        return Telemetry(
            time_ns=time.monotonic_ns(),
            clock_mhz=number("nvmlDeviceGetClockInfo", handle, c_int(_CLOCK_SM)),
            clock_max_mhz=number("nvmlDeviceGetMaxClockInfo", handle, c_int(_CLOCK_SM)),
            memory_clock_mhz=number("nvmlDeviceGetClockInfo", handle, c_int(_CLOCK_MEMORY)),
            throttled=self._throttled(handle),
            power_w=None if power is None else power / 1000,
            power_limit_w=None if limit is None else limit / 1000,
            temperature_c=number("nvmlDeviceGetTemperature", handle, c_int(0)),
            compute_utilisation=use.gpu / 100 if has_use else None,
            memory_utilisation=use.memory / 100 if has_use else None,
            memory_used_bytes=int(memory.used) if has_memory else None,
            memory_total_bytes=int(memory.total) if has_memory else None,
            pcie_received_bytes_per_s=received,
            pcie_sent_bytes_per_s=sent,
            pcie_replays=number("nvmlDeviceGetPcieReplayCounter", handle),
            link_name="NVLink" if links else None,
            links_up=links,
            link_received_bytes=self._link_bytes(handle, _FIELD_LINK_RECEIVED) if links else None,
            link_sent_bytes=self._link_bytes(handle, _FIELD_LINK_SENT) if links else None,
            ecc_corrected=self._ecc(handle, _CORRECTED),
            ecc_uncorrected=self._ecc(handle, _UNCORRECTED),
            events=self._faults(device.index, handle),
        )

    def _limit(self, handle: c_void_p) -> int | None:
        return self._number(("nvmlDeviceGetEnforcedPowerLimit", "nvmlDeviceGetPowerManagementLimit"), handle)

    def _throttled(self, handle: c_void_p) -> tuple[str, ...] | None:
        bits = self._number(
            ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"),
            handle,
            kind=c_ulonglong,
        )
        return None if bits is None else throttle_words(bits)

    def _pcie(self, handle: c_void_p, way: int) -> float | None:
        """Bytes per second over the driver's window of 20 ms, for which the call waits."""
        kilobytes = self._number("nvmlDeviceGetPcieThroughput", handle, c_int(way))
        return None if kilobytes is None else kilobytes * 1000.0

    def _ecc(self, handle: c_void_p, kind: int) -> int | None:
        return self._number(
            "nvmlDeviceGetTotalEccErrors", handle, c_int(kind), c_int(_VOLATILE), kind=c_ulonglong
        )

    def _links_up(self, handle: c_void_p) -> int | None:
        states = [self._number("nvmlDeviceGetNvLinkState", handle, c_uint(n)) for n in range(_MOST_LINKS)]
        known = [state for state in states if state is not None]
        return sum(known) if known else None

    def _link_bytes(self, handle: c_void_p, field: int) -> int | None:
        """Total over all links since the driver was loaded."""
        asked = _Field(field=field, scope=_ALL_LINKS)
        if self._call(("nvmlDeviceGetFieldValues",), handle, c_int(1), byref(asked)) or asked.result:
            return None
        member = _INTEGER_KINDS.get(asked.kind)
        return None if member is None else int(getattr(asked.value, member)) * 1024

    def _faults(self, index: int, handle: c_void_p) -> tuple[str, ...] | None:
        """XID and double-bit events since the last look, without waiting for one."""
        waiting = self._events.get(index)
        if waiting is None:
            waiting = c_void_p()
            if self._call(("nvmlEventSetCreate",), byref(waiting)):
                return None
            wanted = c_ulonglong(_EVENT_XID | _EVENT_DOUBLE_BIT)
            if self._call(("nvmlDeviceRegisterEvents",), handle, wanted, waiting):
                self._call(("nvmlEventSetFree",), waiting)
                return None
            self._events[index] = waiting
        told: list[str] = []
        event = _Event()
        wait = ("nvmlEventSetWait_v2", "nvmlEventSetWait")
        while len(told) < 16 and self._call(wait, waiting, byref(event), c_uint(0)) == 0:
            told.append(f"XID {event.data}" if event.kind == _EVENT_XID else "double-bit memory error")
        return tuple(told)

    def close(self) -> None:
        """Give the library back. Not after a call that hung."""
        free: Callable[..., int] | None = function(self._lib, "nvmlEventSetFree")
        for waiting in self._events.values():
            if free is not None:
                free(waiting)
        self._events.clear()
        self._call(("nvmlShutdown",))


def throttle_words(bits: int) -> tuple[str, ...]:
    """Reasons in words, for the bits of NVML's clock event reasons."""
    words = [text for bit, text in _REASONS.items() if bits & bit]
    unknown = bits & ~_QUIET_BITS & ~sum(_REASONS)
    return tuple(words + ([f"reason {unknown:#x}"] if unknown else []))
