"""Small synthetic incidents: decode steps that become slower, spans, counters, an alert, a verdict."""

from __future__ import annotations

import random

from latencyprism.recorder import Capture
from latencyprism.records import Alert, Counter, Evidence, Ranked, Request, Span, Step, Verdict

START_NS = 5_000_000_000_000
REALTIME_NS = 1_790_000_000_000_000_000


def incident(steps: int = 600, onset: int | None = None, seed: int = 7) -> Capture:
    """``steps`` decode steps of 12 ms, from ``onset`` on (default: the middle) with execute doubled."""
    dice = random.Random(seed)
    onset = steps // 2 if onset is None else onset
    capture = Capture(meta=meta(), expected_ms=[])
    at = START_NS
    for number in range(steps):
        step = _step(number, at, dice, slow=onset <= number < onset + steps // 4)
        capture.steps.append(step)
        capture.expected_ms.append(12.0 + _about(dice, 0, 0.1))  # type: ignore[union-attr]
        capture.spans += spans_of(step)
        capture.counters += _counters(step, slow=onset <= number < onset + steps // 4, dice=dice)
        at = step.end_ns + 50_000
    alerted = capture.steps[min(onset + 6, steps - 1)]
    capture.alerts.append(alert(alerted, onset))
    capture.verdict = verdict()
    return capture


def _about(dice: random.Random, middle: float, spread: float) -> float:
    """Plain arithmetic alone, so that every machine makes the same records."""
    return middle + spread * (dice.random() * 4 - 2)


def meta() -> dict[str, object]:
    return {
        "engine": "vllm",
        "host": "node-7",
        "pids": {"API server": 801, "EngineCore": 812, "Worker": 815},
        "versions": {"latencyprism": "0.1.0", "vllm": "0.32.0", "python": "3.11.7", "kernel": "6.1"},
        "clock": {"monotonic_ns": START_NS, "realtime_ns": REALTIME_NS},
        "command": "latencyprism watch --pid 812",
        "not_available": ["accelerator telemetry: no device found"],
    }


def _step(number: int, at: int, dice: random.Random, slow: bool) -> Step:
    prefill = 256 if number % 40 == 7 else 0
    schedule = int(abs(_about(dice, 0.4e6, 3e4)))
    execute = int(abs(_about(dice, 22e6 if slow else 10.5e6, 4e5))) + prefill * 20_000
    sample, update = int(abs(_about(dice, 0.7e6, 5e4))), int(abs(_about(dice, 0.3e6, 3e4)))
    end = at + schedule + execute + sample + update + 60_000
    return Step(
        "vllm", 0, 0, number, at, end, "mixed" if prefill else "decode",
        requests=16 + bool(prefill), prefill_requests=int(bool(prefill)), decode_requests=16,
        prefill_tokens=prefill, decode_tokens=16, cached_tokens=0, context_tokens=9000 + number * 16,
        attention_work=prefill * prefill, preempted=0, running=16, waiting=int(slow) * 3,
        kv_usage=0.2 + number / 10_000, schedule_ns=schedule, execute_ns=execute, sample_ns=sample,
        update_ns=update, gap_ns=50_000, runqueue_ns=int(9e6) if slow else int(2e5), gc_ns=0,
    )  # fmt: skip


def spans_of(step: Step) -> list[Span]:
    """A call tree of three on one thread."""
    track = ("Worker 815", "MainThread 815")
    start = step.start_ns + (step.schedule_ns or 0)
    end = start + (step.execute_ns or 0)
    return [
        Span(track, "execute_model", start, end, step.step),
        Span(track, "forward", start + 10_000, end - 20_000, step.step, (("tokens", 16), ("graph", "full"))),
        Span(track, "attention", start + 20_000, start + 90_000, step.step, (("share", 0.25),)),
    ]


def _counters(step: Step, slow: bool, dice: random.Random) -> list[Counter]:
    if step.step % 5:
        return []
    grown = float(step.start_ns - START_NS)
    return [
        Counter(
            ("machine",), "psi_cpu_share", step.end_ns, (0.62 if slow else 0.03) + dice.random() / 50, "share"
        ),
        Counter(("Worker 815", "MainThread 815"), "runqueue_ns", step.end_ns, 1e6 + grown * 0.02, "ns"),
        Counter(("machine",), "free_bytes", step.end_ns, 8e9 + _about(dice, 0, 1e6), "bytes"),
    ]


def requests_of(steps: list[Step]) -> list[Request]:
    """One that begins each ten steps and takes twenty-five, and one that was there before."""
    made = [Request("vllm", 0, -9, None, output_tokens=3, last_step=2)]
    for number in range(0, len(steps) - 26, 10):
        first, token, last = steps[number + 1], steps[number + 2], steps[number + 25]
        arrival = steps[number].start_ns + 1_000_000
        made.append(
            Request(
                "vllm", 0, 77 + number, arrival, first.start_ns - arrival, token.end_ns - first.start_ns,
                token.end_ns - arrival, 12_000_000, last.end_ns - arrival + 1_000_000, 100, 0, 24,
                13_000_000, "stop", first.step, token.step, last.step, 24, token.step,
            )
        )  # fmt: skip
    return made


def alert(step: Step, onset: int) -> Alert:
    return Alert(
        id="9f2c41d0", kind="shift", level="page", engine="vllm", replica=0, rank=0, step=step.step,
        onset_step=onset, time="2026-09-21T13:33:23.500Z", observed_ms=step.duration_ms, expected_ms=12.0,
        excess=step.duration_ms / 12.0 - 1, delay_ms=1.8, where="execute",
        terms={"base": 8.0, "batch": 2.5, "context": 1.5},
    )  # fmt: skip


def verdict() -> Verdict:
    return Verdict(
        "cpu.neighbour", 0.87,
        [Ranked("cpu.neighbour", 0.87), Ranked("cpu.quota", 0.06), Ranked("unknown", 0.07)],
        [
            Evidence("runqueue share of Worker", 0.016, 0.38, "The Worker waited 38 % of a step for a CPU."),
            Evidence("neighbour 4411 on cpu 3", 0.0, 0.71, "Process 4411 (stress) took 0.71 of CPU 3."),
        ],
        cycles=150, seconds=3.4, not_looked_at=["accelerator telemetry: no device found"],
    )  # fmt: skip
