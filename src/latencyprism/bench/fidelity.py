"""Do the records match the engine's own counters, exactly? Drained at both ends, so nothing is in flight."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
from collections.abc import Callable
from typing import Any

from latencyprism.engines.discovery import discover
from latencyprism.lab import serve
from latencyprism.lab.load import Load
from latencyprism.lab.profiles import Profile, profile
from latencyprism.records import Step
from latencyprism.sentinel.targets import attach
from latencyprism.timeline.python_source import PythonSource

# The engine's own counters: (steps, sum of work tokens). vLLM counts only steps with output and credits a
# prompt to the step of its last chunk, so the comparison is over a drained stretch. llama.cpp counts prompt
# tokens and predicted tokens; the first predicted token of a request comes from its prefill.
COUNTERS = {
    "vllm": ("vllm:iteration_tokens_total_count", ("vllm:iteration_tokens_total_sum",)),
    "llama.cpp": (
        "llamacpp:n_decode_total",
        ("llamacpp:prompt_tokens_total", "llamacpp:tokens_predicted_total"),
    ),
}


def run(engine: str, seconds: float, clients: int, say: Callable[[str], None]) -> dict[str, Any]:
    """One run on a fresh server; see ``compare`` for what is in the result."""
    with serve.start(engine) as server:  # type: ignore[arg-type]
        say(f"{engine} serves, started in {server.start_s:.0f} s")
        mixed = profile("mixed").but(clients=clients)
        with Load(server, mixed.but(duration_s=3.0)) as warm:
            warm.wait()
        time.sleep(1.0)
        return compare(server, mixed.but(duration_s=seconds, seed=1), say)


def compare(server: serve.Server, profile: Profile, say: Callable[[str], None]) -> dict[str, Any]:
    """``steps_seen``/``steps_true``, ``tokens_seen``/``tokens_true`` (None where the engine counts no such
    thing), ``lost``, ``in_order``, client totals."""
    attachment = attach(discover(server.pid)[0])
    source = attachment.source
    steps: list[Step] = []
    stop = threading.Event()

    def read() -> None:
        # Beside engines that spin on every core an ordinary thread can wait for longer than the lease.
        with contextlib.suppress(PermissionError):
            os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(1))
        while not stop.is_set():
            steps.extend(source.poll().steps)
            source.renew()
            source.settle()
            time.sleep(0.02)
        steps.extend(source.poll().steps)

    reader = threading.Thread(target=read)
    try:
        before = _settled(server)
        reader.start()
        say("load runs")
        with Load(server, profile) as running:
            running.wait()
            client = running.result().summary()
        after = _settled(server)
        stop.set()
        reader.join()
        return _result(server.engine, source, steps, before, after, client)
    finally:
        stop.set()
        attachment.close()


def _settled(server: serve.Server) -> dict[str, float]:
    """The engine's counters once they stand still."""
    last = server.metrics()
    for _ in range(40):
        time.sleep(0.5)
        now = server.metrics()
        watched = {name: now.get(name) for names in COUNTERS.values() for name in (names[0], *names[1])}
        if all(last.get(name) == value for name, value in watched.items()):
            return now
        last = now
    return last


def _result(
    engine: str, source: Any, steps: list[Step],
    before: dict[str, float], after: dict[str, float], client: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    work = sum((step.prefill_tokens or 0) + (step.decode_tokens or 0) for step in steps)
    prefill = sum(step.prefill_tokens or 0 for step in steps)
    cached = sum(step.cached_tokens or 0 for step in steps) if engine != "llama.cpp" else None
    output = source.totals.output_tokens if isinstance(source, PythonSource) else None
    steps_seen: int | None = len(steps)
    steps_true: int | None = None
    tokens_true: int | None = None
    tokens_seen = work
    if engine == "vllm":
        steps_seen = source.totals.steps_with_output
        tokens_seen = prefill + (output or 0)
    if engine in COUNTERS:
        count, sums = COUNTERS[engine]
        steps_true = int(after[count] - before[count])
        tokens_true = int(sum(after[name] - before[name] for name in sums))
    if engine == "llama.cpp" and tokens_true is not None:
        tokens_true -= client["ok"]
    if engine == "transformers":
        # The engine keeps no counters of its own: the client's usage figures are the truth.
        tokens_true = client["prompt_tokens"] + client["output_tokens"]
        tokens_seen = prefill + (cached or 0) + (output or 0)
    numbers = [step.step for step in steps]
    ordered = numbers == list(range(numbers[0], numbers[0] + len(numbers))) if numbers else False
    in_time = all(a.end_ns <= b.end_ns for a, b in itertools.pairwise(steps))
    return {
        "engine": engine,
        "steps_seen": steps_seen,
        "steps_true": steps_true,
        "steps_all": len(steps),
        "tokens_seen": tokens_seen,
        "tokens_true": tokens_true,
        "output_tokens_seen": output,
        "output_tokens_client": client["output_tokens"],
        "cached_tokens": cached,
        "lost": source.lost,
        "in_order": ordered and in_time,
        "requests": client["requests"],
        "failed": client["failed"],
        "probes": source.health() if isinstance(source, PythonSource) else None,
    }
