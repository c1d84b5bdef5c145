"""Each vendor's module on a library with that vendor's symbols: what is read, and that nothing else is."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from enum import IntEnum
from types import ModuleType
from typing import Any

import pytest

from latencyprism.xpu.amd import Amd
from latencyprism.xpu.ascend import Ascend
from latencyprism.xpu.cpu import Cpu, parse_cpu_list
from latencyprism.xpu.intel import Intel
from latencyprism.xpu.nvidia import Nvidia, throttle_words

Build = Callable[..., str]
GB = 1 << 30


def test_nvidia_reads_every_value_and_skips_a_device_it_may_not_see(build: Build) -> None:
    vendor = Nvidia(build("nvml"))
    (device,) = vendor.devices()
    assert (device.name, device.uuid, device.driver) == ("NVIDIA Stub 80GB", "GPU-0001", "580.1")
    assert device.bus == "00000000:3b:00.0"
    reading = vendor.telemetry(device)
    assert (reading.clock_mhz, reading.clock_max_mhz, reading.memory_clock_mhz) == (1755, 1980, 2619)
    assert reading.throttled == ("power cap (software)", "thermal (hardware)", "reason 0x10000")
    assert (reading.power_w, reading.power_limit_w, reading.temperature_c) == (301.5, 700.0, 61)
    assert (reading.compute_utilisation, reading.memory_utilisation) == (0.97, 0.41)
    assert (reading.memory_used_bytes, reading.memory_total_bytes) == (20 * GB, 80 * GB)
    assert (reading.pcie_received_bytes_per_s, reading.pcie_sent_bytes_per_s) == (2e9, 1e9)
    assert (reading.pcie_replays, reading.ecc_corrected, reading.ecc_uncorrected) == (7, 12, 1)
    assert (reading.link_name, reading.links_up) == ("NVLink", 3)
    assert (reading.link_sent_bytes, reading.link_received_bytes) == (5000 * 1024, 6000 * 1024)
    assert reading.events == ("XID 79",)
    assert vendor.telemetry(device).events == ()
    users = vendor.processes(device)
    assert [(user.pid, user.memory_bytes) for user in users] == [(4242, 3 * GB), (4343, None)]
    vendor.close()


def test_nvidia_gives_null_for_everything_a_device_refuses(build: Build) -> None:
    vendor = Nvidia(build("nvml", "-DREFUSE"))
    (device,) = vendor.devices()
    reading = vendor.telemetry(device)
    given = {name for name in reading.__slots__ if getattr(reading, name) not in (None, reading.time_ns)}
    assert given == {"link_name", "links_up"}


def test_throttle_reasons_are_words_and_idleness_is_none() -> None:
    assert throttle_words(0x1 | 0x2) == ()
    assert throttle_words(0x20) == ("thermal (software)",)


def test_ascend_reads_every_chip_of_every_card(build: Build) -> None:
    vendor = Ascend(build("dcmi"))
    devices = vendor.devices()
    assert [device.bus for device in devices] == ["0000:c1:00.0", "0000:c1:00.0", "0000:c4:00.0"]
    assert devices[0].name == "Ascend 910B3" and devices[0].driver == "25.5.1"
    reading = vendor.telemetry(devices[2])
    assert (reading.clock_mhz, reading.clock_max_mhz, reading.memory_clock_mhz) == (700, 900, 600)
    assert (reading.power_w, reading.temperature_c) == (162.4, 44.0)
    assert (reading.memory_used_bytes, reading.memory_total_bytes) == (4 * GB, 64 * GB)
    assert (reading.compute_utilisation, reading.memory_utilisation) == (0.88, None)
    assert (reading.ecc_corrected, reading.ecc_uncorrected) == (5, 2)
    assert reading.events == ("fault 0x80cb8009",)
    assert vendor.telemetry(devices[2]).events == ("fault 0x80e18401",)
    assert [(user.pid, user.memory_bytes) for user in vendor.processes(devices[2])] == [(777, 8 * GB)]


def test_intel_takes_rates_from_differences(build: Build) -> None:
    vendor = Intel(build("level_zero"))
    (device,) = vendor.devices()
    assert (device.name, device.uuid, device.bus) == ("Intel Stub Max 1550", "ab" * 16, "0000:29:00.0")
    first, second = vendor.telemetry(device), vendor.telemetry(device)
    assert first.power_w is first.compute_utilisation is first.pcie_sent_bytes_per_s is None
    assert (first.clock_mhz, first.clock_max_mhz, first.memory_clock_mhz) == (1250, 1600, None)
    assert first.throttled == ("power cap (average)", "thermal limit")
    assert (second.power_w, second.power_limit_w, second.temperature_c) == (250.0, 600.0, 57.5)
    assert (second.compute_utilisation, second.memory_utilisation) == (0.75, pytest.approx(0.4))
    assert (second.memory_used_bytes, second.memory_total_bytes) == (32 * GB, 128 * GB)
    assert (second.pcie_received_bytes_per_s, second.pcie_sent_bytes_per_s) == (3e6, 1e6)
    assert (second.pcie_replays, second.ecc_corrected, second.ecc_uncorrected) == (9, 14, 0)
    assert [(user.pid, user.memory_bytes) for user in vendor.processes(device)] == [(555, 4 * GB)]


def amd_module(**replaced: Any) -> ModuleType:
    """The functions of ROCm's ``amdsmi``, with the results of its documentation."""

    class Refused(Exception):
        pass

    def refuse(*arguments: Any) -> Any:
        raise Refused("not supported")

    kinds = {
        "AmdSmiClkType": ("GFX", "MEM"),
        "AmdSmiTemperatureType": ("EDGE", "HOTSPOT"),
        "AmdSmiTemperatureMetric": ("CURRENT",),
        "AmdSmiMemoryType": ("VRAM",),
        "AmdSmiLinkType": ("AMDSMI_LINK_TYPE_XGMI", "AMDSMI_LINK_TYPE_PCIE"),
    }
    module = ModuleType("amdsmi")
    for name, members in kinds.items():
        setattr(module, name, IntEnum(name, members))
    edge = module.AmdSmiTemperatureType.EDGE  # type: ignore[attr-defined]
    functions: dict[str, Any] = {
        "init": lambda: None,
        "shut_down": lambda: None,
        "get_processor_handles": lambda: [object()],
        "get_gpu_device_bdf": lambda h: "0000:C1:00.0",
        "get_gpu_device_uuid": lambda h: "c1ff-74a1",
        "get_gpu_asic_info": lambda h: {"market_name": "AMD Stub MI300X"},
        "get_gpu_driver_info": lambda h: {"driver_version": "6.10.5"},
        "get_clock_info": lambda h, kind: {"clk": 1300 if kind == 1 else 900, "max_clk": 2100},
        "get_gpu_activity": lambda h: {"gfx_activity": 96, "umc_activity": "N/A"},
        "get_power_info": lambda h: {"current_socket_power": "N/A", "average_socket_power": 512},
        "get_power_cap_info": lambda h: {"power_cap": 750_000_000},
        "get_temp_metric": lambda h, kind, metric: 48 if kind == edge else refuse(),
        "get_gpu_memory_usage": lambda h, kind: 20 * GB,
        "get_gpu_memory_total": lambda h, kind: 192 * GB,
        "get_pcie_info": lambda h: {"pcie_metric": {"pcie_replay_count": 3}},
        "get_gpu_total_ecc_count": lambda h: {"correctable_count": 4, "uncorrectable_count": 0},
        "get_violation_status": lambda h: {"active_ppt_pwr": True, "active_hbm_thrm": "N/A"},
        "get_link_metrics": lambda h: {
            "links": [
                {"link_type": 1, "read": 10, "write": 20},
                {"link_type": 1, "read": 1, "write": 2},
                {"link_type": 2, "read": 9, "write": 9},
            ]
        },
        "get_gpu_process_list": lambda h: [{"pid": 99, "memory_usage": {"vram_mem": GB}}],
    }
    for name, function in (functions | replaced).items():
        setattr(module, f"amdsmi_{name}", function)
    return module


def test_amd_reads_what_its_interface_gives_and_takes_na_as_null() -> None:
    vendor = Amd(amd_module())
    (device,) = vendor.devices()
    assert (device.name, device.bus, device.driver) == ("AMD Stub MI300X", "0000:c1:00.0", "6.10.5")
    reading = vendor.telemetry(device)
    assert (reading.clock_mhz, reading.clock_max_mhz, reading.memory_clock_mhz) == (1300, 2100, 900)
    assert (reading.power_w, reading.power_limit_w, reading.temperature_c) == (512.0, 750.0, 48.0)
    assert (reading.compute_utilisation, reading.memory_utilisation) == (0.96, None)
    assert reading.throttled == ("power cap",)
    assert (reading.link_name, reading.links_up) == ("xGMI", 2)
    assert (reading.link_received_bytes, reading.link_sent_bytes) == (11_000, 22_000)
    assert (reading.pcie_replays, reading.ecc_corrected, reading.ecc_uncorrected) == (3, 4, 0)
    assert [(user.pid, user.memory_bytes) for user in vendor.processes(device)] == [(99, GB)]


def test_amd_gives_null_where_functions_are_missing_or_raise() -> None:
    def refuse(*arguments: Any) -> Any:
        raise RuntimeError("not supported")

    module = amd_module(get_clock_info=refuse, get_violation_status=refuse)
    del module.amdsmi_get_power_cap_info
    vendor = Amd(module)
    reading = vendor.telemetry(vendor.devices()[0])
    assert reading.clock_mhz is reading.throttled is reading.power_limit_w is None


def test_the_machines_own_processors_are_devices() -> None:
    vendor = Cpu()
    devices = vendor.devices()
    assert devices and all("CPUs" in device.name for device in devices)
    vendor.telemetry(devices[0])
    assert sum(range(1_000_000)) > 0  # some work, so that time passes
    reading = vendor.telemetry(devices[0])
    assert reading.memory_total_bytes and 0 < (reading.memory_used_bytes or 0) < reading.memory_total_bytes
    assert reading.compute_utilisation is None or 0 < reading.compute_utilisation <= 1


def test_a_process_with_an_openmp_runtime_uses_the_processors(build: Build) -> None:
    import os

    source = "int GOMP_parallel(void *f, void *d, unsigned n, unsigned flags) { return 0; }"
    ctypes.CDLL(build("gomp", source=source, stem="libgomp-a34b3233.so.1.0.0"))
    vendor = Cpu()
    assert os.getpid() in [user.pid for user in vendor.processes(vendor.devices()[0])]


@pytest.mark.parametrize(
    ("text", "cpus"), [("0-3,8", [0, 1, 2, 3, 8]), ("5", [5]), ("", []), ("a-b", []), ("3-", [])]
)
def test_cpu_lists(text: str, cpus: list[int]) -> None:
    assert parse_cpu_list(text) == cpus
