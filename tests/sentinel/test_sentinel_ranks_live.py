"""vLLM with two tensor-parallel workers: their runs pair, and an alert names the one that was held, or none.

It takes two minutes on two cores, most of them to start: only with LATENCYPRISM_TENSOR_PARALLEL=1.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from latencyprism.engines.discovery import discover
from latencyprism.lab.install import EngineUnavailable
from latencyprism.lab.launch import Options
from latencyprism.lab.load import Load
from latencyprism.lab.profiles import Length, Profile
from latencyprism.lab.serve import Server, start
from latencyprism.records import Alert
from latencyprism.sentinel.replica_watch import ReplicaWatch
from latencyprism.sentinel.targets import attach

pytestmark = pytest.mark.skipif(
    os.environ.get("LATENCYPRISM_TENSOR_PARALLEL") != "1", reason="only with LATENCYPRISM_TENSOR_PARALLEL=1"
)
STEADY = Profile("steady", clients=4, prompt=Length(40), output=Length(200), duration_s=45.0)
HELD_S = 0.5


@pytest.fixture
def server() -> Iterator[Server]:
    cores = sorted(os.sched_getaffinity(0))
    each = "|".join(str(cores[rank % len(cores)]) for rank in range(2))
    options = Options(arguments=("--tensor-parallel-size", "2"), environ={"VLLM_CPU_OMP_THREADS_BIND": each})
    try:
        made = start("vllm", options, ready_s=280)
    except EngineUnavailable as missing:
        pytest.skip(f"engine unavailable: {missing.reason}")
    try:
        yield made
    finally:
        made.stop()


def watched(watch: ReplicaWatch, seconds: float) -> list[Alert]:
    found = []
    until = time.monotonic() + seconds
    renew_at = 0.0
    while time.monotonic() < until:
        time.sleep(0.02)
        if time.monotonic() >= renew_at:
            renew_at = time.monotonic() + 0.5
            watch.attachment.source.renew()
        found += watch.poll()[1]
    return found


def test_the_worker_that_was_held_is_named(server: Server) -> None:
    (replica,) = discover(server.pid)
    held = next(member for member in replica.members if member.role == "worker" and member.rank == 1)
    load = Load(server, STEADY).start()
    watch = ReplicaWatch(attach(replica))
    try:
        ranks = watch._ranks
        assert ranks is not None
        watched(watch, 8.0)
        steps = watch.counts.steps
        assert steps > 50
        alerts = []
        for _ in range(4):
            os.kill(held.pid, signal.SIGSTOP)
            try:
                time.sleep(HELD_S)
            finally:
                os.kill(held.pid, signal.SIGCONT)
            alerts += watched(watch, 1.0)
        late = [alert for alert in alerts if alert.observed_ms >= 0.8 * HELD_S * 1e3]
        print(steps, ranks._groups.dropped, [(a.kind, a.rank, a.where, a.text) for a in alerts])
        assert late
        # Held before it began it is named; between collectives all grow alike, and that is said.
        unknown = ("all ranks: execute_model", "workers: execute_model")
        assert all(a.rank == 1 or a.where in unknown for a in late), late
        assert ranks._groups.dropped <= 2
    finally:
        watch.close()
        load.stop()
