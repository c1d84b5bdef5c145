"""HostSampler against live processes: names, growth, missing sources, cost."""

import os
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latencyprism.host import ClockMap, HostSampler, Neighbours
from latencyprism.host.cgroup import CpuMount, GroupChain, parse_membership, parse_mounts
from latencyprism.host.cpu_lines import parse_cpu_lines
from latencyprism.host.held import HeldFile, parse_table
from latencyprism.host.machine import parse_pressure
from latencyprism.host.neighbours import SEEN
from latencyprism.host.processes import STATES, parse_allowed, parse_stat

SPIN = "while True: pass"
SLEEP = "import time; time.sleep(60)"


@pytest.fixture
def child():
    started = []

    def start(code):
        process = subprocess.Popen([sys.executable, "-c", code])
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def values(counters):
    return {(c.track, c.name): c.value for c in counters}


def test_counters_of_a_busy_process_grow(child):
    process = child(SPIN)
    sampler = HostSampler({process.pid: "Worker"})
    time.sleep(0.1)
    first = values(sampler.sample(time.monotonic_ns()))
    time.sleep(0.5)
    second = values(sampler.sample(time.monotonic_ns()))
    sampler.close()
    whole = (f"Worker {process.pid}", "process")
    burnt = second[whole, "cpu_ns"] - first[whole, "cpu_ns"]
    assert 5e6 < burnt < 0.8e9
    thread = next(track for track, name in second if name == "timeslices")
    assert thread[0] == f"Worker {process.pid}" and thread[1].endswith(f" {process.pid}")
    spent = second[thread, "cpu_ns"] - first[thread, "cpu_ns"]
    waited = second[thread, "runqueue_ns"] - first[thread, "runqueue_ns"]
    assert spent + waited == pytest.approx(0.5e9, rel=0.3)
    assert second[("machine",), "cpu0_busy_ns"] >= first[("machine",), "cpu0_busy_ns"]


def test_a_stopped_process_is_seen_stopped(child):
    process = child(SLEEP)
    sampler = HostSampler({process.pid: "Worker"})
    os.kill(process.pid, signal.SIGSTOP)
    os.waitpid(process.pid, os.WUNTRACED)
    now = sampler.sample(time.monotonic_ns())
    states = [STATES[int(c.value)] for c in now if c.name == "state"]
    os.kill(process.pid, signal.SIGCONT)
    sampler.close()
    assert states == ["T"]


def test_an_ended_process_is_reported_once_and_never_read_as_zero(child):
    process = child(SLEEP)
    sampler = HostSampler({process.pid: "Worker"})
    process.kill()
    process.wait()
    for _ in range(3):
        assert not [c for c in sampler.sample(1) if c.track[0].startswith("Worker")]
    said = [line for line in sampler.not_available if "ended" in line]
    sampler.close()
    assert said == [f"Worker {process.pid}: the process has ended"]


def test_a_pid_that_does_not_exist_is_said_and_harmless():
    sampler = HostSampler({2**22 + 1: "Worker"})
    assert any("scheduler statistics" in line for line in sampler.not_available)
    assert all(c.track == ("machine",) for c in sampler.sample(1))
    sampler.close()


def test_the_busiest_other_thread_is_watched(child):
    code = (
        "import threading\nthreading.Thread(target=exec, args=('while True: pass',), daemon=True).start()\n"
    )
    process = child(code + SLEEP)
    time.sleep(0.3)
    sampler = HostSampler({process.pid: "Engine"})
    tracks = {c.track for c in sampler.sample(1) if c.name == "cpu_ns" and c.track[-1] != "process"}
    sampler.close()
    assert len(tracks) == 2


def test_a_call_costs_less_than_a_millisecond_for_three_processes(child):
    roles = {child(SLEEP).pid: role for role in ("API", "Engine", "Worker")}
    sampler = HostSampler(roles)
    sampler.sample(0)
    costs = []
    for number in range(200):
        start = time.thread_time_ns()
        sampler.sample(number)
        costs.append(time.thread_time_ns() - start)
    sampler.close()
    assert sorted(costs)[100] < 1_000_000


def test_no_descriptor_is_left_open(child):
    before = len(os.listdir("/proc/self/fd"))
    sampler = HostSampler({child(SLEEP).pid: "Worker"})
    sampler.sample(1)
    sampler.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_neighbour_is_named_with_its_cpu(child):
    process = child("import os; os.sched_setaffinity(0, {0})\n" + SPIN)
    time.sleep(0.3)
    neighbours = Neighbours()
    time.sleep(1.0)
    counters = neighbours.counters(time.monotonic_ns())
    mine = [c for c in counters if c.track[0] == f"neighbour {process.pid}"]
    assert [c.name for c in mine] == ["cpu0_share"]
    assert 0.1 < mine[0].value <= 1.05
    assert mine[0].track[1].startswith("python")
    assert next(c.value for c in counters if c.name == SEEN) == pytest.approx(1e9, rel=0.3)


def test_excluded_processes_are_no_neighbours(child):
    process = child(SPIN)
    neighbours = Neighbours(exclude=[process.pid])
    time.sleep(0.3)
    assert process.pid not in {n.pid for n in neighbours.sample(time.monotonic_ns())}


def test_clock_mapping_agrees_with_the_wall_clock():
    clock = ClockMap.measure()
    assert clock.realtime_ns(time.monotonic_ns()) == pytest.approx(time.time_ns(), abs=50_000_000)
    assert clock.monotonic_ns(clock.realtime_ns(123)) == 123
    text = ClockMap(offset_ns=1_700_000_000_000_000_000, error_ns=1).rfc3339(1_234_567)
    assert text == "2023-11-14T22:13:20.001234Z"


V1 = "30 25 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n"
V2 = "31 25 0:28 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"


def test_the_cpu_controller_is_found_in_either_version():
    assert parse_mounts(V2 + V1) == CpuMount(1, "/sys/fs/cgroup/cpu", "/")
    assert parse_mounts(V2) == CpuMount(2, "/sys/fs/cgroup", "/")
    assert parse_mounts("garbage - \n") is None
    assert parse_membership("9:name=systemd:/\n1:cpu,cpuacct:/a/b\n0::/c\n", 1) == "/a/b"
    assert parse_membership("1:cpu:/a\n0::/c:d\n", 2) == "/c:d"
    assert parse_membership("nonsense", 2) is None


def test_an_ancestors_throttling_counts(tmp_path):
    inner = tmp_path / "pod" / "container"
    inner.mkdir(parents=True)
    for folder, stat, limit in (
        (inner, "nr_throttled 1\nthrottled_usec 10\n", "max 100000\n"),
        (inner.parent, "nr_throttled 4\nthrottled_usec 500\n", "150000 100000\n"),
    ):
        (folder / "cpu.stat").write_text(stat)
        (folder / "cpu.max").write_text(limit)
    chain = GroupChain(CpuMount(2, str(tmp_path), "/"), "/pod/container")
    read = chain.read()
    chain.close()
    assert (read.periods, read.throttled_ns, read.quota_cpus) == (5, 510_000, 1.5)


def test_a_group_path_cannot_leave_the_mount(tmp_path):
    chain = GroupChain(CpuMount(2, str(tmp_path), "/"), "/../../etc")
    assert all(level.statistics.path.startswith(str(tmp_path)) for level in chain._levels)


def test_a_held_file_that_is_missing_says_why(tmp_path):
    held = HeldFile(str(tmp_path / "nothing"))
    assert held.read() is None and held.why


@given(st.binary(max_size=400))
def test_no_text_breaks_a_parser(data):
    parse_stat(data)
    parse_table(data)
    parse_pressure(data)
    parse_cpu_lines(data)
    text = data.decode("utf-8", "replace")
    parse_mounts(text)
    parse_membership(text, 1)


def test_a_thread_name_may_hold_parentheses_and_spaces():
    name, fields = parse_stat(b"12 (a) b (c) S " + b" ".join(str(n).encode() for n in range(40)))
    assert name == "a) b (c" and fields[0] == b"S"


def test_a_narrowed_thread_is_seen_and_nonsense_is_not_observed(child):
    process = child(SLEEP)
    sampler = HostSampler({process.pid: "Worker"})

    def allowed():
        return {v for (_, n), v in values(sampler.sample(time.monotonic_ns())).items() if n == "allowed_cpus"}

    before = os.sched_getaffinity(process.pid)
    assert allowed() == {len(before)}
    os.sched_setaffinity(process.pid, {min(before)})
    assert allowed() == {1}
    sampler.close()
    assert parse_allowed(b"Name:\tx\nCpus_allowed:\tff,ffffffff\nCpus_allowed_list:\t0-39\n") == 40
    for text in (b"", b"Name:\tCpus_allowed:\t3\n", b"x\nCpus_allowed:\t0\n", b"x\nCpus_allowed:\tz\n"):
        assert parse_allowed(text) is None
