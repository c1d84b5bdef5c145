"""Telemetry as counters: of the replica's devices, in time, whatever the driver does."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from latencyprism.xpu.device import Device, DeviceProcess, Telemetry
from latencyprism.xpu.library import LibraryMissing
from latencyprism.xpu.nvidia import Nvidia
from latencyprism.xpu.sampler import DeviceSampler, counters_of

Build = Callable[..., str]


class Two:
    """Two devices; PID 10 is on the second."""

    name = "two"

    def devices(self) -> list[Device]:
        return [Device("two", 0, "a"), Device("two", 1, "b")]

    def processes(self, device: Device) -> list[DeviceProcess]:
        return [DeviceProcess(10)] if device.index == 1 else []

    def telemetry(self, device: Device) -> Telemetry:
        return Telemetry(
            time.monotonic_ns(), clock_mhz=1000 + device.index, throttled=("power",), events=("XID 1",)
        )

    def close(self) -> None:
        return None


def wait_for(sampler: DeviceSampler, count: int) -> list[str]:
    names: list[str] = []
    until = time.monotonic() + 5
    while len(names) < count and time.monotonic() < until:
        names += [" ".join((*counter.track, counter.name)) for counter in sampler.drain()]
        time.sleep(0.01)
    return names


def test_values_become_counters_and_nulls_none() -> None:
    found = counters_of(Device("nvidia", 3, "x"), Telemetry(7, power_w=12.5, throttled=()))
    assert [(c.track, c.name, c.value, c.unit, c.time_ns) for c in found] == [
        (("nvidia 3",), "power_w", 12.5, "W", 7),
        (("nvidia 3",), "throttle_reasons", 0, "count", 7),
    ]


def test_only_devices_of_the_replica_are_read() -> None:
    sampler = DeviceSampler([10], 0.02, {"two": Two})
    names = wait_for(sampler, 8)
    sampler.close()
    assert set(names) == {
        "two 1 clock_mhz", "two 1 throttle_reasons", "two 1 throttled: power", "two 1 XID 1",
    }  # fmt: skip


def test_all_are_read_where_the_driver_knows_none_of_its_processes() -> None:
    sampler = DeviceSampler([99], 0.02, {"two": Two})
    names = wait_for(sampler, 16)
    sampler.close()
    assert {name.split()[1] for name in names} == {"0", "1"}


def test_without_a_device_no_thread_stays() -> None:
    def missing() -> Two:
        raise LibraryMissing("none")

    sampler = DeviceSampler([1], 0.02, {"two": missing})
    time.sleep(0.3)
    assert not any(thread.name == "lp-devices" for thread in threading.enumerate())
    assert sampler.drain() == [] and sampler.notes == []
    sampler.close()


def test_a_driver_that_hangs_is_noted_once_and_nobody_waits_for_it(build: Build) -> None:
    path = build("nvml", "-DHANG")
    begun = time.monotonic()
    sampler = DeviceSampler([4242], 0.05, {"nvidia": lambda: Nvidia(path)}, limit_s=0.2)
    assert sampler.drain() == [] and time.monotonic() - begun < 0.15
    time.sleep(1.0)
    assert sampler.drain() == [] and len(sampler.notes) == 1 and "did not answer" in sampler.notes[0]
    begun = time.monotonic()
    sampler.close()
    assert time.monotonic() - begun < 0.5
