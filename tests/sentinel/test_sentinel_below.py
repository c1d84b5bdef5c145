"""A watched process seen from below: steps get their columns, captures their spans, nothing outlives it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from latencyprism.attach.process import read_process
from latencyprism.engines.discovery import Member, Replica
from latencyprism.errors import PrismError
from latencyprism.recorder.capture import read_capture
from latencyprism.records import Step, Window
from latencyprism.sentinel import below_watch
from latencyprism.sentinel.below_watch import BelowWatch, host_tid, socket_inodes, thread_name
from latencyprism.sentinel.incident_capture import IncidentCapture
from latencyprism.sentinel.replica_watch import ReplicaWatch
from latencyprism.sentinel.targets import Attachment

_SLEEPER = """
import threading, time
def loop():
    while True:
        time.sleep(0.02)
thread = threading.Thread(target=loop); thread.start()
print(thread.native_id, flush=True)
end = time.thread_time() + 60
while time.thread_time() < end: pass
"""


def _possible() -> str:
    try:
        BelowWatch({os.getpid(): "engine"}).close()
    except PrismError as error:
        return str(error)
    return ""


live = [pytest.mark.bpf, pytest.mark.root]


@pytest.fixture
def sleeper() -> Iterator[tuple[int, int]]:
    """(process, its thread that sleeps); the main thread spins."""
    if why := _possible():
        pytest.skip(why)
    with subprocess.Popen([sys.executable, "-c", _SLEEPER], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            yield process.pid, int(process.stdout.readline())
        finally:
            process.kill()


def steps_of(seconds: float, number: int) -> list[Step]:
    """Steps that last as long as it took to make them."""
    made = []
    for index in range(number):
        start = time.monotonic_ns()
        time.sleep(seconds)
        made.append(Step("engine", 0, 0, index, start, time.monotonic_ns()))
    return made


class TestLive:
    pytestmark = live

    def test_steps_get_what_their_thread_waited_for(self, sleeper: tuple[int, int]) -> None:
        pid, thread = sleeper
        watch = BelowWatch({pid: "engine"})
        try:
            assert all(step.offcpu_ns is not None for step in watch.fill(steps_of(0.05, 2)))
            watch.fill(steps_of(0.01, 1), [(pid, thread)])  # from here on that thread is the loop
            filled = watch.fill(steps_of(0.1, 3), [(pid, thread)])
            for step in filled:
                assert step.offcpu_ns is not None and step.runqueue_ns is not None
                waited = step.offcpu_ns + step.runqueue_ns
                assert waited == pytest.approx(step.duration_ns, rel=0.25)
                assert step.throttled_ns == step.major_faults == 0
        finally:
            watch.close()

    def test_steps_from_before_the_loop_was_known_stay_null(self, sleeper: tuple[int, int]) -> None:
        pid, thread = sleeper
        watch = BelowWatch({pid: "engine"})
        try:
            (step,) = watch.fill(steps_of(0.01, 1), [(pid, thread)])
            assert step.offcpu_ns is None and step.runqueue_ns is None and step.major_faults is None
        finally:
            watch.close()

    def test_the_api_server_is_looked_at_while_a_capture_is_open(self, sleeper: tuple[int, int]) -> None:
        pid, thread = sleeper
        watch = BelowWatch({os.getpid(): "engine", pid: "API server"})
        try:
            time.sleep(0.1)
            watch.drain()
            assert not np.any(watch.intervals(0, 1 << 62)["tgid"] == pid)
            watch.go_deep()
            begun_ns = time.monotonic_ns()
            time.sleep(0.15)
            watch.drain()
            found = watch.spans(begun_ns, time.monotonic_ns(), begun_ns)
            assert any(span.track[0].endswith(f" {thread}") for span in found)
            watch.go_back()
            time.sleep(0.05)
            watch.drain()
            before = len(watch.intervals(0, 1 << 62))
            time.sleep(0.1)
            watch.drain()
            later = watch.intervals(0, 1 << 62)[before:]
            assert not np.any(later["tgid"] == pid)
        finally:
            watch.close()

    def test_captures_get_spans_deeper_while_they_are_open(self, sleeper: tuple[int, int]) -> None:
        pid, thread = sleeper
        watch = BelowWatch({pid: "engine"})
        try:
            begun = time.monotonic_ns()
            time.sleep(0.1)
            watch.drain()
            deep = time.monotonic_ns()
            watch.go_deep()
            watch.go_deep()
            time.sleep(0.5)
            watch.go_back()
            assert "syscalls" in watch.probe.attached
            watch.go_back()
            assert "syscalls" not in watch.probe.attached
            watch.drain()
            spans = watch.spans(begun, time.monotonic_ns(), deep)
        finally:
            watch.close()
        mine = [span for span in spans if span.track[0].endswith(f" {thread}")]
        assert "off-CPU (sleep)" in {span.name for span in mine}
        assert min(span.end_ns for span in mine) >= deep  # it is no thread that steps wait for
        sleeps = [span for span in mine if span.name == "off-CPU (sleep)"]
        assert sleeps[0].end_ns - sleeps[0].start_ns == pytest.approx(20e6, rel=0.2)

    def test_what_was_given_up_for_the_budget_makes_columns_null(
        self, sleeper: tuple[int, int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(below_watch, "_prices", lambda: {"switch": 1e12})
        pid, _ = sleeper
        watch = BelowWatch({pid: "engine"})
        try:
            for second in range(6):
                watch.tick(time.monotonic_ns() + second * 2_100_000_000)
                time.sleep(0.05)
            assert "scheduler" not in watch.probe.attached
            assert any("budget" in text for text in watch.missing)
            (step,) = watch.fill(steps_of(0.01, 1))
            assert step.runqueue_ns is None
            assert "scheduler" not in watch.describe()["attached"]
        finally:
            watch.close()

    def test_the_estimate_can_be_read(self, sleeper: tuple[int, int]) -> None:
        watch = BelowWatch({sleeper[0]: "engine"})
        try:
            assert watch.describe()["estimated_share"] is None
            for second in range(2):
                watch.tick(time.monotonic_ns() + second * 2_100_000_000)
                time.sleep(0.1)
            share = watch.describe()["estimated_share"]
            assert share is not None and 0 < share < 0.05
        finally:
            watch.close()


def test_threads_sockets_and_names_of_a_process() -> None:
    import socket

    own = threading.get_native_id()
    assert host_tid(os.getpid(), own) == own
    assert thread_name(own) != "?" and thread_name(1 << 22) == "?"
    with socket.socket() as opened:
        assert os.fstat(opened.fileno()).st_ino in socket_inodes([os.getpid()])
    assert socket_inodes([1 << 22]) == frozenset()


class Stepping:
    """A source that hands out steps it made itself."""

    engine, lost = "vllm", 0

    def __init__(self, pid: int, thread: int) -> None:
        self.pids, self.step_threads = (pid,), ((pid, thread),)
        self.made: list[Step] = []

    def fileno(self) -> None:
        return None

    def poll(self) -> Window:
        steps, self.made = self.made, []
        return Window(steps)

    def settle(self) -> bool:
        return True

    def wake_beyond(self, usual: object) -> None: ...

    def wake_late(self, typical_1024: int, spare_ns: int) -> bool:
        return False

    def renew(self) -> None: ...

    def arm_deep(self, seconds: float) -> None: ...

    def detached(self) -> None:
        return None

    def close(self) -> None: ...


@pytest.mark.bpf
@pytest.mark.root
def test_a_capture_holds_the_waits_and_says_what_they_cost(sleeper: tuple[int, int], tmp_path: Path) -> None:
    pid, thread = sleeper
    source = Stepping(pid, thread)
    replica = Replica("vllm", 0, (Member(read_process(pid), "engine"),), "0.0")
    watch = ReplicaWatch(Attachment(replica, source, [], None))
    try:
        assert watch.below is not None
        for _ in range(5):
            source.made = steps_of(0.1, 1)
            watch.poll()
        capture = IncidentCapture(watch, None, tmp_path / "capture.pftrace", after_s=1.0)
        assert "syscalls" in watch.below.probe.attached
        source.made = steps_of(0.8, 1)
        watch.poll()
        watch.sample_host(time.monotonic_ns())
        capture.step(time.monotonic_ns())
        capture.abandon()
        assert capture.result is not None and not capture.result.get("error"), capture.result
        assert "syscalls" not in watch.below.probe.attached
    finally:
        watch.close()
    found = read_capture(tmp_path / "capture.pftrace")
    assert found.meta["below"]["lost"] == 0 and "scheduler" in found.meta["below"]["attached"]
    calls = {(c["tid"], c["syscall"]): c for c in found.meta["below"]["syscalls"]}
    assert calls[thread, "clock_nanosleep"]["calls"] >= 1
    assert calls[thread, "clock_nanosleep"]["longest_ms"] > 19
    mine = [span for span in found.spans if span.track[0].endswith(f" {thread}")]
    sleeps = [span for span in mine if span.name == "off-CPU (sleep)"]
    # From before the capture was begun, because steps wait for this thread.
    assert len(sleeps) >= 5 and sleeps[0].start_ns < capture.begun_ns - 50_000_000
    assert found.steps[-1].offcpu_ns is not None and found.steps[-1].offcpu_ns > 50_000_000
