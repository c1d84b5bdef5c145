"""Disturbances from within: they take effect, end with their lease, and leave nothing in the target."""

import os
import signal
import subprocess
import sys
import time

import pytest

from latencyprism import inject
from latencyprism.attach import footprint
from latencyprism.attach.inject import Injector
from latencyprism.bench import attaching
from latencyprism.errors import BadInput, TargetRefused

pytestmark = [
    pytest.mark.root,
    pytest.mark.attach_safety,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs the right to ptrace"),
]

# An engine in small: a step every few ms, by Python, with a queue that each step looks into.
ENGINE = """
import asyncio, gc, hashlib, logging, mmap, os, queue, sys, threading, time
class Tokenizer:
    def encode(self, length): return list(range(length))
class Engine:
    def __init__(self):
        self.input_queue = queue.Queue()
        self.steps = 0
    def run(self):
        tokenizer = Tokenizer()
        mine = locals()
        while True:
            self.input_queue.empty()
            tokenizer.encode(8)
            end = time.thread_time_ns() + 2_000_000
            while time.thread_time_ns() < end: pass
            time.sleep(0.001)
            self.steps += 1
            assert mine["tokenizer"] is tokenizer  # nobody empties what it holds itself
async def serve():
    while True: await asyncio.sleep(0.005)
logging.basicConfig(stream=open(os.devnull, "w"))
threading.Thread(target=asyncio.run, args=(serve(),), daemon=True).start()
print("ready", flush=True)
Engine().run()
"""


class Target:
    def __init__(self, python, engine=ENGINE):
        self.process = subprocess.Popen([python, "-c", engine], stdout=subprocess.PIPE)
        assert self.process.stdout.readline() == b"ready\n"
        self.pid = self.process.pid
        self.injector = Injector(self.pid)
        footprint.take(self.injector, ())
        self.before = footprint.take(self.injector, ())

    def left(self):
        """What differs from before, once the tenant's thread has ended."""
        end = time.monotonic() + 15
        while True:
            left = footprint.take(self.injector, ()).left_since(self.before)
            if not left or time.monotonic() > end:
                return left


@pytest.fixture
def target(request):
    python = getattr(request, "param", None) or sys.executable
    begun = Target(python)
    yield begun
    begun.process.kill()
    begun.process.communicate()


def versions():
    found = attaching.find_pythons()
    return [
        pytest.param(
            found.get(version),
            id=version,
            marks=[] if version in found else pytest.mark.skip(f"no Python {version} on this machine"),
        )
        for version in attaching.VERSIONS
    ]


SHARED = ["python.gil", "python.gc", "python.lock", "log.flood", "engine.event_loop"]


@pytest.mark.parametrize("cause", SHARED)
def test_it_takes_effect_and_leaves_nothing(target, cause):
    begun_ns = time.monotonic_ns()
    with inject.start(cause, target.pid, 0.5, 2.0) as injection:
        injection.wait()
    effect, truth = injection.effect_check(), injection.truth()
    assert effect.asked == pytest.approx(1 / 3)
    assert 0.25 * effect.asked < effect.measured < 1.5 * effect.asked, effect.text
    assert len(truth) == 1 and begun_ns < truth[0].start_ns < truth[0].end_ns <= time.monotonic_ns()
    assert 1e9 < truth[0].end_ns - truth[0].start_ns < 3e9
    assert target.left() == []


@pytest.mark.parametrize("cause", SHARED)
def test_a_stronger_one_does_more(target, cause):
    measured = []
    for strength in (0.1, 1.0):
        with inject.start(cause, target.pid, strength, 1.5) as injection:
            injection.wait()
        measured.append(injection.effect_check().measured)
    assert 0 < measured[0] * 1.5 < measured[1]


@pytest.mark.parametrize("target", versions(), indirect=True)
def test_every_interpreter_is_left_as_it_was(target):
    with inject.start("python.gil", target.pid, 0.2, 30.0):
        time.sleep(0.3)
    assert target.left() == []
    assert target.process.poll() is None


INJECTOR = """
import sys, time
from latencyprism import inject
with inject.start(sys.argv[2], int(sys.argv[1]), 0.5, 60, i_know=True) as injection:
    print(*injection.helper_pids, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("victims", ["injector", "both"])
def test_it_ends_when_the_injector_is_killed(target, victims):
    """With the process that renews the lease, too: then the lease runs out."""
    words = [sys.executable, "-c", INJECTOR, str(target.pid), "python.gil"]
    injector = subprocess.Popen(words, stdout=subprocess.PIPE)
    lessee = int(injector.stdout.readline())
    time.sleep(0.3)
    assert footprint.from_outside(target.pid)["status Threads"] != target.before.outside["status Threads"]
    if victims == "both":
        os.kill(lessee, signal.SIGKILL)
    injector.kill()
    injector.wait()
    injector.stdout.close()
    assert target.left() == []
    assert target.process.poll() is None


def test_slow_calls_are_counted_and_the_method_is_put_back(target):
    place = {"at": "__main__:Tokenizer.encode", "reference_ms": 2.0}
    with inject.start("engine.tokenizer", target.pid, 0.5, 1.5, **place) as injection:
        injection.wait()
    effect = injection.effect_check()
    (report,) = [one for one in injection._reports() if "harm_ns" in one]
    assert effect.effective and effect.measured > 20
    assert report["harm_ns"] == pytest.approx(effect.measured * 1e6, rel=0.1)
    assert target.left() == []
    owners = [("__main__", "Tokenizer")]
    before = footprint.take(target.injector, owners)
    with inject.start("engine.tokenizer", target.pid, 0.5, 30.0, **place):
        time.sleep(0.3)
        told = footprint.take(target.injector, owners).left_since(before)
        assert "attribute Tokenizer.encode: changed" in told
    time.sleep(0.3)
    assert footprint.take(target.injector, owners).left_since(before) == []


@pytest.mark.parametrize(
    ("cause", "options", "why"),
    [
        ("engine.tokenizer", {}, "it has none of"),
        ("engine.tokenizer", {"at": "__main__:Engine.no_such"}, "it has none of"),
        ("python.lock", {}, "a lock or a queue in sight"),
        ("log.flood", {}, "has a handler"),
        ("engine.event_loop", {}, "no event loop runs"),
    ],
)
def test_what_is_not_there_is_said_and_nothing_is_left(cause, options, why):
    bare = Target(sys.executable, "import asyncio, logging, mmap, threading, time\n"
                  "threading.Thread(target=int).start()\nprint('ready', flush=True)\n"
                  "while True: time.sleep(0.01)")  # fmt: skip
    try:
        with pytest.raises(TargetRefused, match=why):
            inject.start(cause, bare.pid, **options)
        assert bare.left() == []
    finally:
        bare.process.kill()
        bare.process.communicate()


@pytest.mark.parametrize("at", ["", "x", "a:b", "a:b.c.d;e", "os:system", "a b:c.d"])
def test_a_place_that_is_none_is_bad_input(target, at):
    with pytest.raises(BadInput):
        inject.start("engine.tokenizer", target.pid, at=at)


def test_a_log_that_nobody_reads_does_not_hang_the_target():
    full = ENGINE.replace('open(os.devnull, "w")', "os.fdopen(os.pipe()[1], 'w')")
    flooded = Target(sys.executable, full)
    try:
        with inject.start("log.flood", flooded.pid, 0.5, 1.5) as injection:
            injection.wait()
        assert injection._reports()[-1]["gone"] and 0 < injection._reports()[-1]["count"] < 1000
        assert flooded.left() == []
    finally:
        flooded.process.kill()
        flooded.process.communicate()


def test_a_second_thread_wants_the_cpu_of_a_target_on_one_thread(target):
    with inject.start("cpu.oversubscription", target.pid, 0.5, 2.0) as injection:
        injection.wait()
    effect = injection.effect_check()
    assert 0 < effect.measured < 1.5 * effect.asked and "a thread of its own" in effect.text
    assert target.left() == []


FORKING = ENGINE.replace(
    "            self.steps += 1",
    """            self.steps += 1
            if self.steps % 3 == 0:
                child = os.fork()
                if child == 0:
                    began = time.thread_time_ns()
                    for _ in range(5): tokenizer.encode(8)
                    os._exit(0 if time.thread_time_ns() - began < 20_000_000 else 1)
                assert os.waitpid(child, 0)[1] == 0""",
)


def test_a_forked_child_is_not_disturbed():
    """Each of five calls would take 20 ms there; the target ends if a child was slow or stuck."""
    forking = Target(sys.executable, FORKING)
    try:
        place = {"at": "__main__:Tokenizer.encode", "reference_ms": 20.0}
        with inject.start("engine.tokenizer", forking.pid, 1.0, 2.5, **place) as injection:
            injection.wait()
        assert injection.effect_check().measured > 4
        assert forking.process.poll() is None and forking.left() == []
    finally:
        forking.process.kill()
        forking.process.communicate()


def test_two_causes_at_once_both_end(target):
    with (
        inject.start("python.gil", target.pid, 0.1, 1.0) as one,
        inject.start("python.gc", target.pid, 0.1, 1.0) as other,
    ):
        one.wait()
        other.wait()
    assert one.truth() and other.truth()
    assert target.left() == []


def test_the_target_may_end_meanwhile(target):
    with inject.start("python.gil", target.pid, 0.5, 30.0) as injection:
        time.sleep(0.5)
        target.process.kill()
        target.process.wait()
        time.sleep(0.2)
    assert "has not said that it is gone" in injection.effect_check().text


def test_a_process_without_python_is_refused():
    process = subprocess.Popen(["/bin/sleep", "60"])
    try:
        with pytest.raises(TargetRefused):
            inject.start("python.gil", process.pid)
        with pytest.raises(TargetRefused, match="a second thread cannot be put into it"):
            inject.start("cpu.oversubscription", process.pid)
    finally:
        process.kill()
        process.wait()


def test_a_stranger_is_refused(target):
    words = [sys.executable, "-m", "latencyprism", "inject", "python.gil", "-p", str(target.pid)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 3 and "--i-know" in done.stderr and "Traceback" not in done.stderr
