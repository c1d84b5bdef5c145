"""Telemetry of the devices that a replica uses, as counters, read by a thread of its own."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping

from latencyprism.records import Counter
from latencyprism.xpu.device import Device, Telemetry, Vendor
from latencyprism.xpu.library import LibraryMissing
from latencyprism.xpu.vendors import LIMIT_S, VENDORS, Watch

ACCELERATORS: Mapping[str, Callable[[], Vendor]] = {
    name: make for name, make in VENDORS.items() if name != "cpu"
}
PERIOD_S = 0.5
OWNERS_EVERY = 60
"""Readings after which it is asked anew which devices are the replica's."""
_MOST_KEPT = 20_000
_UNITS = {
    "clock_mhz": "MHz",
    "memory_clock_mhz": "MHz",
    "power_w": "W",
    "temperature_c": "°C",
    "compute_utilisation": "share",
    "memory_utilisation": "share",
    "memory_used_bytes": "bytes",
    "pcie_received_bytes_per_s": "bytes/s",
    "pcie_sent_bytes_per_s": "bytes/s",
    "pcie_replays": "count",
    "links_up": "count",
    "link_received_bytes": "bytes",
    "link_sent_bytes": "bytes",
    "ecc_corrected": "count",
    "ecc_uncorrected": "count",
}
"""What becomes a counter; limits and totals stand still."""


def counters_of(device: Device, reading: Telemetry) -> list[Counter]:
    """Track ``("<vendor> <index>",)``; names are those of ``Telemetry``, ``throttle_reasons`` (how many hold
    the clocks down), ``throttled: <reason>`` (1 while it does) and, once each, the events. Null is absent."""
    track, now = (f"{device.vendor} {device.index}",), reading.time_ns
    found = [
        Counter(track, name, now, float(value), unit)
        for name, unit in _UNITS.items()
        if (value := getattr(reading, name)) is not None
    ]
    if reading.throttled is not None:
        found.append(Counter(track, "throttle_reasons", now, len(reading.throttled)))
        found += [Counter(track, f"throttled: {reason}", now, 1) for reason in reading.throttled]
    found += [Counter(track, event, now, 1) for event in reading.events or ()]
    return found


class DeviceSampler:
    """Reads twice a second from construction to ``close``; ``drain`` hands over what came since.

    Devices are those on which the drivers see one of ``pids``; where a driver sees none of them on any (in a
    container it may count PIDs of the host), all of that vendor. Opening a library and every reading happen
    on the thread, bounded in time: nothing here ever waits for a driver. ``notes`` says what went wrong.
    Without a device the thread ends at once."""

    def __init__(
        self,
        pids: Collection[int],
        period_s: float = PERIOD_S,
        vendors: Mapping[str, Callable[[], Vendor]] = ACCELERATORS,
        limit_s: float = LIMIT_S,
    ) -> None:
        self.notes: list[str] = []
        self._pids = frozenset(pids)
        self._period_s, self._limit_s = period_s, limit_s
        self._vendors = dict(vendors)
        self._kept: deque[Counter] = deque(maxlen=_MOST_KEPT)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="lp-devices")
        self._thread.start()

    def drain(self) -> list[Counter]:
        """Readings since the last call, oldest first."""
        found = []
        while self._kept:
            found.append(self._kept.popleft())
        return found

    def _run(self) -> None:
        watches = []
        for name, make in self._vendors.items():
            try:
                watches.append(Watch(name, self._limit_s, make))
            except LibraryMissing:
                continue
        self._note(watches)
        watches = [watch for watch in watches if watch.devices]
        turn = 0
        mine: dict[str, list[Device]] = {}
        while watches and not self._stop.is_set():
            begun = time.monotonic()
            for watch in watches:
                if turn % OWNERS_EVERY == 0:
                    mine[watch.name] = self._of_replica(watch)
                for device in mine[watch.name]:
                    reading = watch.telemetry(device)
                    if reading is not None:
                        self._kept.extend(counters_of(device, reading))
            self._note(watches)
            watches = [watch for watch in watches if not watch.hung]
            turn += 1
            self._stop.wait(max(0.05, self._period_s - (time.monotonic() - begun)))
        for watch in watches:
            watch.close()

    def _note(self, watches: list[Watch]) -> None:
        told = [watch.warning for watch in watches if watch.warning is not None]
        self.notes += [warning for warning in told if warning not in self.notes]

    def _of_replica(self, watch: Watch) -> list[Device]:
        used = [
            device
            for device in watch.devices
            if any(user.pid in self._pids for user in watch.processes(device) or ())
        ]
        return used or watch.devices

    def close(self) -> None:
        """Ends the thread; one that hangs in a driver is left behind."""
        self._stop.set()
        self._thread.join(self._limit_s)
