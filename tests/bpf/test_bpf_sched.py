"""The scheduler probe sees a sleep and a taken CPU, and agrees with the kernel's own accounting."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from latencyprism.bpf.sched import SWITCH_DTYPE, SchedProbe, to_spans, waits_within
from latencyprism.errors import BadInput

_BUSY = "while True: pass"
# First in first out: whenever it wakes, it takes the CPU from whoever is on it.
_HOG = """
import time
os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
while True:
    until = time.perf_counter() + 0.004
    while time.perf_counter() < until:
        pass
    time.sleep(0.006)
"""
_SLEEPY = "import time\nwhile True: time.sleep(0.02)"


def python(code: str, cpu: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", f"import os; os.sched_setaffinity(0, {{{cpu}}})\n{code}"])


def switch(**values: object) -> np.void:
    record = np.zeros(1, SWITCH_DTYPE)
    for name, value in values.items():
        record[name] = value
    return record


def test_a_preempted_thread_waits_in_the_run_queue() -> None:
    event = switch(
        on_ns=50, out_ns=100, in_ns=400, tid=7, tgid=7, comm=b"worker",
        after_pid=9, after_comm=b"hog", by_pid=9, by_comm=b"hog",
    )  # fmt: skip
    assert waits_within(event, 0, 1000) == {7: (300, 0)}
    assert waits_within(event, 200, 300) == {7: (100, 0)}
    on, queue = to_spans(event, on_cpu=True)
    assert (on.name, on.start_ns, on.end_ns) == ("on-CPU", 50, 100)
    assert (queue.name, queue.start_ns, queue.end_ns) == ("run-queue (after 9 hog)", 100, 400)
    assert queue.track == ("worker 7", "sched")
    assert dict(queue.details) == {"preempted_by": 9, "preempted_by_comm": "hog"}


def test_a_sleeper_is_off_the_cpu_until_it_is_woken() -> None:
    event = switch(out_ns=100, wake_ns=350, in_ns=400, tid=7, tgid=7, state=1, comm=b"worker")
    assert waits_within(event, 0, 1000) == {7: (50, 250)}
    assert [span.name for span in to_spans(event)] == ["off-CPU (waiting)", "run-queue (after idle)"]
    unseen = switch(out_ns=100, in_ns=400, tid=7, tgid=7, state=2, comm=b"worker")
    assert waits_within(unseen, 0, 1000) == {7: (0, 300)}
    assert [span.name for span in to_spans(unseen)] == ["off-CPU (uninterruptible)"]


def test_names_from_the_kernel_are_made_printable() -> None:
    event = switch(out_ns=1, in_ns=2, tid=7, comm=b"a\x1b[31m\xff", after_pid=3, after_comm=b"\n")
    (span,) = to_spans(event)
    assert span.track[0].isprintable() and span.name.isprintable()


def test_nonsense_targets_are_refused() -> None:
    for pids in ([], [0], [-1], range(1, 1000)):
        with pytest.raises(BadInput):
            SchedProbe(pids)


@pytest.mark.bpf
@pytest.mark.root
def test_an_induced_sleep_is_seen_as_off_cpu_time() -> None:
    with python(_SLEEPY, 0) as sleeper:
        try:
            time.sleep(0.3)
            with SchedProbe([sleeper.pid]) as probe:
                start_ns = time.monotonic_ns()
                time.sleep(0.5)
                end_ns = time.monotonic_ns()
                events = probe.stop()
            assert probe.lost == 0
            assert set(events["tgid"]) == {sleeper.pid}
            _, off_ns = waits_within(events, start_ns, end_ns)[sleeper.pid]
            sleeps = events[events["state"] != 0]
            assert len(sleeps) >= 5
            assert off_ns > 0.3 * (end_ns - start_ns)
            assert np.median(sleeps["wake_ns"] - sleeps["out_ns"]) == pytest.approx(20e6, rel=0.2)
        finally:
            sleeper.kill()


@pytest.mark.bpf
@pytest.mark.root
def test_a_neighbour_on_the_same_cpu_is_named_and_time_agrees_with_the_kernel() -> None:
    with python(_BUSY, 0) as victim, python(_HOG, 0) as hog:
        try:
            time.sleep(0.3)
            with SchedProbe([victim.pid]) as probe:
                before, start_ns = waited_ns(victim.pid), time.monotonic_ns()
                time.sleep(1.5)
                after, end_ns = waited_ns(victim.pid), time.monotonic_ns()
                events = probe.stop()
            queue_ns, off_ns = waits_within(events, start_ns, end_ns)[victim.pid]
            assert off_ns < 0.05 * queue_ns
            # A wait not over at either end is in one of the two accounts only.
            assert queue_ns == pytest.approx(after - before, rel=0.1, abs=30e6)
            queued = [span for span in to_spans(events) if span.name.startswith("run-queue")]
            assert hog.pid in {dict(span.details).get("preempted_by") for span in queued}
            assert any(span.name.startswith(f"run-queue (after {hog.pid} python") for span in queued)
        finally:
            victim.kill()
            hog.kill()


@pytest.mark.bpf
@pytest.mark.root
def test_own_process_is_only_seen_when_asked_for() -> None:
    with SchedProbe([1]) as probe:
        time.sleep(0.01)
        assert os.getpid() not in probe.read()["tgid"]
    with SchedProbe([os.getpid()]) as probe:
        time.sleep(0.01)
        assert os.getpid() in probe.read()["tgid"]
    assert len(probe.read()) == 0
    probe.stop()


def waited_ns(pid: int) -> int:
    """Run-queue time as /proc tells it."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1])
