"""Accelerators: devices, who uses them, telemetry, symbols worth probing, kernels of a deep dive."""

from latencyprism.xpu.device import Device, DeviceProcess, Telemetry, Vendor
from latencyprism.xpu.kernels import KernelCapture, KernelEvent, capture_kernels
from latencyprism.xpu.library import LibraryMissing
from latencyprism.xpu.symbols import find_libraries, load_libraries
from latencyprism.xpu.vendors import VENDORS, Seen, Watch, survey

__all__ = [
    "VENDORS", "Device", "DeviceProcess", "KernelCapture", "KernelEvent", "LibraryMissing", "Seen",
    "Telemetry", "Vendor", "Watch", "capture_kernels", "find_libraries", "load_libraries", "survey",
]  # fmt: skip
