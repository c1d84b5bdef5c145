"""The causes that can be injected, and the one way to start them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from latencyprism.errors import BadInput
from latencyprism.inject import burners, crowding, devices, holders, traffic, within
from latencyprism.inject.injection import Injection, Plan
from latencyprism.inject.request import Request
from latencyprism.inject.target import look

LONGEST_S = 600.0
MOST_STRENGTH = 4.0
MOST_REFERENCE_MS = 10_000.0
MOST_PROMPT_TOKENS = 200_000
SLOW_DOWN = "slow-down aimed at, up to 4: 0.1 is steps 10 % longer"


@dataclass(frozen=True, slots=True)
class Entry:
    """``strength`` says what the number means for this cause."""

    cause: str
    how: str
    strength: str
    default: float
    plan: Callable[[Request], Plan]


CATALOGUE: dict[str, Entry] = {
    entry.cause: entry
    for entry in (
        Entry(
            "cpu.neighbour",
            "a real-time process on the target's CPU, busy for part of each 10 ms; plain processes where "
            "real-time priority is not permitted",
            f"{SLOW_DOWN}, where the target keeps that CPU busy",
            1.0,
            burners.neighbour,
        ),
        Entry(
            "cpu.quota",
            "a control group with a CPU quota below what the target uses now",
            f"{SLOW_DOWN}, on average: some steps pay for all",
            1.0,
            holders.quota,
        ),
        Entry(
            "cpu.oversubscription",
            "fewer CPUs for all threads of the target, for part of each 200 ms; where it computes on one "
            "thread, a second one within it on the same CPU",
            f"{SLOW_DOWN}; 1 at most where it computes on one thread",
            0.5,
            crowding.oversubscribed,
        ),
        Entry(
            "peer.stalled",
            "SIGSTOP for --stop-ms every --every-s, then SIGCONT",
            "slow-down aimed at, up to 1 (instead of --stop-ms), on average: some steps pay for all",
            0.025,
            holders.stalled,
        ),
        Entry(
            "memory.bandwidth",
            "a process on another CPU that copies memory",
            "share of time spent copying, up to 1",
            1.0,
            burners.bandwidth,
        ),
        Entry(
            "memory.reclaim",
            "the kernel takes back pages of files that the target has mapped (process_madvise), as when "
            "memory is short: who touches them waits for the disk",
            f"{SLOW_DOWN}, at 0.2 ms a major fault",
            0.5,
            burners.reclaim,
        ),
        Entry(
            "disk.stall",
            "a process on another CPU that writes synchronously to a nameless file in --directory",
            "share of time spent writing, up to 1",
            1.0,
            burners.disk,
        ),
        Entry(
            "python.gil",
            "a thread in the target that holds the interpreter's lock, 4 ms at a time",
            f"{SLOW_DOWN}, where steps need that lock all the time",
            0.5,
            within.gil,
        ),
        Entry(
            "python.gc",
            "a thread in the target that forces full collections; objects beside a heap that is small",
            f"{SLOW_DOWN}, where steps need the interpreter's lock all the time",
            0.5,
            within.collect,
        ),
        Entry(
            "python.lock",
            "a thread in the target that holds mutexes of queues and locks that its working threads can see",
            f"{SLOW_DOWN}, where each step takes one of these locks",
            0.5,
            within.lock,
        ),
        Entry(
            "log.flood",
            "a thread in the target that writes lines through the target's own log handlers",
            f"{SLOW_DOWN}, where steps need the interpreter's lock all the time",
            0.5,
            within.flood,
        ),
        Entry(
            "engine.event_loop",
            "a callback in the target that blocks its asyncio loop, 20 ms at a time (vLLM: the API server)",
            f"{SLOW_DOWN}, for what the loop does",
            0.5,
            within.event_loop,
        ),
        Entry(
            "engine.tokenizer",
            "tokenizer calls in the target take more CPU (vLLM: the API server); --at names other methods",
            "times --reference-ms (a TTFT): CPU added to each prompt, a twentieth of it to a decoded token",
            0.5,
            within.tokenizer,
        ),
        Entry(
            "net.delay",
            "a proxy on loopback between clients and the engine at --url, which passes everything on later; "
            "clients talk to the port that it tells",
            "times --reference-ms: added to each round trip, half of it each way",
            0.5,
            traffic.delay,
        ),
        Entry(
            "workload.long_prompt",
            "prompts of --prompt-tokens, one at a time, to the engine at --url",
            "share of time that one is under way, s/(1+s) for strength s",
            0.5,
            traffic.long_prompt,
        ),
        Entry(
            "workload.preemption",
            "long outputs, many at once, to the engine at --url: more than its KV cache holds",
            "32 requests at once for 1; what it takes depends on the KV cache",
            1.0,
            traffic.preemption,
        ),
        Entry(
            "workload.prefix_cache_lost",
            "prompts that begin like no other, to the engine at --url: cached prefixes are evicted for them",
            "share of time that they are under way, s/(1+s) for strength s",
            1.0,
            traffic.prefix_cache_lost,
        ),
        *(
            Entry(
                f"xpu.{kind}",
                f"another process on NVIDIA device --device that {what}",
                "slow-down aimed at, up to 1: two tenants that are busy at once have half of the device each",
                0.5,
                devices.tenant(kind),
            )
            for kind, what in (
                ("contention", "computes on every multiprocessor"),
                ("memory_bandwidth", "copies within its memory"),
                ("pcie", "copies from and to pinned memory of the host"),
                ("link", "copies to the next device"),
                ("allocator", "allocates and frees its memory"),
            )
        ),
        *(
            Entry(
                f"xpu.{kind}",
                f"NVIDIA device --device gets {what}, which is put back; only with --allow-device-settings",
                f"{SLOW_DOWN}, where the target computes all the time",
                0.5,
                devices.setting(kind),
            )
            for kind, what in (("clock", "a lower highest clock"), ("power", "a lower power limit"))
        ),
    )
}


def start(
    cause: str,
    pid: int,
    strength: float | None = None,
    duration_s: float = 10.0,
    *,
    i_know: bool = False,
    stop_ms: float | None = None,
    every_s: float = 2.0,
    directory: str = ".",
    at: str | None = None,
    url: str | None = None,
    reference_ms: float = 100.0,
    model: str | None = None,
    prompt_tokens: int = 1024,
    lead_s: float = 0.0,
    device: int = 0,
    allow_device_settings: bool = False,
) -> Injection:
    """Begins to disturb process ``pid``; use as ``with start(...) as injection:``.

    Refuses (TargetRefused) processes that this one did not start, unless ``i_know``. Raises BadInput for an
    unknown cause or numbers out of range, PrismError where the kernel does not permit it. The disturbance
    ends after ``duration_s``, on leaving the context, and when this process dies.
    """
    entry = CATALOGUE.get(cause)
    if entry is None:
        raise BadInput(f"cannot inject {cause!r}", "no such cause", f"one of: {', '.join(CATALOGUE)}")
    if not (math.isfinite(duration_s) and 0 < duration_s <= LONGEST_S):
        raise BadInput(
            "--duration is out of range", f"{duration_s} s", f"more than 0, at most {LONGEST_S:.0f} s"
        )
    if strength is not None and not (math.isfinite(strength) and 0 < strength <= MOST_STRENGTH):
        raise BadInput("--strength is out of range", f"{strength}", f"more than 0, at most {MOST_STRENGTH}")
    for name, value, least, most in (
        ("--reference-ms", reference_ms, 0.001, MOST_REFERENCE_MS),
        ("--prompt-tokens", prompt_tokens, 1, MOST_PROMPT_TOKENS),
        ("--lead-s", lead_s, 0, LONGEST_S),
    ):
        if not (math.isfinite(value) and least <= value <= most):
            raise BadInput(f"{name} is out of range", f"{value}", f"from {least:g} to {most:g}")
    request = Request(
        target=look(pid, i_know=i_know),
        strength=entry.default if strength is None else strength,
        strength_given=strength is not None,
        duration_s=duration_s,
        stop_ms=stop_ms,
        every_s=every_s,
        directory=directory,
        at=at,
        url=url,
        reference_ms=reference_ms,
        model=model,
        prompt_tokens=prompt_tokens,
        lead_s=lead_s,
        device=device,
        allow_device_settings=allow_device_settings,
    )
    return Injection(cause, pid, duration_s, entry.plan(request))
