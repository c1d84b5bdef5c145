"""HostSampler: what the kernel counts about the watched processes and their machine."""

from __future__ import annotations

from collections.abc import Mapping

from latencyprism.host.cgroup import find_cpu_mount, find_mount
from latencyprism.host.machine import MachineCounters
from latencyprism.host.processes import ProcessCounters
from latencyprism.records import Counter

_RESCAN_NS = 5_000_000_000


class HostSampler:
    """``roles`` names what each watched process is: ``{812: "EngineCore", 830: "Worker"}``.

    Tracks: ``("<role> <pid>", "<thread name> <tid>")``, ``("<role> <pid>", "process")``, ``("machine",)``.
    Names, cumulative unless marked *now*:

    * thread: ``cpu_ns``, ``runqueue_ns`` (ready but not running), ``timeslices``, ``voluntary_switches``,
      ``involuntary_switches``, ``minor_faults``, ``major_faults``; *now*: ``state`` (see
      ``processes.STATES``), ``cpu`` (where it ran last), ``allowed_cpus`` (on how many it may run);
    * process: ``cpu_ns`` (all threads), ``minor_faults``, ``major_faults``, ``read_bytes``, ``write_bytes``,
      ``read_calls``, ``write_calls``, ``throttled_periods``, ``throttled_ns``; *now*: ``quota_cpus``;
      of its control group what ``MemoryGroup.read`` and of its network what ``network.COUNTED`` names;
    * machine: ``cpu<n>_busy_ns``, ``cpu<n>_steal_ns``, ``cpu<n>_iowait_ns`` (resolution: one clock tick),
      ``psi_<cpu|io|memory>_<some|full>_ns``, ``direct_reclaim_pages``, ``allocation_stalls``;
      *now*: ``load1``, ``running_threads``, ``cpu<n>_frequency_khz``.

    What the kernel does not offer is named once in ``not_available`` and then absent, never zero. A process
    that ends is named there too and stops being sampled.
    """

    def __init__(self, roles: Mapping[int, str]) -> None:
        mount, memory = find_cpu_mount(), find_mount("memory")
        self.machine = MachineCounters()
        self._processes = [ProcessCounters(pid, role, mount, memory) for pid, role in roles.items()]
        self._scanned_ns: dict[int, int] = {}
        self.not_available: list[str] = self.machine.missing()
        for process in self._processes:
            self.not_available += process.missing()

    def sample(self, now_ns: int) -> list[Counter]:
        """All readings, stamped ``now_ns`` (CLOCK_MONOTONIC, the caller's)."""
        out: list[Counter] = []
        self.machine.sample(now_ns, out)
        for process in self._processes:
            process.sample(now_ns, out)
        ended = [process for process in self._processes if process.gone]
        for process in ended:
            self.not_available.append(f"{process.role} {process.pid}: the process has ended")
            self._processes.remove(process)
            process.close()
        self._rescan_one(now_ns)
        return out

    def _rescan_one(self, now_ns: int) -> None:
        """At most one process a call looks for its busiest threads, to keep every call short."""
        for process in self._processes:
            last = self._scanned_ns.setdefault(process.pid, now_ns)
            if now_ns - last >= _RESCAN_NS:
                process.scan(now_ns - last)
                self._scanned_ns[process.pid] = now_ns
                return

    def close(self) -> None:
        self.machine.close()
        for process in self._processes:
            process.close()
        self._processes.clear()
