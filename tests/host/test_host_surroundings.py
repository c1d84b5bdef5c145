"""Containers, control group memory, TCP, clocks, NUMA: parsers on what systems write, and this machine
itself."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latencyprism.host import HostSampler, Neighbours
from latencyprism.host.cgroup import CpuMount, parse_membership, parse_mounts
from latencyprism.host.container import (
    Container,
    container_of,
    container_of_path,
    group_paths,
    short_cgroup,
)
from latencyprism.host.facts import machine_facts, process_facts
from latencyprism.host.memory_group import MemoryGroup
from latencyprism.host.network import (
    ESTABLISHED,
    LISTEN,
    NetworkCounters,
    parse_counters,
    parse_socket,
    sockets_of,
)
from latencyprism.host.numa import memory_by_node, nodes, parse_numa_maps
from latencyprism.host.timekeeping import timekeeping

ID = "0123456789ab" + "cd" * 26
POD = "1a2b3c4d-1111-2222-3333-123456789abc"
POD_ = POD.replace("-", "_")
BEST = f"/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{POD_}.slice"
USER = "/user.slice/user-1000.slice/user@1000.service/user.slice"
PATHS = [
    (f"/docker/{ID}", Container("docker", ID)),
    (f"/system.slice/docker-{ID}.scope", Container("docker", ID)),
    (f"/docker/{ID}/init.scope", Container("docker", ID)),
    (f"{USER}/libpod-{ID}.scope", Container("podman", ID)),
    (f"/kubepods/burstable/pod{POD}/{ID}", Container("kubernetes", ID, POD, "burstable")),
    (f"/kubepods/pod{POD}/{ID}", Container("kubernetes", ID, POD, "guaranteed")),
    (f"{BEST}/cri-containerd-{ID}.scope", Container("containerd", ID, POD, "besteffort")),
    (f"/kubepods.slice/kubepods-pod{POD_}.slice/crio-{ID}.scope", Container("cri-o", ID, POD, "guaranteed")),
    (
        f"/system.slice/containerd.service/kubepods-burstable-pod{POD_}.slice:cri-containerd:{ID}",
        Container("containerd", ID, POD, "burstable"),
    ),
    (f"/kubepods/burstable/pod{'ab' * 16}/{ID}", Container("kubernetes", ID, "ab" * 16, "burstable")),
    (f"/ecs/{'ef' * 16}/{'ef' * 16}-1234567890", Container("ecs", f"{'ef' * 16}-1234567890")),
    ("/lxc.payload.web1", Container("lxc", "web1")),
    ("/lxc/web1/system.slice", Container("lxc", "web1")),
    ("/machine.slice/machine-deb12.scope", Container("nspawn", "deb12")),
    (f"/default/{ID}", Container("containerd", ID)),
    ("/system.slice/ssh.service", None),
    ("/user.slice/user-0.slice/session-3.scope", None),
    ("/", None),
    ("", None),
]


@pytest.mark.parametrize(("path", "expected"), PATHS)
def test_containers_are_told_by_their_paths(path: str, expected: Container | None) -> None:
    assert container_of_path(path) == expected


@pytest.mark.parametrize(
    ("path", "short"),
    [
        (PATHS[6][0], "containerd 0123456789ab, pod 1a2b3c4d"),
        (f"/docker/{ID}", "docker 0123456789ab"),
        ("/lxc.payload.web1", "lxc web1"),
        ("/system.slice/ssh.service", "ssh.service"),
        ("/user.slice/user-0.slice/session-3.scope", "session-3.scope"),
        (f"/batch/{'3905da02' * 4}", "batch/3905da023905"),
        ("/a/b/c/d", "c/d"),
        ("/", "/"),
        ("", ""),
    ],
)
def test_a_group_is_named_in_few_words(path: str, short: str) -> None:
    assert short_cgroup(path) == short


@given(st.text(max_size=300))
def test_no_path_breaks_the_names_and_none_gets_long(path: str) -> None:
    container_of_path(path)
    assert len(short_cgroup("/" + path)) <= max(48, 1)


def test_paths_of_a_process_are_longest_first_and_keep_their_colons() -> None:
    text = "9:name=systemd:/\n4:memory:/a/b\n0::/a:b/c:d\nnonsense\n"
    assert group_paths(text) == ["/a:b/c:d", "/a/b", "/"]
    assert container_of(2**22 + 1) is None


def test_memory_of_a_v2_group_with_its_tightest_limit(tmp_path: Path) -> None:
    inner = tmp_path / "pod" / "container"
    inner.mkdir(parents=True)
    (inner / "memory.current").write_text("1000\n")
    (inner / "memory.max").write_text("max\n")
    (inner.parent / "memory.max").write_text("5000\n")
    (inner / "memory.events").write_text("low 0\nhigh 3\nmax 7\noom 1\noom_kill 2\n")
    pressure = "some avg10=0.00 avg60=0.00 avg300=0.00 total=12\nfull avg10=0.00 avg60=0.00 total=5\n"
    (inner / "memory.pressure").write_text(pressure)
    group = MemoryGroup(CpuMount(2, str(tmp_path), "/"), "/pod/container")
    assert group.read() == {
        "group_memory_bytes": 1000, "group_memory_limit_bytes": 5000, "group_memory_limit_hits": 7,
        "group_memory_high_hits": 3, "group_oom_kills": 2,
        "group_psi_memory_some_ns": 12_000, "group_psi_memory_full_ns": 5_000,
    }  # fmt: skip
    group.close()


def test_memory_of_a_v1_group_without_a_limit(tmp_path: Path) -> None:
    (tmp_path / "memory.usage_in_bytes").write_text("77\n")
    (tmp_path / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    (tmp_path / "memory.failcnt").write_text("4\n")
    (tmp_path / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 1\n")
    group = MemoryGroup(CpuMount(1, str(tmp_path), "/"), "/")
    assert group.read() == {
        "group_memory_bytes": 77, "group_memory_limit_hits": 4, "group_oom_kills": 1,
    }  # fmt: skip
    group.close()


def test_any_controller_is_found() -> None:
    text = (
        "30 25 0:27 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
        "31 25 0:28 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
    )
    assert parse_mounts(text, "memory") == CpuMount(1, "/sys/fs/cgroup/memory", "/")
    assert parse_mounts(text) == CpuMount(2, "/sys/fs/cgroup/unified", "/")
    assert parse_membership("4:memory:/m\n1:cpu:/c\n", 1, "memory") == "/m"


def test_tcp_counters_by_name_whatever_their_order() -> None:
    text = b"Tcp: OutSegs Foo RetransSegs\nTcp: 100 1 7\nTcpExt: TCPTimeouts\nTcpExt: 3\nIp: a\n"
    assert parse_counters(text) == {
        "tcp_segments_sent": 100, "tcp_segments_sent_again": 7, "tcp_timeouts": 3,
    }  # fmt: skip
    live = NetworkCounters(os.getpid())
    assert {"tcp_segments_sent", "tcp_segments_sent_again", "tcp_accept_overflows"} <= set(live.read())
    live.close()


def test_sockets_of_a_process_with_round_trip_and_queues() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=16) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(b"x" * 1000)
            time.sleep(0.05)
            sockets = sockets_of(os.getpid())
            if sockets is None:
                pytest.skip("no socket diagnostics on this machine")
            listening = next(s for s in sockets if s.state == LISTEN and s.local_port == port)
            assert (listening.unread_bytes, listening.unsent_bytes) == (1, 16)
            mine = client.getsockname()[1]
            connection = next(s for s in sockets if s.state == ESTABLISHED and s.local_port == mine)
            assert connection.remote == f"127.0.0.1:{port}"
            assert connection.rtt_us is not None and 0 < connection.rtt_us < 100_000
            assert connection.sent_again == 0
    assert sockets_of(2**22 + 1) is None


@given(st.binary(min_size=72, max_size=300))
def test_no_socket_message_breaks_the_parser(data: bytes) -> None:
    family = b"\x02" if data[0] % 2 else b"\x0a"
    parse_socket(family + data[1:])


def test_a_short_socket_message_is_an_error_of_its_form() -> None:
    with pytest.raises(struct.error):
        parse_socket(b"\x02" * 20)


def test_the_clock_tells_its_source_and_error() -> None:
    clock = timekeeping()
    assert clock.source is None or clock.source in clock.available
    assert clock.synchronised is not None and (clock.error_us or 0) >= 0
    assert clock.frequency_ppm is not None and abs(clock.frequency_ppm) <= 600


def test_where_memory_lies() -> None:
    text = (
        b"7f00 default file=/lib/x mapped=3 N0=2 N1=1 kernelpagesize_kB=4\n"
        b"7f01 default anon=1 N1=2 kernelpagesize_kB=2048\nheap\n"
    )
    assert parse_numa_maps(text) == {0: 8192, 1: 4096 + 2 * 2048 * 1024}
    here = memory_by_node(os.getpid())
    assert here is None or sum(here.values()) > 1 << 20
    assert all(node.cpus and (node.memory_bytes or 0) > 0 for node in nodes() if node.cpus)
    assert memory_by_node(2**22 + 1) is None


def test_facts_are_plain_and_those_of_a_missing_process_null() -> None:
    import json

    machine = machine_facts()
    assert machine["cpus"] == os.cpu_count() and machine["clock"]["source"]
    me = process_facts(os.getpid())
    assert me["cpus_allowed"] == sorted(os.sched_getaffinity(0))
    gone = process_facts(2**22 + 1)
    assert gone["cpus_allowed"] is gone["cgroup"] is gone["tcp"] is gone["quota_cpus"] is None
    json.dumps([machine, me, gone])


def test_the_sampler_counts_memory_of_the_group_tcp_and_faults_of_threads() -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"]) as process:
        try:
            sampler = HostSampler({process.pid: "Worker"})
            found = {c.name: c for c in sampler.sample(1) if c.track[0] == f"Worker {process.pid}"}
            again = {c.name for c in sampler.sample(2)}
            sampler.close()
        finally:
            process.kill()
    assert found["tcp_segments_sent"].value > 0
    assert "tcp_segments_sent" not in again, "every tenth sample is enough"
    if os.path.exists("/sys/fs/cgroup/memory/memory.usage_in_bytes"):
        assert found["group_memory_bytes"].unit == "bytes" and found["group_memory_bytes"].value > 0
    thread = {c.name for c in found.values() if c.track[-1] != "process"}
    assert {"state", "cpu"} <= thread


def test_neighbours_have_short_groups() -> None:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            neighbours = Neighbours()
            time.sleep(0.5)
            named = {n.pid: n for n in neighbours.sample(time.monotonic_ns())}
        finally:
            process.kill()
    assert len(named[process.pid].cgroup) <= 48
