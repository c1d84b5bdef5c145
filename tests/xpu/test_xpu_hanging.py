"""Libraries that are absent, refuse or hang: in time, with one warning, and nulls."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from latencyprism.errors import PrismError
from latencyprism.xpu import vendors as module
from latencyprism.xpu.device import Device, DeviceProcess, Telemetry
from latencyprism.xpu.library import Bounded, Hung, LibraryMissing, open_library
from latencyprism.xpu.nvidia import Nvidia

Build = Callable[..., str]


def test_a_missing_library_is_said_with_what_the_loader_said() -> None:
    with pytest.raises(LibraryMissing, match=r"it is not here: .*libno-such\.so"):
        open_library(["libno-such.so"], "it")


def test_a_file_that_is_no_library_is_missing_too(tmp_path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "libfake.so").write_text("no library")
    with pytest.raises(LibraryMissing):
        Nvidia(str(tmp_path / "libfake.so"))


def test_a_hanging_driver_costs_one_wait_and_one_warning(build: Build) -> None:
    path = build("nvml", "-DHANG")
    watch = module.Watch("nvidia", 1.0, lambda: Nvidia(path))
    assert len(watch.devices) == 1 and watch.warning is None
    begun = time.monotonic()
    assert watch.telemetry(watch.devices[0]) is None
    first_s = time.monotonic() - begun
    warning = watch.warning
    assert 1.0 <= first_s < 5.0 and warning is not None and "did not answer within 1 s" in warning
    begun = time.monotonic()
    assert watch.telemetry(watch.devices[0]) is None and watch.processes(watch.devices[0]) is None
    watch.close()
    assert time.monotonic() - begun < 0.8 and watch.warning == warning


def test_a_driver_that_answers_with_errors_is_told_once_and_null(build: Build) -> None:
    path = build("nvml", "-DREFUSE")
    watch = module.Watch("nvidia", 2.0, lambda: Nvidia(path))
    assert watch.processes(watch.devices[0]) is None
    assert watch.warning is not None and "Not Supported" in watch.warning
    assert watch.telemetry(watch.devices[0]) is not None


class Broken:
    name = "broken"

    def devices(self) -> list[Device]:
        return [Device("broken", 0, "x")]

    def processes(self, device: Device) -> list[DeviceProcess]:
        raise OSError("bus error")

    def telemetry(self, device: Device) -> Telemetry:
        raise PrismError("lost", "the device fell off the bus")

    def close(self) -> None:
        return None


def test_the_survey_goes_on_after_a_vendor_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang() -> Broken:
        time.sleep(30)
        return Broken()

    vendors = {"broken": Broken, "hanging": hang, "cpu": module.VENDORS["cpu"]}
    monkeypatch.setattr(module, "VENDORS", vendors)
    begun = time.monotonic()
    seen, warnings = module.survey(0.5, tuple(vendors))
    assert time.monotonic() - begun < 10
    assert seen[0].device.vendor == "broken" and seen[0].telemetry is None and seen[0].processes is None
    assert seen[-1].device.vendor == "cpu" and seen[-1].telemetry is not None
    assert len(warnings) == 2
    assert all(isinstance(each.as_dict()["name"], str) for each in seen)


def test_bounded_hands_on_results_and_errors() -> None:
    bounded: Bounded[int] = Bounded(1.0)
    assert bounded.call("it", lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        bounded.call("it", lambda: 1 // 0)
    assert not bounded.hung
    with pytest.raises(Hung):
        Bounded[None](0.05).call("it", lambda: time.sleep(1))
