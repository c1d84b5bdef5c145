"""The search for an unknown engine's iteration: is the function right, how long it takes, what it costs the
engine.

Windows with a search and windows without one alternate in random order, on an engine under steady load.
"""

from __future__ import annotations

import json
import random
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from latencyprism.bench.statistics import ratio_interval
from latencyprism.engines.discovery import discover
from latencyprism.errors import PrismError
from latencyprism.lab import serve
from latencyprism.lab.load import Load
from latencyprism.lab.profiles import Length, Profile

MADE_UP = "asyncio"
RIGHT = {
    # The loop of EngineCore calls the first once a turn; it calls one of the others, which is the step
    # itself.
    "vllm": {
        "EngineCoreProc._process_engine_step",
        "EngineCore.step",
        "EngineCore.step_with_batch_queue",
    },
    # The body of the generation loop, and what it calls once for every batch that it runs.
    "transformers": {
        "ContinuousBatchingManager._generation_loop_body",
        "ContinuousBatchingManager._generation_step",
        "ContinuousBatchProcessor._generation_step",
    },
    # `run_engine` awaits it once for every step.
    MADE_UP: {"AsyncEngine.step"},
}
"""Functions that are called exactly once in every iteration and last for all of it, or nearly: what is
scheduled, run and handed on in between is one batch."""
WARM_S = 4.0
PAUSE_S = 0.5
_LINE = struct.Struct("<qq")


@dataclass(frozen=True)
class Window:
    """From and to (CLOCK_MONOTONIC, ns), and the processor time that the engine took meanwhile (ns)."""

    begun: int
    ended: int
    cpu: int


Pair = dict[bool, Window]
"""With and without a search."""
Pace = Callable[[int, int], float]
"""Work done between two times (CLOCK_MONOTONIC, ns), in whatever unit: only ratios are taken."""


class Searcher:
    """Speaks with ``bench.searching``."""

    def __init__(self, pid: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "latencyprism.bench.searching", str(pid)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def search(self) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write("search\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise PrismError("the searcher of the benchmark ended")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def run(engine: str, pairs: int, seed: int, say: Callable[[str], None]) -> dict[str, Any]:
    """``pairs`` pairs of windows: one search, and as long a time without."""
    with _made_up() if engine == MADE_UP else _served(engine, pairs) as (pid, pace):
        say(f"{engine} runs as process {pid}")
        time.sleep(WARM_S)
        searcher = Searcher(pid)
        try:
            answers, windows = _windows(pid, searcher, pairs, random.Random(seed), say)
        finally:
            searcher.close()
        return _report(engine, answers, windows, pace)


def _windows(
    pid: int, searcher: Searcher, pairs: int, rng: random.Random, say: Callable[[str], None]
) -> tuple[list[dict[str, Any]], list[Pair]]:
    # The first search is no part of a pair: it says how long a window has to be.
    first = searcher.search()
    seconds = float(first.get("seconds") or 8.0)
    answers: list[dict[str, Any]] = [first]
    windows: list[Pair] = []
    for pair in range(pairs):
        order = [True, False]
        rng.shuffle(order)
        both: Pair = {}
        for on in order:
            time.sleep(PAUSE_S)
            begun, cpu = time.monotonic_ns(), _cpu_ns(pid)
            if on:
                answers.append(searcher.search())
            else:
                time.sleep(seconds)
            both[on] = Window(begun, time.monotonic_ns(), _cpu_ns(pid) - cpu)
        windows.append(both)
        say(f"pair {pair + 1} of {pairs}: {answers[-1].get('function') or answers[-1].get('error')}")
    return answers, windows


def _cpu_ns(pid: int) -> int:
    """Processor time of all threads of a process so far."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            total += int((task / "schedstat").read_text().split()[0])
        except OSError:
            continue  # it ended between listing and reading
    return total


def _slowdown(windows: list[Pair], pace: Pace) -> dict[str, Any]:
    """Time per unit of work, and processor time of the engine per unit, with a search relative to without,
    less 1."""
    times, cpus = [], []
    for both in windows:
        work = {on: pace(window.begun, window.ended) for on, window in both.items()}
        if min(work.values()) <= 0:
            raise PrismError("the engine did nothing in a window", "its load has ended or it hangs")
        per = {on: (window.ended - window.begun) / work[on] for on, window in both.items()}
        cpu = {on: window.cpu / work[on] for on, window in both.items()}
        times.append(per[True] / per[False])
        cpus.append(cpu[True] / cpu[False])
    found: dict[str, Any] = {}
    for name, ratios in (("slowdown", times), ("cpu_slowdown", cpus)):
        middle, low, high = ratio_interval(ratios)
        found[name] = round(middle - 1.0, 4)
        found[f"{name}_ci"] = [round(low - 1.0, 4), round(high - 1.0, 4)]
    return found


def _report(engine: str, answers: list[dict[str, Any]], windows: list[Pair], pace: Pace) -> dict[str, Any]:
    found = [answer for answer in answers if "function" in answer]
    names = [answer["function"] for answer in found]
    right = [name for name in names if name in RIGHT[engine]]
    most = max(found, key=lambda answer: names.count(answer["function"])) if found else {}
    return {
        "engine": engine,
        "function": most.get("function"),
        "witness": most.get("witness"),
        "right": len(right) == len(answers),
        "right_of": [len(right), len(answers)],
        "confidence": most.get("confidence"),
        "reasons": most.get("reasons"),
        "seconds": max((answer["seconds"] for answer in found), default=None),
        **_slowdown(windows, pace),
        "own_cpu_s": max((answer["own_cpu_s"] for answer in found), default=None),
        "pairs": len(windows),
        "stacks": sum(answer["stacks"] for answer in found),
        "torn": sum(answer["torn"] for answer in found),
        "errors": [answer["error"] for answer in answers if "error" in answer],
    }


@contextmanager
def _made_up() -> Iterator[tuple[int, Pace]]:
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "steps"
        script = str(files("latencyprism.lab").joinpath("inside", "made_up_engine.py"))
        process = subprocess.Popen(
            [sys.executable, script, MADE_UP, str(log)], stdout=subprocess.PIPE, text=True
        )
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield process.pid, lambda begun, ended: _steps_between(log, begun, ended)
        finally:
            process.kill()
            process.communicate()


def _steps_between(log: Path, begun: int, ended: int) -> float:
    whole = log.read_bytes()
    whole = whole[: len(whole) // _LINE.size * _LINE.size]
    return float(sum(begun <= end < ended for end, _ in _LINE.iter_unpack(whole)))


@contextmanager
def _served(engine: str, pairs: int) -> Iterator[tuple[int, Pace]]:
    seconds = WARM_S + (pairs + 1) * 2 * 12.0
    steady = Profile("steady", clients=4, prompt=Length(16), output=Length(512), duration_s=seconds)
    with serve.start(engine) as server:  # type: ignore[arg-type]
        pid = discover(server.pid)[0].engine_pid
        with Load(server, steady) as running:

            def tokens(begun: int, ended: int) -> float:
                running.stop()
                return float(len(running.result().itl_ms(begun, ended)))

            yield pid, tokens
