"""A rank of a real engine that is stopped now and then is the one that the other one waited for."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from latencyprism.engines.discovery import discover
from latencyprism.faces import story
from latencyprism.lab.install import EngineUnavailable
from latencyprism.lab.launch import Options
from latencyprism.lab.load import Load
from latencyprism.lab.profiles import profile
from latencyprism.lab.serve import Server, start
from latencyprism.recorder import Capture, read_capture
from latencyprism.records import Step
from latencyprism.sentinel import below_watch
from latencyprism.sentinel.incident_capture import IncidentCapture
from latencyprism.sentinel.priority import OnTime, start_alike
from latencyprism.sentinel.replica_watch import ReplicaWatch
from latencyprism.sentinel.targets import attach

pytestmark = [pytest.mark.engine, pytest.mark.root]

LAYERS = 4
"""Of the tiny model: each has two reductions, the embedding one, and the logits are gathered."""
WINDOW_S, STOP_S, PERIOD_S, STOPS = 8.0, 0.03, 0.1, 30
Stretch = tuple[int, int]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("no control group: two ranks that spin need two cores")
    options = Options(
        environ={"VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[1]}"},
        arguments=("--tensor-parallel-size", "2"),
    )
    try:
        started = start("vllm", options)
    except EngineUnavailable as missing:
        pytest.skip(f"engine unavailable: {missing.reason}")
    with started:
        yield started


def recorded(server: Server, stopped: int, path: Path, load: Load) -> tuple[Capture, list[Stretch]]:
    """A capture with a deep window in which process ``stopped`` was stopped, and when that was. The load ends
    before it is written, which is quicker so."""
    stops: list[Stretch] = []
    below_watch.prepare()
    watch = ReplicaWatch(attach(discover(server.pid)[0], print, budget_ppm=50_000), horizon_s=60.0)
    # As a watch: beside three processes that spin on two cores an ordinary one waits for seconds.
    with OnTime():
        return _recorded(watch, stopped, path, load, stops), stops


def _recorded(watch: ReplicaWatch, stopped: int, path: Path, load: Load, stops: list[Stretch]) -> Capture:
    try:
        assert watch.operators is not None
        watch.operators.wait_ready(30.0)
        capture = IncidentCapture(watch, None, path, after_s=WINDOW_S)
        assert capture.operators is not None
        # A thread of its own: reading what the deep probes see takes this one tenths of a second at times.
        stopping = threading.Thread(target=stop_often, args=(stopped, capture, stops))
        start_alike(stopping)
        next_slow = 0.0
        while (now := time.monotonic_ns()) < capture.until_ns:
            watch.settle()
            time.sleep(0.05)
            watch.poll()
            if now / 1e9 >= next_slow:
                next_slow = now / 1e9 + 0.2
                watch.sample_host(now)
                watch.attachment.source.renew()
                capture.step(now)
        stopping.join()
        watch.poll()  # as a watch does before each look at its captures
        load.stop()
        capture.abandon(120.0)
    finally:
        watch.close()
    assert capture.result is not None and not capture.result.get("error"), capture.result
    return read_capture(path)


def stop_often(pid: int, capture: IncidentCapture, stops: list[Stretch]) -> None:
    """Once both ranks' operators are seen, until shortly before the end."""
    assert capture.operators is not None
    while len(stops) < STOPS and time.monotonic_ns() < capture.until_ns - 300_000_000:
        if len(capture.operators.armed_ms) == 2:
            stops.append(stop(pid))
        time.sleep(PERIOD_S)


def stop(pid: int) -> Stretch:
    begun_ns = time.monotonic_ns()
    os.kill(pid, signal.SIGSTOP)
    try:
        time.sleep(STOP_S)
    finally:
        os.kill(pid, signal.SIGCONT)
    return begun_ns, time.monotonic_ns()


def waited_meanwhile(capture: Capture, stops: Sequence[Stretch]) -> dict[str, int]:
    """For whom others waited while a rank was stopped, ns."""
    waited: dict[str, int] = defaultdict(int)
    for span in capture.spans:
        told = dict(span.details)
        if span.track[-1] == "collectives" and "waited_for" in told:
            until_ns = span.start_ns + int(told["waited_ns"])
            for begun_ns, ended_ns in stops:
                waited[str(told["waited_for"])] += max(
                    0, min(until_ns, ended_ns) - max(span.start_ns, begun_ns)
                )
    return waited


def steps_beside(capture: Capture) -> list[Step]:
    """Steps within the time in which collectives were seen."""
    parts = [span for span in capture.spans if span.track[-1] == "collectives"]
    since_ns = min(span.start_ns for span in parts)
    until_ns = max(span.end_ns for span in parts)
    return [step for step in capture.steps if since_ns <= step.start_ns and step.end_ns <= until_ns]


def test_the_rank_that_was_stopped_is_the_one_that_the_other_waited_for(
    server: Server, tmp_path: Path
) -> None:
    roles = server.roles
    first, second = f"Worker {roles['worker']}", f"Worker 1 {roles['worker1']}"
    with Load(server, profile("decode").but(duration_s=120, clients=2)) as load:
        time.sleep(0.5)
        capture, stops = recorded(server, roles["worker1"], tmp_path / "a.pftrace", load)
        assert load.result().summary()["failed"] == 0
    assert capture.notices == []
    assert len(stops) > 5, capture.meta["not_available"]
    (told,) = capture.meta["collectives"]
    assert told["size"] == 2 and told["processes"] == {"0": first, "1": second}
    assert told["joined"] > 0.8 * told["operations"] > 0 and told["link_us"] > 0
    waited, stopped_ns = waited_meanwhile(capture, stops), sum(end - begun for begun, end in stops)
    assert waited[second] > 0.4 * stopped_ns and waited[second] > 2 * waited[first]
    assert told["ranks"][0]["rank"] == 1
    words = "\n".join(story.tell(capture, "a.pftrace", 0))
    assert f"rank 1 ({second}) came last in " in words
    seen = [step for step in capture.steps if step.collective_ns is not None]
    if capture.meta["operators"]["lost"]:
        assert not seen, "what was lost may have been a collective"
    # On two cores that three processes spin on, this one may be kept off them for seconds, and the probe's
    # ring then goes round: steps of the window are missing, and with them what would be filled in.
    elif len(steps_beside(capture)) > 40:
        assert len(seen) > 20, capture.meta["not_available"]
    odd = [s for s in seen if not (0 if not s.requests else 1) <= (s.collective_ns or 0) < s.duration_ns]
    assert not odd, "within the step, and none only where nothing was run"
    per_step = defaultdict(int)
    for span in capture.spans:
        if span.track == (first, "collectives"):
            per_step[span.step] += 1
    assert {per_step[step.step] for step in seen if step.requests} <= {2 * LAYERS + 2}
