"""The real CUDA runtime, without a device: symbols, how they begin, probes on them in a running process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest

from latencyprism.attach.maps import open_mapped
from latencyprism.bpf.features import measure_probe
from latencyprism.bpf.native import RETURN, NativeProbe, Point
from latencyprism.bpf.prices import Price, Prices
from latencyprism.errors import PrismError, TargetRefused
from latencyprism.xpu.runtime_calls import RuntimeProbe
from latencyprism.xpu.symbols import Mapped, find_libraries

LIBRARIES = {13: "cu13/lib/libcudart.so.13", 12: "cuda_runtime/lib/libcudart.so.12"}
CALLER = """
import ctypes, sys
runtime = ctypes.CDLL(sys.argv[1])
for name in ("cudaLaunchKernel", "cudaStreamSynchronize", "cudaMemcpyAsync", "cudaGraphLaunch"):
    getattr(runtime, name).restype = ctypes.c_int
p = ctypes.c_void_p
print("ready", flush=True)
for line in sys.stdin:
    for _ in range(int(line)):
        runtime.cudaStreamSynchronize(p(0x77))
        runtime.cudaGraphLaunch(p(0x1234), p(0x5678))
    print("done", flush=True)
"""


def library(version: int) -> str:
    spec = find_spec("nvidia")
    places = (
        [Path(place) / LIBRARIES[version] for place in (spec.submodule_search_locations or [])]
        if spec
        else []
    )
    found = next((str(place) for place in places if place.exists()), None)
    if found is None:
        pytest.skip(f"the wheel with CUDA's runtime {version} is not installed")
    return found


@contextmanager
def process(version: int) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", CALLER, library(version)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as caller:
        assert caller.stdout and caller.stdout.readline() == "ready\n"
        try:
            yield caller
        finally:
            caller.kill()


def runtime_of(pid: int) -> Mapped:
    return next(each for each in find_libraries(pid) if each.library.name == "CUDA runtime")


@pytest.mark.parametrize("version", sorted(LIBRARIES))
def test_every_listed_function_and_twin_is_in_the_real_library(version: int) -> None:
    with process(version) as caller:
        mapped = runtime_of(caller.pid)
    assert mapped.version == version and mapped.note is None
    listed = {name for function in mapped.library.functions for name in function.names}
    assert {symbol.name for symbol in mapped.symbols} == listed
    assert all(symbol.prologue for symbol in mapped.symbols)


@pytest.mark.bpf
@pytest.mark.root
@pytest.mark.parametrize("version", sorted(LIBRARIES))
def test_probes_see_every_call_with_its_arguments(version: int) -> None:
    try:
        measure_probe()
    except PrismError as error:
        pytest.skip(f"no uprobes here: {error}")
    with process(version) as caller:
        mapped = runtime_of(caller.pid)
        names = ["cudaStreamSynchronize", "cudaGraphLaunch"]
        points = [Point(name) for name in names] + [Point("cudaGraphLaunch", "hit_return")]
        file = open_mapped(caller.pid, mapped.mapping)
        try:
            probe = NativeProbe(caller.pid, [file], points)
        finally:
            os.close(file)
        try:
            assert caller.stdin and caller.stdout
            caller.stdin.write("200\n")
            caller.stdin.flush()
            assert caller.stdout.readline() == "done\n"
            hits = list(probe.read())
            assert probe.lost == 0
        finally:
            probe.close()
    waits = [hit for hit in hits if hit.point == 0]
    graphs = [hit for hit in hits if hit.point == 1]
    returns = [hit for hit in hits if hit.flags & RETURN]
    assert len(waits) == len(graphs) == len(returns) == 200
    assert all(hit.args[0] == 0x77 for hit in waits)
    assert all(hit.args == (0x1234, 0x5678) for hit in graphs)
    # Without a driver every call fails; what it says is the runtime's own.
    assert len({hit.args[0] & 0xFFFFFFFF for hit in returns} - {0}) == 1


@pytest.mark.bpf
@pytest.mark.root
def test_calls_are_timed_added_up_and_given_up_when_too_dear() -> None:
    try:
        measure_probe()
    except PrismError as error:
        pytest.skip(f"no uprobes here: {error}")
    with process(13) as caller:
        assert caller.stdin and caller.stdout
        dear = Prices({"push": Price(1e6, 1e6, 1e6)}, {})
        probe = RuntimeProbe(caller.pid, prices=dear, limit=0.05)
        try:
            caller.stdin.write("50\n")
            caller.stdin.flush()
            assert caller.stdout.readline() == "done\n"
            spans = probe.spans({caller.pid: ("engine", "main")})
            totals = {total.symbol: total for total in probe.totals() if total.calls}
            assert {name: total.calls for name, total in totals.items()} == {
                "cudaStreamSynchronize": 50, "cudaGraphLaunch": 50,
            }  # fmt: skip
            assert len(spans) == 100 and probe.lost == 0
            assert {span.track for span in spans} == {("engine", "main")}
            graph = [span for span in spans if span.name == "cudaGraphLaunch"]
            assert dict(graph[0].details) == {"library": "CUDA runtime", "kind": "graph"}
            took = sum(span.end_ns - span.start_ns for span in graph)
            assert took == totals["cudaGraphLaunch"].total_ns
            for _ in range(6):
                caller.stdin.write("200\n")
                caller.stdin.flush()
                assert caller.stdout.readline() == "done\n"
                time.sleep(0.11)
                probe.look(time.monotonic_ns())
            assert set(probe.given_up) == {"cudaStreamSynchronize", "cudaGraphLaunch"}
            assert probe.cost_share is not None and probe.cost_share < 0.05
        finally:
            probe.close()


def test_a_process_without_a_runtime_is_refused() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as plain:
        try:
            time.sleep(0.2)
            with pytest.raises(TargetRefused, match="maps no known runtime"):
                RuntimeProbe(plain.pid)
        finally:
            plain.kill()
