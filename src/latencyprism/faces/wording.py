"""How numbers, alerts and verdicts are said in words, the same on a terminal and in a report."""

from __future__ import annotations

from latencyprism.records import Alert, Verdict

_KIND_WORDS = {
    "shift": "steps became slower than their workload explains",
    "stall": "one step took far longer than its workload explains",
    "slo": "the latency objective is in danger",
    "silence": "the engine went silent",
    "straggler": "one rank became slower than the others",
}

CAUSE_WORDS = {
    "cpu.neighbour": "another process takes CPU time from the engine",
    "cpu.steal": "the hypervisor takes CPU time from this machine",
    "cpu.quota": "the cgroup's CPU quota throttles the engine",
    "cpu.frequency": "the CPU runs at a lower clock",
    "cpu.oversubscription": "the engine's own threads compete for too few CPUs",
    "python.gil": "another thread holds the interpreter lock",
    "python.gc": "the garbage collector stops the engine",
    "python.lock": "the engine waits for a lock",
    "memory.reclaim": "memory is short and the kernel reclaims it",
    "memory.bandwidth": "memory bandwidth is used up",
    "disk.stall": "the engine waits for a disk",
    "log.flood": "the engine writes log lines instead of tokens",
    "net.delay": "the network delays the engine",
    "peer.stalled": "a peer process keeps the engine waiting",
    "engine.tokenizer": "tokenizing holds up the engine",
    "engine.event_loop": "the API server's event loop is blocked",
    "workload.long_prompt": "long prompts are being prefilled",
    "workload.preemption": "requests are preempted for lack of KV cache",
    "workload.prefix_cache_lost": "the prefix cache is no longer hit",
    "xpu.clock": "the accelerator runs at a lower clock",
    "xpu.power": "the accelerator is at its power limit",
    "xpu.contention": "someone else computes on the accelerator",
    "xpu.memory_bandwidth": "the accelerator's memory bandwidth is used up",
    "xpu.link": "the link between accelerators is slow",
    "xpu.pcie": "transfers over PCIe are slow",
    "xpu.straggler": "one rank is slower than the others",
    "xpu.error": "the accelerator reports errors",
    "xpu.allocator": "the accelerator's memory allocator holds up the engine",
}


def clean(text: object, most: int = 400) -> str:
    """Text from a file or another process on one line, without what could steer a terminal."""
    told = str(text)[: most + 1]
    told = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in told)
    return told if len(told) <= most else told[:most] + "..."


def ms(value: float | None) -> str:
    """``12.3 ms``; ``?`` if not known."""
    if value is None or value != value:
        return "?"
    if abs(value) >= 10_000:
        return f"{value / 1e3:.1f} s"
    return (
        f"{value:.0f} ms"
        if abs(value) >= 100
        else f"{value:.1f} ms"
        if abs(value) >= 10
        else f"{value:.2f} ms"
    )


def percent(share: float | None) -> str:
    if share is None or share != share:
        return "?"
    return f"{share * 100:+.0f}%"


def part_of(share: float | None) -> str:
    """``98%``; empty if not known. Never ``-0%``."""
    return "" if share is None or share != share else f"{round(share * 100)}%"


def number(value: float | None) -> str:
    """Three significant digits, thousands apart, ``not seen`` for None."""
    if value is None or value != value:
        return "not seen"
    if abs(value) >= 1000 or value == int(min(max(value, -1e15), 1e15)):
        return f"{value:,.0f}"
    return f"{value:.3g}"


_SCALES = {
    "ns": ((1e9, "s"), (1e6, "ms"), (1e3, "us"), (1.0, "ns")),
    "bytes": ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B")),
}


def quantity(value: float | None, unit: str, rate: bool = False) -> str:
    """A reading with its unit, scaled where that is usual; ``rate``: per second."""
    per = "/s" if rate else ""
    if value is None or value != value:
        return "not seen"
    for size, name in _SCALES.get(unit, ()):
        if abs(value) >= size:
            return f"{value / size:.3g} {name}{per}"
    shown = "" if unit == "count" else clean(unit, 20)
    return f"{number(value)} {shown}{per}".replace(" /s", "/s").strip()


def replica_words(alert: Alert) -> str:
    return clean(f"{alert.engine} replica {alert.replica}" + (f" rank {alert.rank}" if alert.rank else ""))


def alert_sentence(alert: Alert) -> str:
    """One sentence: who, what, how much, since which step."""
    what = _KIND_WORDS.get(alert.kind, f"alert of kind {clean(alert.kind, 40)}")
    if alert.kind == "silence":
        return f"{replica_words(alert)}: {what} after step {alert.step}."
    if alert.kind == "straggler":
        return f"{replica_words(alert)}: {what}: {clean(alert.text or alert.where or '?')}."
    since = f" since step {alert.onset_step}" if alert.onset_step != alert.step else ""
    return (
        f"{replica_words(alert)}: {what}{since}: step {alert.step} took {ms(alert.observed_ms)} "
        f"where {ms(alert.expected_ms)} was expected ({percent(alert.excess)})."
    )


def verdict_sentence(verdict: Verdict | None) -> str:
    """One sentence; ``none`` and ``unknown`` are said as what they mean."""
    if verdict is None:
        return "No diagnosis was made."
    sure = f"{verdict.probability:.0%}"
    if verdict.cause == "none":
        return f"Nothing abnormal was found in what was looked at ({sure})."
    if verdict.cause == "unknown":
        return f"It is slower, but nothing that was looked at explains it ({sure})."
    cause = clean(verdict.cause, 60)
    words = CAUSE_WORDS.get(verdict.cause)
    return f"{words[0].upper()}{words[1:]} ({cause}, {sure})." if words else f"Cause: {cause} ({sure})."


def terms_words(terms: dict[str, float] | None) -> str:
    """The parts of an expectation as a sum: ``base 8.1 + batch 3.2 ms``."""
    if not terms:
        return ""
    return " + ".join(f"{clean(name, 40)} {value:.2f}" for name, value in terms.items()) + " ms"
