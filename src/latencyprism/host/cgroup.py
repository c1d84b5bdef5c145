"""Control groups, v1 or v2: where a controller is mounted; CPU quota and throttling, ancestors included."""

from __future__ import annotations

import os
from dataclasses import dataclass

from latencyprism.host.held import HeldFile, parse_table, read_once


@dataclass(frozen=True, slots=True)
class CpuMount:
    """Where a controller is mounted: its ``version`` (1 or 2), directory, and the group that the
    directory shows (not ``/`` inside some containers)."""

    version: int
    directory: str
    root: str


@dataclass(frozen=True, slots=True)
class Throttling:
    """``periods``: quota periods in which the group ran out; ``throttled_ns``: time it was held back (on v1
    summed over CPUs); ``quota_cpus``: the tightest limit, in cores; None without a limit."""

    periods: int
    throttled_ns: int
    quota_cpus: float | None


def parse_mounts(mountinfo: str, controller: str = "cpu") -> CpuMount | None:
    """Finds a controller in the text of /proc/PID/mountinfo; v1 is preferred where both are mounted, because
    then v2 does not hold that controller."""
    unified = None
    for line in mountinfo.splitlines():
        left, separator, right = line.partition(" - ")
        fields, kind = left.split(), right.split()
        if not separator or len(fields) < 5 or not kind:
            continue
        if kind[0] == "cgroup" and controller in kind[-1].split(","):
            return CpuMount(1, fields[4], fields[3])
        if kind[0] == "cgroup2" and unified is None:
            unified = CpuMount(2, fields[4], fields[3])
    return unified


def parse_membership(text: str, version: int, controller: str = "cpu") -> str | None:
    """The group's path for a controller out of the text of /proc/PID/cgroup."""
    for line in text.splitlines():
        parts = line.split(":", 2)
        if len(parts) != 3:
            continue
        controllers = parts[1].split(",")
        if (version == 1 and controller in controllers) or (
            version == 2 and parts[0] == "0" and not parts[1]
        ):
            return parts[2]
    return None


def find_mount(controller: str) -> CpuMount | None:
    """Where this process sees a controller such as ``cpu`` or ``memory``; None if nowhere."""
    data = read_once("/proc/self/mountinfo", 1 << 20)
    return None if data is None else parse_mounts(data.decode("utf-8", "replace"), controller)


def find_cpu_mount() -> CpuMount | None:
    return find_mount("cpu")


def directories(mount: CpuMount, path: str) -> list[str]:
    """The folders of a group and its ancestors, the mount's root first."""
    inside = path[len(mount.root) :] if mount.root != "/" and path.startswith(mount.root) else path
    parts = [part for part in inside.split("/") if part not in ("", "..")]
    return [os.path.join(mount.directory, *parts[:depth]) for depth in range(len(parts) + 1)]


class _Level:
    """One group of the chain: its statistics and its limit."""

    def __init__(self, directory: str, version: int) -> None:
        self.version = version
        self.statistics = HeldFile(os.path.join(directory, "cpu.stat"))
        self.limit = HeldFile(os.path.join(directory, "cpu.max" if version == 2 else "cpu.cfs_quota_us"))
        self.period = HeldFile(os.path.join(directory, "cpu.cfs_period_us")) if version == 1 else None

    def throttled(self) -> tuple[int, int] | None:
        data = self.statistics.read()
        if data is None:
            return None
        table = parse_table(data)
        if b"nr_throttled" not in table:
            return None
        spent = table.get(b"throttled_time")
        nanoseconds = spent if spent is not None else table.get(b"throttled_usec", 0) * 1000
        return table[b"nr_throttled"], nanoseconds

    def quota_cpus(self) -> float | None:
        data = self.limit.read()
        if data is None:
            return None
        words = data.split()
        if self.period is not None:
            words += (self.period.read() or b"100000").split()
        if len(words) < 2 or not words[0].isdigit() or not words[1].isdigit() or int(words[1]) == 0:
            return None
        return int(words[0]) / int(words[1])

    def close(self) -> None:
        for held in (self.statistics, self.limit, self.period):
            if held is not None:
                held.close()


class GroupChain:
    """A group and its ancestors up to the mount's root. Any of them may hold a limit, and a group's own
    statistics do not show that an ancestor was throttled."""

    def __init__(self, mount: CpuMount, path: str) -> None:
        self.path = path
        folders = directories(mount, path)
        self._levels = [_Level(folder, mount.version) for folder in folders]
        # The true root of v2 has no throttling statistics because nothing can throttle it: a known zero.
        self._rooted = len(folders) == 1 and not self._levels[0].limit.open

    def read(self) -> Throttling | None:
        """The chain's totals now; None if no level could be read."""
        seen = [level.throttled() for level in self._levels]
        known = [pair for pair in seen if pair is not None]
        if not known and not self._rooted:
            return None
        quotas = [quota for level in self._levels if (quota := level.quota_cpus()) is not None]
        return Throttling(sum(p for p, _ in known), sum(t for _, t in known), min(quotas, default=None))

    def close(self) -> None:
        for level in self._levels:
            level.close()
