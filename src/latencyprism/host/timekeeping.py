"""The kernel's clocks: the source that it counts with, and how far the wall clock may be off."""

from __future__ import annotations

import ctypes
import glob
from dataclasses import dataclass

from latencyprism.host.held import read_once

_FOLDER = "/sys/devices/system/clocksource/clocksource0/"
_UNSYNCHRONISED, _NANOSECONDS = 0x40, 0x2000
_LEAP = {0: None, 1: "insert a second", 2: "delete a second", 3: "leap second now", 4: "leap second over"}
_SLOW = ("hpet", "acpi_pm", "jiffies", "refined-jiffies", "pit")


class _Timex(ctypes.Structure):
    _fields_ = (
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("freq", ctypes.c_long),
        ("maxerror", ctypes.c_long),
        ("esterror", ctypes.c_long),
        ("status", ctypes.c_int),
        ("constant", ctypes.c_long),
        ("precision", ctypes.c_long),
        ("tolerance", ctypes.c_long),
        ("time", ctypes.c_long * 2),
        ("tick", ctypes.c_long),
        ("pps", ctypes.c_long * 3),
        ("shift", ctypes.c_int),
        ("counts", ctypes.c_long * 5),
        ("tai", ctypes.c_int),
        ("padding", ctypes.c_int * 11),
    )


@dataclass(frozen=True, slots=True)
class Timekeeping:
    """``source``: the counter behind all clocks; ``slow_source``: reading it, and so every time stamp, costs
    microseconds. ``synchronised``: some daemon (NTP, PTP) says that it keeps the wall clock; ``error_us``:
    the most it can be off by its own account, ``offset_us``: what is being corrected, ``frequency_ppm``: the
    correction of the rate. ``ptp``: hardware clocks. None where the kernel does not say."""

    source: str | None
    available: tuple[str, ...]
    slow_source: bool | None
    synchronised: bool | None
    error_us: int | None
    estimated_error_us: int | None
    offset_us: float | None
    frequency_ppm: float | None
    leap: str | None
    ptp: tuple[str, ...]


def timekeeping() -> Timekeeping:
    """Reads it all; changes nothing."""
    source = _text("current_clocksource")
    timex, state = _Timex(), -1
    adjtimex = getattr(ctypes.CDLL(None), "adjtimex", None)
    if adjtimex is not None:
        state = int(adjtimex(ctypes.byref(timex)))
    known = state >= 0
    scale = 1000.0 if timex.status & _NANOSECONDS else 1.0
    names = [read_once(path, 128) for path in sorted(glob.glob("/sys/class/ptp/ptp*/clock_name"))]
    return Timekeeping(
        source=source,
        available=tuple((_text("available_clocksource") or "").split()),
        slow_source=None if source is None else source in _SLOW,
        synchronised=not timex.status & _UNSYNCHRONISED if known else None,
        error_us=int(timex.maxerror) if known else None,
        estimated_error_us=int(timex.esterror) if known else None,
        offset_us=timex.offset / scale if known else None,
        frequency_ppm=round(timex.freq / 65536, 3) if known else None,
        leap=_LEAP.get(state),
        ptp=tuple(name.decode("utf-8", "replace").strip() for name in names if name),
    )


def _text(name: str) -> str | None:
    data = read_once(_FOLDER + name, 512)
    return data.decode("ascii", "replace").strip() or None if data else None
