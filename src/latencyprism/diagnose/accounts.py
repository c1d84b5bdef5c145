"""Signals from below the engine: what the kernel's counters and the scheduler spans account for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from latencyprism.diagnose.tracks import Foreign, Series, Tracks

Values = dict[tuple[str, str], float]

STOPPED_STATES = (3.0, 4.0)
"""Positions of T and t in ``host.processes.STATES``."""
WAIT_PER_CPU = "wait_per_cpu"
_BUSY_SHARE = 0.05
_MOSTLY_BUSY = 0.2


def host_signals(
    tracks: Tracks,
    roles: Mapping[int, str],
    start_ns: int,
    end_ns: int,
    base_ns: float,
    stretched: float,
    steps: int,
) -> Values:
    """``base_ns``: what the stretch's steps should have taken; ``stretched``: how much longer they took (1.0:
    not at all), by which shares of wall time are turned into shares of expected time."""
    out: Values = {}
    wall_ns = float(end_ns - start_ns)
    if wall_ns <= 0:
        return out
    for track, named in tracks.threads(roles):
        _thread_signals(" ".join(track), named, start_ns, end_ns, base_ns, stretched, steps, tracks, out)
    for name, named in tracks.processes(roles):
        _process_signals(name, named, start_ns, end_ns, base_ns, steps, out)
    for name, named in tracks.servers():
        cpu = _grown(named.get("cpu_ns"), start_ns, end_ns)
        if cpu is not None:
            out["server_cpu", name] = cpu / base_ns
    for signal, counter in (("psi_io", "psi_io_some_ns"), ("psi_memory", "psi_memory_some_ns")):
        grown = _grown(tracks.machine(counter), start_ns, end_ns)
        if grown is not None:
            out[signal, ""] = grown / wall_ns
    reclaim = _grown(tracks.machine("allocation_stalls"), start_ns, end_ns)
    if reclaim is not None:
        out["allocation_stalls", ""] = reclaim / steps
    _frequency(tracks, start_ns, end_ns, out)
    return out


def _grown(series: Series | None, start_ns: float, end_ns: float) -> float | None:
    return None if series is None else series.grown(start_ns, end_ns)


def _thread_signals(
    where: str,
    named: Mapping[str, Series],
    start_ns: int,
    end_ns: int,
    base_ns: float,
    stretched: float,
    steps: int,
    tracks: Tracks,
    out: Values,
) -> None:
    wall_ns = float(end_ns - start_ns)
    cpu = _grown(named.get("cpu_ns"), start_ns, end_ns)
    runqueue = _grown(named.get("runqueue_ns"), start_ns, end_ns)
    if runqueue is not None:
        out["runqueue", where] = runqueue / base_ns
    if cpu is not None:
        out["cpu", where] = cpu / base_ns
        if runqueue is not None:
            out[WAIT_PER_CPU, where] = runqueue / max(cpu, 1.0)
            out["idle", where] = max(0.0, wall_ns - cpu - runqueue) / wall_ns * stretched
    states = named["state"].within(start_ns, end_ns) if "state" in named else np.zeros(0)
    if len(states) >= 2:
        out["stopped", where] = float(np.isin(states, STOPPED_STATES).mean()) * stretched
    for name, signal in (("voluntary_switches", "voluntary"), ("involuntary_switches", "involuntary")):
        grown = _grown(named.get(name), start_ns, end_ns)
        if grown is not None:
            out[signal, where] = grown / steps
    allowed = named["allowed_cpus"].within(start_ns, end_ns) if "allowed_cpus" in named else np.zeros(0)
    if len(allowed) and allowed.min() >= 1:
        out["narrowed", where] = float((1 / allowed).mean())
    wants_cpu = (cpu or 0.0) + (runqueue or 0.0)
    if wants_cpu > _BUSY_SHARE * wall_ns and "cpu" in named:
        _on_its_cpus(where, named["cpu"].within(start_ns, end_ns), tracks, start_ns, end_ns, out)


def _on_its_cpus(
    where: str,
    visited: np.typing.NDArray[np.float64],
    tracks: Tracks,
    start_ns: int,
    end_ns: int,
    out: Values,
) -> None:
    """What others took of the CPUs that a thread runs on, and of the CPUs it does not."""
    if not len(visited):
        return
    shares = {int(cpu): float((visited == cpu).mean()) for cpu in sorted(set(visited.tolist()))}
    stolen = [
        (share, _grown(tracks.machine(f"cpu{cpu}_steal_ns"), start_ns, end_ns))
        for cpu, share in shares.items()
    ]
    if all(grown is not None for _, grown in stolen):
        steal = sum(share * (grown or 0.0) for share, grown in stolen)
        out["steal", where] = steal / (end_ns - start_ns)
    foreign = tracks.foreign.mean(start_ns, end_ns) if tracks.foreign is not None else None
    if foreign is not None:
        here = sum(shares.get(cpu, 0.0) * cores for (_, cpu), cores in foreign.items())
        out["foreign", where] = here
        out["elsewhere", ""] = sum(c for (_, cpu), c in foreign.items() if cpu not in shares)


def _process_signals(
    name: str,
    named: Mapping[str, Series],
    start_ns: int,
    end_ns: int,
    base_ns: float,
    steps: int,
    out: Values,
) -> None:
    throttled = _grown(named.get("throttled_ns"), start_ns, end_ns)
    if throttled is not None:
        out["throttled", name] = throttled / base_ns
    for counter, signal in (("major_faults", "major_faults"), ("write_calls", "write_calls")):
        grown = _grown(named.get(counter), start_ns, end_ns)
        if grown is not None:
            out[signal, name] = grown / steps
    again = _grown(named.get("tcp_segments_sent_again"), start_ns, end_ns)
    if again is not None:
        out["tcp_again", name] = again / steps
    whole = _grown(named.get("cpu_ns"), start_ns, end_ns)
    if whole is not None:
        mains = [
            value
            for (signal, where), value in out.items()
            if signal == "cpu" and where.startswith(name + " ")
        ]
        if mains:
            out["siblings", name] = max(0.0, whole / base_ns - max(mains))


def _frequency(tracks: Tracks, start_ns: int, end_ns: int, out: Values) -> None:
    names = [name for name in tracks.series.get(("machine",), {}) if name.endswith("_frequency_khz")]
    seen = [tracks.series["machine",][name].within(start_ns, end_ns) for name in names]
    readings = np.concatenate(seen) if seen else np.zeros(0)
    if len(readings):
        out["frequency", ""] = float(readings.mean())


def frozen_signals(
    tracks: Tracks,
    roles: Mapping[int, str],
    stalls: Sequence[tuple[float, float, float]],
    start_ns: int,
    end_ns: int,
    base_ns: float,
) -> Values:
    """Of the time that stalled steps lost, the part in which a busy thread neither ran nor waited for a CPU:
    what a stopped or sleeping process looks like when its state was not sampled at that moment. ``stalls``:
    start, end and lost time of each stalled step."""
    out: Values = {}
    for track, named in tracks.threads(roles):
        if "cpu_ns" not in named or "runqueue_ns" not in named:
            continue
        cpu, runqueue = named["cpu_ns"], named["runqueue_ns"]
        inside = (cpu.times >= start_ns) & (cpu.times <= end_ns)
        times = cpu.times[inside]
        if len(times) < 4 or len(runqueue.times) != len(cpu.times):
            continue
        length = np.diff(times)
        spent = np.diff(cpu.values[inside]) + np.diff(runqueue.values[inside])
        usual = float(np.median(spent / np.maximum(length, 1.0)))
        if usual < _MOSTLY_BUSY:
            continue
        missing = np.maximum(0.0, usual * length - spent)
        lost_ns = 0.0
        for low, high, lost in stalls:
            near = (times[:-1] < high) & (times[1:] > low)
            lost_ns += min(lost, float(missing[near].sum()))
        out["frozen", " ".join(track)] = lost_ns / base_ns
    return out


def per_normal_cpu(values: Values, normal: Values) -> Values:
    """``runqueue`` as the waiting for each nanosecond on a CPU, times the CPU time that a step normally
    needs. On a machine that is always contended, steps that became longer for another reason also wait more;
    this does not grow with them. Threads that hardly ever want a CPU are left out."""
    out = {key: value for key, value in values.items() if key[0] != WAIT_PER_CPU}
    for signal, where in values:
        need = normal.get(("cpu", where), 0.0)
        if signal == WAIT_PER_CPU and need > _BUSY_SHARE:
            out["runqueue", where] = values[signal, where] * need
        elif signal == WAIT_PER_CPU:
            out.pop(("runqueue", where), None)
    return out


def busy_threads(values: Values) -> list[str]:
    """The threads that spent a fair part of the expected time on a CPU."""
    return [where for (signal, where), value in values.items() if signal == "cpu" and value > _MOSTLY_BUSY]


def visited_cpus(tracks: Tracks, roles: Mapping[int, str]) -> set[int]:
    """The CPUs on which watched threads were found more than now and then."""
    found: set[int] = set()
    for _, named in tracks.threads(roles):
        cpus = named["cpu"].values.tolist() if "cpu" in named else []
        found |= {int(cpu) for cpu in set(cpus) if cpus.count(cpu) > 0.1 * len(cpus)}
    return found


def culprits(
    foreign: Foreign | None, normal: Foreign | None, extents: tuple[tuple[int, int], tuple[int, int]]
) -> list[tuple[float, float, int, int, str, str]]:
    """Who burns more now than in the reference: (cores now, cores normally, pid, cpu, name, cgroup), the
    largest growth first. ``extents``: of the reference, of the suspect window."""
    now = foreign.mean(*extents[1]) if foreign is not None else None
    if foreign is None or now is None:
        return []
    before = (normal.mean(*extents[0]) if normal is not None else None) or {}
    rows = [(n, before.get(key, 0.0), *key, *foreign.names.get(key[0], ("?", ""))) for key, n in now.items()]
    return sorted(rows, key=lambda row: row[1] - row[0])
