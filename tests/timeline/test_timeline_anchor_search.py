"""The search on live made-up engines of every shape and interpreter, and steps from what it finds."""

from __future__ import annotations

import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from statistics import median

import pytest

from latencyprism.attach.process import read_process
from latencyprism.bench.attaching import VERSIONS, find_pythons
from latencyprism.engines.unknown import GENERIC, discover_any
from latencyprism.errors import TargetRefused
from latencyprism.timeline.anchor_search import Anchor, search
from latencyprism.timeline.generic_source import GenericSource

pytestmark = pytest.mark.root

ENGINE = str(files("latencyprism.lab").joinpath("inside", "made_up_engine.py"))
LINE = struct.Struct("<qq")
RIGHT = {
    "plain": {"PlainEngine.one_iteration"},
    "thread": {"ThreadedEngine.run_step", "ThreadedEngine.turn"},
    "polling": {"PollingEngine.turn", "PollingEngine.work"},
    "asyncio": {"AsyncEngine.step"},
}

Start = Callable[..., tuple[int, Path]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """``start(shape, load, python)``: pid and step log of a made-up engine at work."""
    running: list[subprocess.Popen[str]] = []

    def begin(shape: str, load: float = 1.0, python: str = sys.executable) -> tuple[int, Path]:
        log = tmp_path / f"steps{len(running)}"
        process = subprocess.Popen(
            [python, ENGINE, shape, str(log), str(load)], stdout=subprocess.PIPE, text=True
        )
        running.append(process)
        assert process.stdout is not None and process.stdout.readline().strip() == "ready"
        time.sleep(0.5)
        return process.pid, log

    yield begin
    for process in running:
        process.kill()
        process.communicate()


def right(anchor: Anchor, shape: str) -> bool:
    """Before 3.11 a code object knows its own name alone."""
    accepted = RIGHT[shape] | {name.split(".")[-1] for name in RIGHT[shape]}
    return anchor.function.qualname in accepted


def logged(log: Path) -> dict[int, int]:
    """End of each of the engine's own steps -> duration, ns."""
    whole = log.read_bytes()
    return dict(LINE.iter_unpack(whole[: len(whole) // LINE.size * LINE.size]))


@pytest.mark.parametrize("version", VERSIONS)
def test_an_async_engine_on_every_interpreter(start: Start, version: str) -> None:
    python = find_pythons().get(version)
    if python is None:
        pytest.skip(f"no Python {version} on this machine")
    pid, log = start("asyncio", python=python)
    maps = Path(f"/proc/{pid}/maps").read_text().count("lprism")
    anchor = search(pid)
    assert right(anchor, "asyncio"), anchor
    assert anchor.confidence > 0.6 and anchor.seconds <= 10.0
    assert anchor.witness is not None and anchor.witness.name in ("execute", "forward")
    assert Path(f"/proc/{pid}/maps").read_text().count("lprism") == maps == 0
    before = len(logged(log))
    time.sleep(0.5)
    assert len(logged(log)) > before


@pytest.mark.parametrize("shape", ["plain", "thread"])
def test_loops_in_the_main_thread_and_in_a_thread(start: Start, shape: str) -> None:
    pid, _ = start(shape)
    anchor = search(pid)
    assert right(anchor, shape), anchor
    assert anchor.confidence > 0.6 and anchor.seconds <= 10.0
    assert "calls" in anchor.reasons[0] and anchor.stacks > 50


def test_steps_are_the_iterations_and_turns_without_work_are_none(start: Start) -> None:
    pid, log = start("polling", load=0.5)
    replica = discover_any(pid)[0]
    assert replica.engine == GENERIC and replica.engine_pid == pid
    said: list[str] = []
    source = GenericSource(replica, said.append)
    try:
        assert right(source.anchor, "polling"), source.anchor
        assert "searching" in said[0] and "generic mode" in source.warning
        assert source.anchor.name in source.warning
        source.poll()
        time.sleep(3.0)
        window = source.poll()
        own = logged(log)
        source.renew()
        assert source.detached() is None and source.lost == 0
        health = source.health()[pid]
        assert health["errors"] == 0
    finally:
        source.close()
    steps = [step for step in window.steps if step.gap_ns is not None]
    assert len(steps) > 20
    assert all(step.engine == GENERIC and step.requests is None and step.phase is None for step in steps)
    assert all(step.gc_ns is not None and step.gc_ns >= 0 for step in steps)
    # Every step is one of the engine's own, and none of these is missing.
    # The engine writes its log within the iteration; of two functions that last for it, the inner one may
    # have returned by then.
    slack_ns = 2_000_000
    first, last = steps[0].start_ns, steps[-1].end_ns + slack_ns
    inside = {end: took for end, took in own.items() if first < end <= last}
    matched = {
        step.step: [end for end in inside if step.start_ns < end <= step.end_ns + slack_ns] for step in steps
    }
    assert sum(len(ends) == 1 for ends in matched.values()) >= len(steps) - 1
    assert len(inside) - len({end for ends in matched.values() for end in ends}) <= 1  # at an edge
    longer = [step.duration_ns - inside[matched[step.step][0]] for step in steps if matched[step.step]]
    assert median(longer) < 5_000_000
    # The turns in which it waited for work are gaps, not steps, as long as it waited by its own log.
    idle = max(end - inside[end] - before for before, end in pairwise(inside))
    if idle > 100_000_000:
        assert max(step.gap_ns or 0 for step in steps) > idle // 2


def test_the_same_process_is_searched_once(start: Start) -> None:
    pid, _ = start("plain")
    replica = discover_any(pid)[0]
    GenericSource(replica).close()
    begun = time.monotonic()
    said: list[str] = []
    again = GenericSource(replica, said.append)
    again.close()
    assert not said and time.monotonic() - begun < 2.0


IDLE = "import time; print('ready', flush=True); time.sleep(60)"


def test_an_idle_process_is_refused_with_the_remedy() -> None:
    process = subprocess.Popen([sys.executable, "-c", IDLE], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        begun = time.monotonic()
        with pytest.raises(TargetRefused) as refusal:
            search(process.pid)
        assert "no iteration was found" in refusal.value.what and "serve requests" in refusal.value.remedy
        assert time.monotonic() - begun < 10.0
    finally:
        process.kill()
        process.communicate()


def test_what_is_no_python_stays_unknown() -> None:
    process = subprocess.Popen(["sleep", "30"])
    try:
        with pytest.raises(TargetRefused, match="not a known engine"):
            discover_any(process.pid)
        assert read_process(process.pid).pid == process.pid
    finally:
        process.kill()
        process.communicate()
