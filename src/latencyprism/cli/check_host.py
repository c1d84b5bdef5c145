"""What `check` says of the machine: accelerators, clocks, where each engine's processes live."""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Any

from latencyprism.bpf.prices import measure_calls
from latencyprism.engines.discovery import Replica
from latencyprism.errors import PrismError
from latencyprism.host.facts import machine_facts, process_facts
from latencyprism.xpu import find_libraries, survey


def surroundings(replicas: list[Replica]) -> dict[str, Any]:
    """``devices`` with ``device_warnings``, and ``machine``, for the report."""
    seen, warnings = survey()
    roles = {pid: role for replica in replicas for pid, role in replica.roles().items()}
    devices = []
    for each in seen:
        device = each.as_dict()
        users = device["processes"]
        device["engine_processes"] = (
            None if users is None else {str(u["pid"]): roles[u["pid"]] for u in users if u["pid"] in roles}
        )
        devices.append(device)
    return {"devices": devices, "device_warnings": warnings, "machine": machine_facts()}


def host_of(replica: Replica) -> dict[str, Any]:
    """PID -> ``process_facts``, and the accelerator libraries that the process maps."""
    return {str(pid): {**process_facts(pid), "runtimes": _runtimes(pid)} for pid in replica.pids}


def _runtimes(pid: int) -> list[dict[str, Any]] | None:
    """Each known library with its functions and what a probe on one costs, ns a call; null where it could
    not be measured."""
    try:
        found = find_libraries(pid)
    except PrismError:
        return None
    prices = _prices() if found else {}
    return [
        {
            "name": each.library.name,
            "vendor": each.library.vendor,
            "version": each.version,
            "note": each.note,
            "functions": [
                {"name": s.name, "kind": s.kind, "begins": s.prologue, "probe_ns": prices.get(s.probed_class)}
                for s in each.symbols
            ],
        }
        for each in found
    ]


@cache
def _prices() -> dict[str, int]:
    """Class of a function's beginning -> ns that a call probed on entry and return takes longer here."""
    try:
        measured = measure_calls(pairs_only=True)
    except PrismError:
        return {}
    return {kind: round(price.pair_ns) for kind, price in measured.items() if price.pair_ns is not None}


def print_surroundings(report: dict[str, Any]) -> None:
    print("devices:")
    for device in report["devices"]:
        users = device["engine_processes"]
        used = ", ".join(f"{role} {pid}" for pid, role in (users or {}).items())
        text = f"  {device['vendor']} {device['index']}: {device['name']}{_state(device['telemetry'])}"
        print(text + (f"; used by {used}" if used else ""))
    for warning in report["device_warnings"]:
        print(f"  note: {warning}")
    clock = report["machine"]["clock"]
    told = "synchronised" if clock["synchronised"] else "not synchronised by anybody"
    slow = ", slow to read: every time stamp costs microseconds" if clock["slow_source"] else ""
    print(f"clock: {clock['source'] or 'unknown'}{slow}; wall clock {told}")


def print_host(host: dict[str, Any]) -> None:
    """One line for a process in a container or with a limit."""
    for pid, facts in host.items():
        words = []
        if facts["container"] is not None:
            words.append(f"in {facts['cgroup']}")
        if facts["quota_cpus"] is not None:
            words.append(f"CPU quota {facts['quota_cpus']:g} cores")
        if facts["group_memory_limit_bytes"] is not None:
            words.append(f"memory limit {facts['group_memory_limit_bytes'] / 2**30:.1f} GiB")
        if words:
            print(f"  process {pid}: {', '.join(words)}")
        uses: Counter[tuple[str, str]] = Counter()
        for library in facts["runtimes"] or ():
            costs = sorted({f["probe_ns"] for f in library["functions"] if f["probe_ns"] is not None})
            price = f", {'-'.join(map(str, costs[:1] + costs[1:][-1:]))} ns a probed call" if costs else ""
            told = f"{len(library['functions'])} functions to probe{price}"
            if library["note"]:
                told += f" ({library['note']})"
            uses[f"{library['name']} {library['version'] or ''}".rstrip(), told] += 1
        for (name, told), copies in uses.items():
            print(f"  process {pid} uses {name}{f', {copies} copies' if copies > 1 else ''}: {told}")


def _state(reading: dict[str, Any] | None) -> str:
    if reading is None:
        return ", says nothing"
    words = []
    if reading["compute_utilisation"] is not None:
        words.append(f"{reading['compute_utilisation']:.0%} busy")
    if reading["memory_used_bytes"] is not None and reading["memory_total_bytes"]:
        used, total = reading["memory_used_bytes"], reading["memory_total_bytes"]
        words.append(f"{used / 2**30:.1f} of {total / 2**30:.1f} GiB")
    if reading["power_w"] is not None:
        limit = f" of {reading['power_limit_w']:.0f}" if reading["power_limit_w"] else ""
        words.append(f"{reading['power_w']:.0f}{limit} W")
    if reading["temperature_c"] is not None:
        words.append(f"{reading['temperature_c']:.0f} °C")
    if reading["throttled"]:
        words.append("clocks held down: " + ", ".join(reading["throttled"]))
    return "".join(f", {word}" for word in words)
