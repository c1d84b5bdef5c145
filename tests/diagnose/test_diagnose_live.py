"""The whole way with real disturbances: a small loop process, the host sampler, an injection, a verdict."""

import os
import subprocess
import sys
import threading
import time

import pytest

from latencyprism import inject
from latencyprism.diagnose import localise
from latencyprism.host import HostSampler, Neighbours
from latencyprism.records import Step, Window

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]

LOOP = """
import os, sys, time
os.sched_setaffinity(0, {0})
number = 0
while True:
    start = time.monotonic_ns()
    for _ in range(20):
        sum(range(20000))
    number += 1
    os.write(1, b"%d %d %d\\n" % (number, start, time.monotonic_ns()))
    time.sleep(0.001)
"""
REFERENCE_S, SUSPECT_S = 12.0, 4.0


class Watch:
    """Steps as the loop reports them; counters ten times a second, neighbours twice."""

    def __init__(self, process):
        self.process, self.roles = process, {process.pid: "Worker"}
        self.steps, self.lock = [], threading.Lock()
        self.sampler, self.neighbours = HostSampler(self.roles), Neighbours(exclude=[process.pid])
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self.process.stdout:
            number, start, end = (int(word) for word in line.split())
            with self.lock:
                self.steps.append(Step("loop", 0, 0, number, start, end, "decode", decode_tokens=1))

    def window(self, seconds):
        out = Window()
        begin = time.monotonic_ns()
        tick = 0
        while time.monotonic_ns() < begin + seconds * 1e9:
            now = time.monotonic_ns()
            out.counters += self.sampler.sample(now)
            if tick % 5 == 0:
                out.counters += self.neighbours.counters(now)
            tick += 1
            time.sleep(0.1)
        with self.lock:
            out.steps = [step for step in self.steps if step.start_ns >= begin]
        return out

    def verdict(self, reference, suspect):
        return localise(reference, suspect, roles=self.roles, not_available=self.sampler.not_available)


@pytest.fixture(scope="module")
def loop():
    process = subprocess.Popen([sys.executable, "-c", LOOP], stdout=subprocess.PIPE)
    # On one core, as engines are placed: a loop that may move away from its neighbour is not disturbed by it.
    os.sched_setaffinity(process.pid, {max(os.sched_getaffinity(0))})
    try:
        watch = Watch(process)
        time.sleep(0.5)
        yield watch, watch.window(REFERENCE_S)
        watch.sampler.close()
    finally:
        process.kill()
        process.wait()


def disturbed(loop, cause, strength=None, **options):
    """The verdict over a window that lies wholly within an injection, and that injection."""
    watch, reference = loop
    with inject.start(cause, watch.process.pid, strength, 30.0, **options) as injection:
        time.sleep(0.3)
        suspect = watch.window(SUSPECT_S)
    effect = injection.effect_check()
    if not effect.effective:
        pytest.xfail(f"the injection had no effect: {effect.text}")
    return watch.verdict(reference, suspect), injection


def contention(window):
    """Waiting for a CPU per time on it, of the loop's main thread."""
    grown = {}
    for name in ("cpu_ns", "runqueue_ns"):
        values = [c.value for c in window.counters if c.name == name and c.track[-1] != "process"]
        grown[name] = values[-1] - values[0]
    return grown["runqueue_ns"] / max(grown["cpu_ns"], 1)


def test_a_neighbour_is_named_with_its_pid(loop):
    if contention(loop[1]) > 0.3:
        pytest.xfail("this machine is full of neighbours already: one more is not to be told from them")
    verdict, injection = disturbed(loop, "cpu.neighbour", 1.5)
    assert verdict.cause == "cpu.neighbour", verdict
    culprit = next(each for each in verdict.evidence if each.signal == "culprit")
    assert f"process {injection.helper_pids[0]} " in culprit.text


def test_a_stopped_process_is_named(loop):
    verdict, _ = disturbed(loop, "peer.stalled", stop_ms=100, every_s=0.5)
    assert verdict.cause == "peer.stalled", verdict


def test_a_quota_is_named(loop):
    if contention(loop[1]) > 1.0:
        pytest.xfail("this machine is full of neighbours: the target has no CPU that a quota could take away")
    verdict, _ = disturbed(loop, "cpu.quota", 3.0)
    assert verdict.cause == "cpu.quota", verdict


def test_without_a_disturbance_the_injected_causes_are_not_named(loop):
    watch, reference = loop
    verdict = watch.verdict(reference, watch.window(SUSPECT_S))
    # Others may use this machine while the test runs: a neighbour may be real, these cannot be.
    assert verdict.cause not in ("peer.stalled", "cpu.quota"), verdict
