"""Counters of the whole machine: CPUs, pressure, memory reclaim, load, clock frequency."""

from __future__ import annotations

import glob
import os
from collections import deque
from collections.abc import Collection
from time import perf_counter_ns

from latencyprism.host.cpu_lines import busy_ticks, parse_cpu_lines
from latencyprism.host.held import HeldFile, parse_table
from latencyprism.host.stolen import Reading
from latencyprism.records import Counter

TRACK = ("machine",)
_PRESSURE = "/proc/pressure/"
_SLOW_EVERY = 10
"""/proc/vmstat and the frequency files cost the most and change the slowest: every tenth sample."""
KEPT = 64
"""Readings of CPU time that are kept: half a minute of a calm watch."""


def parse_pressure(data: bytes) -> dict[str, int]:
    """``{"some": ns, "full": ns}`` from a /proc/pressure file."""
    found = {}
    for line in data.decode("ascii", "replace").splitlines():
        kind, _, rest = line.partition(" ")
        total = rest.rpartition("total=")[2]
        if kind in ("some", "full") and total.isdigit():
            found[kind] = int(total) * 1000
    return found


class MachineCounters:
    """``sample`` appends readings on the track ``("machine",)``; see ``HostSampler``."""

    def __init__(self) -> None:
        self.ns_per_tick = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
        self._stat, self._load = HeldFile("/proc/stat"), HeldFile("/proc/loadavg")
        self._vmstat = HeldFile("/proc/vmstat")
        self._pressure = {kind: HeldFile(_PRESSURE + kind) for kind in ("cpu", "io", "memory")}
        paths = glob.glob("/sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq")
        self._frequency = {int(path.split("/")[5][3:]): HeldFile(path) for path in paths}
        # Each CPU's line is at most ~100 bytes; the interrupt lines after them are dear and not wanted.
        self._stat_bytes = 128 * ((os.cpu_count() or 1) + 1)
        self._samples = 0
        self.history: deque[Reading] = deque(maxlen=KEPT)
        """The last readings of /proc/stat, as they were read."""
        self.frequencies: deque[dict[int, int]] = deque(maxlen=KEPT // _SLOW_EVERY)
        """The last readings of the clocks, kHz by CPU."""

    def missing(self) -> list[str]:
        wanted = [
            ("CPU time per CPU", self._stat),
            ("load average", self._load),
            ("memory reclaim counters", self._vmstat),
            *((f"{kind} pressure (PSI)", held) for kind, held in self._pressure.items()),
        ]
        lost = [f"{what}: {held.why or 'empty'}" for what, held in wanted if not held.read(256)]
        if not any(held.read(64) for held in self._frequency.values()):
            lost.append("CPU frequency: this kernel offers no cpufreq")
        return lost

    def sample(self, now_ns: int, out: list[Counter]) -> None:
        stat = self._stat.read(self._stat_bytes) or b""
        if stat:
            self.history.append((now_ns, stat))
        for cpu, ticks in parse_cpu_lines(stat).items():
            if len(ticks) < 8:
                continue
            for name, value in (("busy", busy_ticks(ticks)), ("steal", ticks[7]), ("iowait", ticks[4])):
                out.append(Counter(TRACK, f"cpu{cpu}_{name}_ns", now_ns, value * self.ns_per_tick, "ns"))
        for kind, held in self._pressure.items():
            for level, total_ns in parse_pressure(held.read(512) or b"").items():
                out.append(Counter(TRACK, f"psi_{kind}_{level}_ns", now_ns, total_ns, "ns"))
        words = (self._load.read(128) or b"").replace(b"/", b" ").split()
        if len(words) >= 5:
            out.append(Counter(TRACK, "load1", now_ns, float(words[0]), "threads"))
            out.append(Counter(TRACK, "running_threads", now_ns, int(words[3]), "threads"))
        if self._samples % _SLOW_EVERY == 0:
            self._sample_slow(now_ns, out)
        self._samples += 1

    def _sample_slow(self, now_ns: int, out: list[Counter]) -> None:
        table = parse_table(self._vmstat.read() or b"")
        if b"pgscan_direct" in table:
            out.append(Counter(TRACK, "direct_reclaim_pages", now_ns, table[b"pgscan_direct"], "pages"))
        stalls = [value for key, value in table.items() if key.startswith(b"allocstall")]
        if stalls:
            out.append(Counter(TRACK, "allocation_stalls", now_ns, sum(stalls)))
        found = self.clocks(self._frequency)
        if found:
            self.frequencies.append(found)
        for cpu, khz in found.items():
            out.append(Counter(TRACK, f"cpu{cpu}_frequency_khz", now_ns, khz, "kHz"))

    def clocks(self, cpus: Collection[int], within_ns: int | None = None) -> dict[int, int]:
        """kHz by CPU, of those of ``cpus`` that tell; no further ones once ``within_ns`` is over."""
        found, begun_ns = {}, perf_counter_ns()
        for cpu in cpus:
            text = (self._frequency[cpu].read(64) or b"").strip() if cpu in self._frequency else b""
            if text.isdigit():
                found[cpu] = int(text)
            if within_ns is not None and perf_counter_ns() - begun_ns > within_ns:
                break
        return found

    def cpu_times(self) -> bytes:
        """The first lines of /proc/stat, now; empty where it cannot be read."""
        return self._stat.read(self._stat_bytes) or b""

    def close(self) -> None:
        held = (self._stat, self._load, self._vmstat, *self._pressure.values(), *self._frequency.values())
        for each in held:
            each.close()
