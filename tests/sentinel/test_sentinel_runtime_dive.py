"""Calls into an accelerator's runtime are in the deep look, as spans and totals, and the probes go away."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from latencyprism.sentinel.below_watch import BelowWatch
from latencyprism.sentinel.runtime_dive import RuntimeDives

CALLER = """
import ctypes, sys, time
runtime = ctypes.CDLL(sys.argv[1])
p = ctypes.c_void_p
print("ready", flush=True)
while True:
    runtime.cudaStreamSynchronize(p(0x77))
    runtime.cudaGraphLaunch(p(0x1234), p(0x5678))
    time.sleep(0.002)
"""


@pytest.fixture
def caller() -> Iterator[int]:
    spec = find_spec("nvidia")
    places = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    found = [path for place in places for path in place.glob("*/lib/libcudart.so.1*")]
    if not found:
        pytest.skip("the wheel with CUDA's runtime is not installed")
    command = [sys.executable, "-c", CALLER, str(found[0])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "ready\n"
        try:
            yield process.pid
        finally:
            process.kill()


def until(condition: object, seconds: float = 20.0) -> None:
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.bpf
@pytest.mark.root
def test_calls_are_seen_while_deep_and_not_after_it(caller: int) -> None:
    watch = BelowWatch({caller: "engine"})
    try:
        until(lambda: not watch.runtimes._thread.is_alive())
        assert caller in watch.runtimes.libraries, watch.runtimes.missing
        begun_ns = time.monotonic_ns()
        watch.go_deep()
        time.sleep(1.0)
        watch.go_back()
        told = {call["symbol"]: call for call in watch.describe()["runtime_calls"]}
        assert told["cudaGraphLaunch"]["calls"] > 20 and told["cudaGraphLaunch"]["pid"] == caller
        assert told["cudaStreamSynchronize"]["library"] == "CUDA runtime"
        spans = watch.spans(begun_ns, time.monotonic_ns(), begun_ns)
        assert all(span.track[0].endswith(f" {caller}") for span in spans if span.track[-1] == "runtime")
        dive = watch._runtime
        assert dive is not None
        until(lambda: not dive._thread.is_alive())
    finally:
        watch.close()


@pytest.mark.bpf
@pytest.mark.root
def test_a_process_without_a_runtime_has_none() -> None:
    dives = RuntimeDives({os.getpid(): "engine"})
    until(lambda: not dives._thread.is_alive())
    if os.getpid() in dives.libraries:
        pytest.skip("this process maps an accelerator runtime")
    assert dives.begin() is None and dives.missing == []


def test_a_process_that_is_gone_is_told_and_ends_nothing() -> None:
    dives = RuntimeDives({1 << 22: "engine"})
    until(lambda: not dives._thread.is_alive())
    assert dives.begin() is None
    assert all(text.startswith("runtime calls: ") for text in dives.missing)
