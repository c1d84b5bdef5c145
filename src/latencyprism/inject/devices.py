"""Causes that lie in an accelerator (NVIDIA): another tenant of the device, and its clocks and power."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from latencyprism.errors import BadInput, PrismError
from latencyprism.inject.injection import Effect, Interval, Plan, Report
from latencyprism.inject.needs import device_missing
from latencyprism.inject.request import Request, share_of

DRIVER, MANAGEMENT = "libcuda.so.1", "libnvidia-ml.so.1"
_ENOUGH = 0.6


def tenant(kind: str) -> Callable[[Request], Plan]:
    """A process that uses the device for part of each 20 ms: two that are busy at once get it by turns, so
    each then has half of it."""

    def plan(request: Request) -> Plan:
        share = min(1.0, 2 * share_of(request.strength_up_to(1.0)))
        _refuse_without_device(request)
        spec = {
            "kind": kind,
            "share": share,
            "device": request.device,
            "library": DRIVER,
            "until_ns": request.until_ns(),
        }
        return Plan("cotenant.py", [spec], _intervals, _busy_effect(share))

    return plan


def setting(kind: str) -> Callable[[Request], Plan]:
    """The device's highest clock, or its power limit, lowered and put back by a keeper."""

    def plan(request: Request) -> Plan:
        lost = share_of(request.strength_up_to(4.0))
        if not request.allow_device_settings:
            raise BadInput(
                f"xpu.{kind} changes a setting of device {request.device}",
                "everybody who uses the device is slowed",
                "--allow-device-settings does it and puts it back",
            )
        _refuse_without_device(request)
        spec = {
            "kind": kind,
            "left": 1 - lost,
            "device": request.device,
            "library": MANAGEMENT,
            "until_ns": request.until_ns(),
        }
        return Plan("holder.py", [spec], _settings, _setting_effect)

    return plan


def _refuse_without_device(request: Request) -> None:
    missing = device_missing()
    if missing is not None:
        raise PrismError("cannot disturb an accelerator", missing, "it works on a machine with one")
    if not 0 <= request.device < 1024:
        raise BadInput("--device is out of range", f"{request.device}", "devices count from 0")


def _intervals(reports: Sequence[Report]) -> list[Interval]:
    return [
        Interval(int(r["begun_ns"]), int(r["ended_ns"]), f"busy for {r['busy_ns'] / 1e6:.0f} ms")
        for r in reports
        if "busy_ns" in r
    ]


def _busy_effect(share: float) -> Callable[[Sequence[Report], float], Effect]:
    def effect(reports: Sequence[Report], _ran_s: float) -> Effect:
        ended = [report for report in reports if "busy_ns" in report]
        wall_ns = sum(report["ended_ns"] - report["begun_ns"] for report in ended)
        measured = sum(report["busy_ns"] for report in ended) / wall_ns if wall_ns else 0.0
        rounds = sum(report["rounds"] for report in ended)
        text = (
            f"{rounds} rounds on the device, {100 * measured:.0f} % of the time (asked: {100 * share:.0f} %)"
        )
        return Effect(measured >= _ENOUGH * share, measured, share, "share of time", _with(text, reports))

    return effect


def _settings(reports: Sequence[Report]) -> list[Interval]:
    return [
        Interval(int(r["begun_ns"]), int(r["ended_ns"]), f"{r['now']} {r['unit']} instead of {r['before']}")
        for r in reports
        if "now" in r
    ]


def _setting_effect(reports: Sequence[Report], _ran_s: float) -> Effect:
    for report in reports:
        if "now" in report:
            text = f"{report['now']} {report['unit']} instead of {report['before']}"
            asked = float(report["asked"])
            return Effect(report["now"] <= 1.05 * asked, float(report["now"]), asked, report["unit"], text)
    return Effect(False, 0.0, 1.0, "settings", _with("nothing was set", reports))


def _with(text: str, reports: Sequence[Report]) -> str:
    return "; ".join([text, *(str(report["error"]) for report in reports if "error" in report)])
