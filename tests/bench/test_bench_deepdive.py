from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latencyprism.agent.operator_build import recognise
from latencyprism.agent.operator_ring import OperatorRecords
from latencyprism.agent.operators import OperatorProbe
from latencyprism.attach.inject import Injector
from latencyprism.bench.deepdive import result
from latencyprism.bench.profiler_window import ProfilerWindow, compare
from latencyprism.errors import PrismError
from latencyprism.lab.install import EngineUnavailable, ensure
from latencyprism.recorder import Capture, write_capture
from latencyprism.records import Step

LOOP = """
import time, torch
torch.set_num_threads(1)
layers = torch.nn.Sequential(*[torch.nn.Linear(32, 32) for _ in range(4)])
x = torch.zeros(4, 32)
print("ready", flush=True)
while True:
    with torch.no_grad():
        layers(x)
    time.sleep(0.002)
"""


@pytest.fixture
def loop() -> Iterator[int]:
    """A process whose main thread runs 40 operators again and again."""
    if sys.platform != "linux" or platform.machine() != "x86_64" or os.geteuid() != 0:
        pytest.skip("needs Linux on x86-64 and the right to ptrace")
    try:
        python = str(ensure("transformers").python)
    except EngineUnavailable as missing:
        pytest.skip(f"engine unavailable: {missing.why}")
    process = subprocess.Popen([python, "-u", "-c", LOOP], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    yield process.pid
    process.kill()
    process.communicate()


@pytest.mark.engine
@pytest.mark.root
def test_the_profiler_and_the_probe_over_the_same_steps_tell_the_same(loop: int) -> None:
    injector = Injector(loop)
    armed = OperatorProbe(injector, recognise(loop), 60.0, lease_s=60.0)
    with ProfilerWindow(injector) as window:
        for _ in range(10):
            time.sleep(0.05)
            armed.drain()
    armed.close()
    found = compare(window.names, armed.records, [])
    assert found["told"] == len(window.names) > 40 * 5
    assert found["missed"] == 0


def seen_as(names: list[str]) -> OperatorRecords:
    """These operators one after the other, ten ticks each."""
    schemas = {name: place + 1 for place, name in enumerate(dict.fromkeys(names))}
    rows: list[tuple[int, int, int, int]] = []
    for name in names:
        tick = 5 * len(rows)
        rows += [(tick, schemas[name], 64, len(rows) + 1), (tick + 5, 0, 65, len(rows) + 2)]
    return OperatorRecords(
        1, chunks=[np.array(rows, dtype=np.int64)],
        names={place: f"{name}.x" for name, place in schemas.items()},
        readings=[(0, 0), (10 * len(names), 10 * len(names))],
    )  # fmt: skip


def step(number: int, start_ns: int, end_ns: int) -> Step:
    return Step(engine="vllm", replica=0, rank=0, step=number, start_ns=start_ns, end_ns=end_ns)


def test_what_the_probe_missed_is_counted_against_the_profiler() -> None:
    one_step = [f"aten::op{n % 7}" for n in range(50)]
    steps = [step(n, 500 * n, 500 * n + 500) for n in range(10)]
    told = one_step[20:] + one_step * 6 + one_step[:10]
    found = compare(told, seen_as(one_step * 10), steps)
    assert found == {"told": len(told), "missed": 0, "steps": 6, "per_step": 50}
    strange = list(told)
    strange[100] = strange[200] = "aten::other"
    assert compare(strange, seen_as(one_step * 10), steps)["missed"] == 2
    with pytest.raises(PrismError, match="told of more"):
        compare(told, seen_as(one_step), steps)
    with pytest.raises(PrismError, match="told of 3 operators"):
        compare(told[:3], seen_as(one_step), steps)


def measured(slower: float, lost: int = 0, armed: float = 12.0) -> dict[str, Any]:
    def rows(ms: float, count: int = 40) -> list[list[int]]:
        return [[n, int(ms * 1e6), 4, 0] for n in range(count)] + [[0, 90_000_000, 4, 256]]

    pairs = [
        [
            {"pair": pair, "order": "on", "steps": rows(10 * slower), "armed_ms": armed},
            {"pair": pair, "order": "off", "steps": rows(10)},
        ]
        for pair in range(6)
    ]
    return {
        "normal": {"steps": rows(12)}, "after": {"steps": rows(11)}, "arm": [armed] * 10,
        "windows": [window for pair in pairs for window in pair],
        "rss_before": {"7": 1000.0}, "rss_after": {"7": 1008.5},
        "profiled": {"told": 3000, "missed": 0, "steps": 2, "per_step": 1047},
        "count": {"counts": [1047, 1047, 1040], "lost": lost},
        "written": {"bytes": 3_000_000, "operators": 150_000, "seconds": 2.0},
    }  # fmt: skip


@pytest.fixture
def capture_file(tmp_path: Path) -> Path:
    steps = [step(n, n * 10**8, n * 10**8 + 10**7) for n in range(400)]
    capture = Capture(meta={"deep_probe": {"armed_ns": 350 * 10**8}}, steps=steps)
    write_capture(tmp_path / "a.pftrace", capture)
    return tmp_path / "a.pftrace"


def test_the_figures_and_which_targets_they_meet(capture_file: Path) -> None:
    found = result(measured(1.05), capture_file, clients=4)
    assert found["step_time_ratio"] == pytest.approx(1.05)
    assert found["windows_compared"] == 6 and found["armed"] == 16
    assert (found["operators_per_step"], found["operators_per_step_profiler"]) == (1047, 1047)
    assert found["operators_per_step_least"] == 1040
    assert found["rss_left_mb"] == 8.5 and found["past_s"] == 35.0 and found["past_steps_missing"] == 0
    assert all(found["met"].values())


@pytest.mark.parametrize(
    ("change", "missed"),
    [
        ({"slower": 1.2}, "step_time_ratio"),
        ({"slower": 1.05, "lost": 3}, "operators"),
        ({"slower": 1.05, "armed": 80.0}, "armed_ms_p99"),
    ],
)
def test_a_target_that_is_missed_is_said(change: dict[str, Any], missed: str, capture_file: Path) -> None:
    met = result(measured(**change), capture_file, clients=4)["met"]
    assert [name for name, is_met in met.items() if not is_met] == [missed]


def test_without_enough_alike_steps_nothing_is_compared(capture_file: Path) -> None:
    with pytest.raises(PrismError, match="nothing to compare"):
        result(measured(1.0), capture_file, clients=5)
