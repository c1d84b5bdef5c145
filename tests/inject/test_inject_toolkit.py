"""Injections: bounded, undone however they end, refused where they must be, truthful about their effect."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from latencyprism import inject
from latencyprism.cli import inject as verb
from latencyprism.errors import BadInput, PrismError, TargetRefused
from latencyprism.host.processes import parse_stat, process_cpu_ns
from latencyprism.inject import burners, crowding
from latencyprism.inject.target import ancestors

SPIN = "import os; os.sched_setaffinity(0, {0})\nwhile True: pass"

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def state(pid):
    with open(f"/proc/{pid}/stat", "rb") as file:
        return parse_stat(file.read())[1][0].decode()


def wait_for(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.005)
    return False


def alive(pid):
    try:
        return state(pid) not in "ZX"
    except (OSError, TypeError):
        return False


def children(pid):
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            return [int(word) for word in file.read().split()]
    except OSError:
        return []


@pytest.fixture
def target():
    process = subprocess.Popen([sys.executable, "-c", SPIN])
    time.sleep(0.2)
    yield process
    process.kill()
    process.wait()


@pytest.mark.root
@needs_root
def test_neighbour_takes_its_share_and_no_more_time_than_allowed(target):
    begun = time.monotonic()
    with inject.start("cpu.neighbour", target.pid, 1.0, 1.5) as injection:
        injection.wait()
    assert time.monotonic() - begun < 3.0
    effect, truth = injection.effect_check(), injection.truth()
    assert effect.effective and effect.measured == pytest.approx(0.5, abs=0.15)
    assert len(truth) == 1
    assert injection.started_ns <= truth[0].start_ns < truth[0].end_ns <= time.monotonic_ns()
    assert truth[0].end_ns - truth[0].start_ns == pytest.approx(1.5e9, rel=0.2)


@pytest.mark.root
@needs_root
def test_neighbour_slows_its_target(target):
    def speed(seconds):
        before = process_cpu_ns(target.pid)
        time.sleep(seconds)
        return (process_cpu_ns(target.pid) - before) / seconds / 1e9

    alone = speed(0.6)
    with inject.start("cpu.neighbour", target.pid, 2.5, 5):
        time.sleep(0.2)
        beside = speed(0.6)
    assert beside < 0.7 * alone


def test_leaving_the_context_ends_the_helpers(target):
    with inject.start("cpu.neighbour", target.pid, 0.2, 60) as injection:
        helpers = injection.helper_pids
        assert wait_for(lambda: injection._helpers[0].reports)
    assert not any(alive(pid) for pid in helpers)


def test_plain_neighbours_are_used_where_realtime_is_not_permitted(target, monkeypatch):
    monkeypatch.setattr(burners, "_realtime_permitted", lambda: False)
    with inject.start("cpu.neighbour", target.pid, 0.3, 1) as injection:
        injection.wait()
    assert len(injection.helper_pids) == 3
    assert "plain" in injection.effect_check().text


def test_stops_are_counted_and_undone(target):
    with inject.start("peer.stalled", target.pid, duration_s=1.6, stop_ms=50, every_s=0.4) as injection:
        injection.wait()
    truth, effect = injection.truth(), injection.effect_check()
    assert 2 <= len(truth) <= 4 and effect.measured == len(truth)
    assert all(45e6 < stop.end_ns - stop.start_ns < 400e6 for stop in truth)
    assert state(target.pid) != "T"


def test_a_stopped_target_goes_on_when_the_context_is_left(target):
    with inject.start("peer.stalled", target.pid, duration_s=60, stop_ms=5000, every_s=10):
        assert wait_for(lambda: state(target.pid) == "T", 8)
    assert wait_for(lambda: state(target.pid) != "T", 1)


INJECTOR = """
import sys, time
from latencyprism import inject
pid = int(sys.argv[1])
with inject.start("peer.stalled", pid, duration_s=60, stop_ms=4500, every_s=9, i_know=True) as injection:
    print(*injection.helper_pids, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def stopped(target):
    """An injector process, its holder's keeper and actor, with the target stopped."""
    injector = subprocess.Popen([sys.executable, "-c", INJECTOR, str(target.pid)], stdout=subprocess.PIPE)
    keeper = int(injector.stdout.readline())
    assert wait_for(lambda: state(target.pid) == "T", 8)
    (actor,) = children(keeper)
    yield injector, keeper, actor
    injector.kill()
    injector.wait()
    injector.stdout.close()
    assert wait_for(lambda: not alive(keeper) and not alive(actor))


@pytest.mark.parametrize("victim", [0, 1, 2], ids=["injector", "keeper", "actor"])
def test_whoever_is_killed_the_target_goes_on_within_a_second(target, stopped, victim):
    pid = stopped[0].pid if victim == 0 else stopped[victim]
    os.kill(pid, signal.SIGKILL)
    assert wait_for(lambda: state(target.pid) != "T", 1.0)
    time.sleep(0.3)
    assert state(target.pid) != "T"


def test_burners_end_when_the_injector_is_killed(target):
    code = INJECTOR.replace('"peer.stalled"', '"cpu.neighbour"').replace(", stop_ms=4500, every_s=9", "")
    injector = subprocess.Popen([sys.executable, "-c", code, str(target.pid)], stdout=subprocess.PIPE)
    helpers = [int(word) for word in injector.stdout.readline().split()]
    injector.kill()
    injector.wait()
    injector.stdout.close()
    assert wait_for(lambda: not any(alive(pid) for pid in helpers), 2)


@pytest.mark.root
@needs_root
def test_quota_throttles_and_the_target_goes_home(target):
    def group():
        with open(f"/proc/{target.pid}/cgroup") as file:
            return file.read()

    home = group()
    try:
        injection = inject.start("cpu.quota", target.pid, 1.0, 1.5)
    except PrismError as error:
        pytest.skip(str(error))
    with injection:
        assert wait_for(lambda: group() != home)
        directory = injection._plan.specs[0]["directory"]
        injection.wait()
    effect = injection.effect_check()
    assert effect.effective and effect.measured >= 2
    assert group() == home and not os.path.exists(directory)


@pytest.mark.root
@needs_root
def test_quota_is_undone_when_the_injector_is_killed(target):
    with open(f"/proc/{target.pid}/cgroup") as file:
        home = file.read()
    code = INJECTOR.replace('"peer.stalled"', '"cpu.quota"').replace(", stop_ms=4500, every_s=9", "")
    injector = subprocess.Popen([sys.executable, "-c", code, str(target.pid)], stdout=subprocess.PIPE)
    helpers = injector.stdout.readline()
    if not helpers:
        injector.wait()
        injector.stdout.close()
        pytest.skip("the CPU controller cannot be written")

    def group():
        with open(f"/proc/{target.pid}/cgroup") as file:
            return file.read()

    assert wait_for(lambda: group() != home)
    os.kill(injector.pid, signal.SIGKILL)
    injector.wait()
    injector.stdout.close()
    assert wait_for(lambda: group() == home, 2)


READER = """
import mmap, sys
file = open(sys.argv[1], "rb")
pages = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
print("ready", flush=True)
while True: sum(pages[at] for at in range(0, len(pages), 65536))
"""


@pytest.mark.root
@needs_root
def test_pages_that_are_taken_back_are_read_again(tmp_path):
    path = tmp_path / "pages"
    with path.open("wb") as file:
        for _ in range(16):
            file.write(os.urandom(1 << 20))
        file.flush()
        os.fsync(file.fileno())
    process = subprocess.Popen([sys.executable, "-c", READER, str(path)], stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"ready\n"
        for _ in range(3):  # pages that the kernel itself still holds on to stay, whoever asks
            with inject.start("memory.reclaim", process.pid, 0.2, 1.5) as injection:
                injection.wait()
            effect = injection.effect_check()
            assert process.poll() is None and len(injection.truth()) == 1
            assert "MiB were taken back" in effect.text
            if effect.measured > 20:
                break
        assert effect.measured > 20
    finally:
        process.kill()
        process.communicate()


SPINNERS = """
import threading, zlib
buffer = bytes(1 << 20)
def spin():
    while True: zlib.crc32(buffer)
for _ in range(3): threading.Thread(target=spin).start()
print("ready", flush=True)
"""


def cpus_of(pid):
    return {tid: os.sched_getaffinity(int(tid)) for tid in os.listdir(f"/proc/{pid}/task")}


@pytest.fixture
def spinners():
    """A process that computes on three threads."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two CPUs")
    process = subprocess.Popen([sys.executable, "-c", SPINNERS], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    yield process
    process.kill()
    process.communicate()


def test_fewer_cpus_make_threads_wait_and_are_given_back(spinners):
    before = cpus_of(spinners.pid)
    with inject.start("cpu.oversubscription", spinners.pid, 1.0, 1.5) as injection:
        assert wait_for(lambda: all(len(cpus) == 1 for cpus in cpus_of(spinners.pid).values()))
        injection.wait()
    assert injection.effect_check().measured > 0.3 and len(injection.truth()) == 1
    assert cpus_of(spinners.pid) == before


@pytest.mark.parametrize("victim", ["injector", "actor"])
def test_cpus_are_given_back_whoever_is_killed(spinners, victim):
    before = cpus_of(spinners.pid)
    code = INJECTOR.replace('"peer.stalled"', '"cpu.oversubscription"').replace(
        "stop_ms=4500, every_s=9", "strength=4"
    )
    injector = subprocess.Popen([sys.executable, "-c", code, str(spinners.pid)], stdout=subprocess.PIPE)
    keeper = int(injector.stdout.readline())
    assert wait_for(lambda: cpus_of(spinners.pid) != before)
    os.kill(injector.pid if victim == "injector" else children(keeper)[0], signal.SIGKILL)
    assert wait_for(lambda: not children(keeper) and cpus_of(spinners.pid) == before)
    injector.kill()
    injector.wait()
    injector.stdout.close()


@pytest.mark.parametrize(
    ("used", "slow_down", "left", "part"),
    [
        (4.0, 1.0, 2, 1.0),
        (4.0, 0.5, 2, 2 / 3),
        (2.0, 0.1, 1, 2 / 11),
        (2.0, 4.0, 1, 1.0),
        (3.7, 0.1, 3, 0.4805),
    ],
)
def test_cpus_left_and_the_part_of_time_make_the_slow_down(used, slow_down, left, part):
    assert crowding._fewer(used, slow_down) == (left, pytest.approx(part, rel=0.01))


def test_memory_and_disk_have_an_effect(target, tmp_path):
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs a CPU beside the target's")
    with inject.start("memory.bandwidth", target.pid, 0.5, 1) as injection:
        injection.wait()
    assert injection.effect_check().measured > 0.05
    try:
        injection = inject.start("disk.stall", target.pid, 0.5, 1, directory=str(tmp_path))
    except BadInput as error:
        pytest.skip(str(error))
    with injection:
        injection.wait()
    assert injection.effect_check().effective
    assert os.listdir(tmp_path) == []


def test_an_injection_that_did_nothing_says_so(target):
    with inject.start("peer.stalled", target.pid, duration_s=60, stop_ms=50, every_s=20) as injection:
        pass
    effect = injection.effect_check()
    assert not effect.effective and effect.measured == 0 and injection.truth() == []


def test_a_process_that_someone_else_started_is_refused(target):
    with pytest.raises(TargetRefused, match="--i-know"):
        inject.start("peer.stalled", _stranger())


def _stranger():
    """A kernel thread or another process that this one did not start."""
    own = {os.getpid(), *ancestors(os.getpid())}
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) not in own | {1}:
            pid = int(name)
            try:
                with open(f"/proc/{pid}/stat", "rb") as file:
                    fields = parse_stat(file.read())[1]
            except (OSError, TypeError):
                continue
            kernel = int(fields[6]) & 0x00200000
            if not kernel and fields[0] in (b"S", b"R") and os.getpid() not in ancestors(pid):
                return pid
    pytest.skip("no other process here")


@pytest.mark.parametrize("pid", [1, 0, -5, 2**22 + 1, os.getpid(), os.getppid()])
def test_impossible_targets_are_refused_even_with_i_know(pid):
    with pytest.raises((BadInput, TargetRefused)):
        inject.start("peer.stalled", pid, i_know=True)


def test_a_target_that_is_stopped_already_is_refused(target):
    os.kill(target.pid, signal.SIGSTOP)
    assert wait_for(lambda: state(target.pid) == "T")
    with pytest.raises(TargetRefused, match="stopped"):
        inject.start("peer.stalled", target.pid)
    os.kill(target.pid, signal.SIGCONT)


@pytest.mark.parametrize(
    "arguments",
    [
        {"cause": "no.such"},
        {"strength": 0.0},
        {"strength": -1.0},
        {"strength": float("nan")},
        {"strength": 4.5},
        {"duration_s": 0.0},
        {"duration_s": float("inf")},
        {"duration_s": 1e9},
        {"cause": "peer.stalled", "stop_ms": -5.0},
        {"cause": "peer.stalled", "stop_ms": 1e9},
        {"cause": "peer.stalled", "stop_ms": 500.0, "every_s": 0.1},
        {"cause": "disk.stall", "directory": "/proc"},
        {"cause": "disk.stall", "directory": "/no/such/directory"},
    ],
)
def test_numbers_out_of_range_are_bad_input(target, arguments):
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(BadInput):
        inject.start(**{"cause": "cpu.neighbour", "pid": target.pid, **arguments})
    assert len(os.listdir("/proc/self/fd")) == before


def test_no_descriptor_is_left_open(target):
    before = len(os.listdir("/proc/self/fd"))
    with inject.start("peer.stalled", target.pid, duration_s=1, stop_ms=20, every_s=0.2):
        time.sleep(0.3)
    assert len(os.listdir("/proc/self/fd")) == before


def parse(*words):
    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)
    return parser.parse_args(words)


def test_the_verb_lists_and_injects(target, capsys):
    assert verb.run(parse("--list", "--json")) == 0
    causes = {row["cause"] for row in json.loads(capsys.readouterr().out)}
    assert causes == set(inject.CATALOGUE)
    words = (
        "peer.stalled",
        "-p",
        str(target.pid),
        "-d",
        "1",
        "--stop-ms",
        "30",
        "--every-s",
        "0.2",
        "--json",
    )
    before = signal.getsignal(signal.SIGTERM)
    assert verb.run(parse(*words)) == 0
    assert signal.getsignal(signal.SIGTERM) == before
    outcome = json.loads(capsys.readouterr().out)
    assert outcome["effective"] and len(outcome["intervals"]) >= 3
    assert all(each["end_ns"] > each["start_ns"] for each in outcome["intervals"])


def test_the_verb_wants_a_cause_and_a_pid():
    with pytest.raises(BadInput):
        verb.run(parse("peer.stalled"))


def test_helpers_that_cannot_start_are_said(target, monkeypatch):
    def refuse(*_, **__):
        raise OSError("no more processes")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    with pytest.raises(PrismError, match="no more processes"):
        inject.start("peer.stalled", target.pid)
