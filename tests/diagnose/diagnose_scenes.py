"""Synthetic windows of a two-process engine: an EngineCore on CPU 1 that spins, a Worker on CPU 0."""

from dataclasses import dataclass, field

import numpy as np

from latencyprism.records import Counter, Span, Step, Window

ENGINE, WORKER = 100, 200
ROLES = {ENGINE: "EngineCore", WORKER: "Worker"}
E_THREAD, W_THREAD = ("EngineCore 100", "core 100"), ("Worker 200", "worker 200")
E_WHOLE, W_WHOLE = ("EngineCore 100", "process"), ("Worker 200", "process")


@dataclass
class Scene:
    """What is wrong, as shares of a normal step per step unless said otherwise."""

    slow: float = 0.0
    runqueue: float = 0.0
    foreign: float = 0.0
    throttled: float = 0.0
    steal: float = 0.0
    gc: float = 0.0
    idle: float = 0.0
    siblings: float = 0.0
    io: float = 0.0
    cpu: float = 0.0
    elsewhere: float = 0.0
    frequency: float = 1.0
    faults: float = 0.0
    voluntary: float = 0.0
    involuntary: float = 0.0
    writes: float = 0.0
    preempted: float = 0.0
    prompt: float = 1.0
    cached: float = 1.0
    stop_every_s: float = 0.0
    stop_ms: float = 50.0
    wait_lock: float = 0.0
    probed: bool = False
    allowed_cpus: int = 2
    step_factor: dict = field(default_factory=dict)


HEALTHY = Scene()
FAULTS = {
    "cpu.neighbour": lambda s: Scene(slow=s, runqueue=s, foreign=s, involuntary=4 * s),
    "cpu.steal": lambda s: Scene(slow=s, steal=s, cpu=s),
    "cpu.quota": lambda s: Scene(slow=s, throttled=1.2 * s, runqueue=s, involuntary=s),
    "cpu.frequency": lambda s: Scene(slow=s, cpu=s, frequency=1 / (1 + s)),
    "cpu.oversubscription": lambda s: Scene(slow=s, runqueue=s, siblings=3 * s, involuntary=8 * s),
    "python.gil": lambda s: Scene(slow=s, idle=s, siblings=s, voluntary=6),
    "python.gc": lambda s: Scene(slow=s, gc=s, cpu=s),
    "python.lock": lambda s: Scene(slow=s, idle=s, voluntary=6),
    "memory.reclaim": lambda s: Scene(slow=s, idle=s, io=s, faults=12, voluntary=12),
    "memory.bandwidth": lambda s: Scene(slow=s, cpu=s, elsewhere=1.0),
    "disk.stall": lambda s: Scene(slow=s, idle=s, io=s, voluntary=4),
    "log.flood": lambda s: Scene(slow=s, cpu=s, writes=400),
    "peer.stalled": lambda s: Scene(stop_every_s=0.05 / max(s, 1e-3)),
    "workload.long_prompt": lambda s: Scene(prompt=1 + 6 * s),
    "workload.preemption": lambda s: Scene(preempted=0.5, prompt=1 + s),
    "workload.prefix_cache_lost": lambda s: Scene(cached=0.05, prompt=1 + s),
}


def window(scene=HEALTHY, seconds=30.0, seed=0, start_s=1000.0, noise=0.05, drift=0.05) -> Window:
    """Steps, worker spans, counters at 10/s and neighbours at 1/s, with slow drift of the machine's speed."""
    random = np.random.default_rng(seed)
    out = Window()
    clock = start_s * 1e9
    end = clock + seconds * 1e9
    speed = random.normal(0, drift)
    stop_at = clock + 0.3e9 if scene.stop_every_s else float("inf")
    stops = []
    totals = []  # (time, dict of cumulative values)
    sums = dict.fromkeys(("base", "stop", "wall", "gc", "faults", "vol", "invol", "writes", "steps"), 0.0)
    number = 0
    while clock < end:
        number += 1
        speed = 0.97 * speed + random.normal(0, drift * 0.25)
        prefilling = random.random() < 0.15
        prefill = int(random.integers(20, 120) * scene.prompt) if prefilling else 0
        cached = int(random.integers(40, 80) * scene.cached) if prefilling else 0
        context = int(random.integers(2000, 4000))
        base = (15e6 + 4e2 * context + 1.1e6 * prefill) * np.exp(speed + random.normal(0, noise))
        duration = base * (1 + scene.slow)
        stopped = 0.0
        if clock + duration > stop_at:
            stopped = scene.stop_ms * 1e6
            stops.append((clock + 2e6, clock + 2e6 + stopped))
            stop_at += scene.stop_every_s * 1e9
        duration += stopped
        begin, clock = int(clock), clock + duration
        gc = int(base * scene.gc)
        out.steps.append(
            Step(
                "vllm",
                0,
                0,
                number,
                begin,
                int(clock),
                "mixed" if prefill else "decode",
                requests=8,
                prefill_requests=int(prefilling),
                decode_requests=8 - int(prefilling),
                prefill_tokens=prefill,
                decode_tokens=8 - int(prefilling),
                cached_tokens=cached,
                context_tokens=context,
                attention_work=prefill * 50,
                preempted=int(random.random() < scene.preempted),
                running=8,
                waiting=0,
                schedule_ns=int(3e5 + gc),
                execute_ns=int(duration - 6e5 - gc),
                sample_ns=None,
                update_ns=int(2e5),
                gap_ns=int(1e5),
                gc_ns=gc,
                offcpu_ns=int((scene.idle + 0.01) * base + stopped) if scene.probed else None,
                runqueue_ns=int((scene.runqueue + 0.02) * base) if scene.probed else None,
            )
        )
        if scene.probed:
            locked = begin + int((scene.wait_lock + 0.005) * base)
            out.spans.append(Span(("worker 200", "sched"), "off-CPU (futex)", begin, locked))
        out.spans.append(
            Span(("Worker 200", "main"), "execute_model", begin + int(5e5) + gc, int(clock) - int(3e5))
        )
        sums["base"] += base
        sums["stop"] += stopped
        sums["wall"] += duration
        for key, rate in (
            ("faults", scene.faults), ("vol", 1 + scene.voluntary), ("invol", 0.5 + scene.involuntary),
            ("writes", 10 + scene.writes), ("steps", 1),
        ):  # fmt: skip
            sums[key] += random.poisson(rate) if rate else 0
        totals.append((clock, dict(sums)))
        clock += 1e5
    _counters(out, scene, totals, stops, start_s * 1e9, clock, random)
    return out


def _counters(out, scene, totals, stops, begin, end, random):
    times = np.array([begin, *[t for t, _ in totals]])
    columns = {key: np.array([0.0, *[s[key] for _, s in totals]]) for key in totals[0][1]}

    def at(key, moment):
        return float(np.interp(moment, times, columns[key]))

    offset = begin * 0.5
    for tick in range(int((end - begin) / 1e8) + 1):
        now = begin + tick * 1e8
        base, stop, wall, steps = at("base", now), at("stop", now), now - begin, at("steps", now)
        lost = scene.runqueue * base
        idle = scene.idle * base + stop
        w_cpu = max(0.0, wall - lost - idle - 0.02 * wall)
        halted = any(low <= now <= high for low, high in stops)

        def put(track, name, value, unit="count", now=int(now)):
            out.counters.append(Counter(track, name, now, value, unit))

        for track, cpu, rq in ((W_THREAD, w_cpu, lost + 0.01 * wall), (E_THREAD, 0.95 * wall, 0.02 * wall)):
            put(track, "state", 3 if halted and track is W_THREAD else 0, "state")
            put(track, "cpu", 0 if track is W_THREAD else 1, "cpu")
            put(track, "cpu_ns", offset + cpu, "ns")
            put(track, "runqueue_ns", offset + rq, "ns")
        put(W_THREAD, "voluntary_switches", at("vol", now))
        put(W_THREAD, "allowed_cpus", scene.allowed_cpus)
        put(W_THREAD, "involuntary_switches", at("invol", now))
        put(W_WHOLE, "cpu_ns", offset + w_cpu + scene.siblings * base, "ns")
        put(E_WHOLE, "cpu_ns", offset + 0.95 * wall, "ns")
        put(W_WHOLE, "major_faults", at("faults", now))
        put(W_WHOLE, "write_calls", at("writes", now))
        put(W_WHOLE, "throttled_ns", scene.throttled * base, "ns")
        put(("machine",), "cpu0_steal_ns", scene.steal * base, "ns")
        put(("machine",), "cpu1_steal_ns", 0.0, "ns")
        put(("machine",), "psi_io_some_ns", scene.io * base + 0.01 * wall, "ns")
        put(("machine",), "psi_memory_some_ns", 0.0, "ns")
        put(("machine",), "allocation_stalls", 0.0 * steps)
        put(("machine",), "cpu0_frequency_khz", 3e6 * scene.frequency, "kHz")
        if tick % 10 == 0:
            put(("machine",), "neighbours_looked_ns", wall, "ns")
            share = scene.foreign / (1 + scene.slow)
            if share:
                put(
                    ("neighbour 4711", "busy", "/other"),
                    "cpu0_share",
                    share * random.uniform(0.9, 1.1),
                    "cores",
                )
            if scene.elsewhere:
                put(("neighbour 4712", "copy", "/other"), "cpu2_share", scene.elsewhere, "cores")
            put(("neighbour 9", "kworker", ""), "cpu1_share", random.uniform(0.0, 0.04), "cores")
