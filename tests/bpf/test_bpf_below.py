"""The always-on probe: each wait under its reason and by its culprit, and nothing left out of the totals."""

from __future__ import annotations

import contextlib
import mmap
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from latencyprism.bpf import below as below_module
from latencyprism.bpf import kernel
from latencyprism.bpf.below import ALWAYS, BelowProbe
from latencyprism.bpf.waits import (
    ASLEEP,
    INTERVAL_DTYPE,
    TOTALS,
    TOTALS_DTYPE,
    Intervals,
    Kind,
    syscall_classes,
    syscall_name,
    syscall_number,
)
from latencyprism.errors import BadInput, PrismError
from latencyprism.timeline.attribution import machine_spans

live = [pytest.mark.bpf, pytest.mark.root]


@pytest.fixture
def probe() -> Iterator[BelowProbe]:
    with BelowProbe([os.getpid()]) as started:
        yield started


def seen(probe: BelowProbe, action: Callable[[], object]) -> Intervals:
    """What was recorded of this thread while ``action`` ran."""
    probe.read()
    action()
    records = probe.read()
    return records[records["tid"] == threading.get_native_id()]


def spent(records: Intervals, *kinds: Kind) -> int:
    chosen = records[np.isin(records["kind"], kinds)]
    return int((chosen["end_ns"] - chosen["start_ns"]).sum())


def test_layouts_are_those_of_the_program() -> None:
    assert INTERVAL_DTYPE.itemsize == 56  # with its header 64: no record straddles the ring's end
    assert TOTALS == 22 and TOTALS_DTYPE.itemsize == 2 * 8 * 22 + 24
    assert sorted(Kind) == list(range(1, 27))


def test_system_calls_are_known_by_number_on_both_architectures() -> None:
    for machine, fsync, futex in (("x86_64", 74, 202), ("aarch64", 82, 98)):
        assert syscall_name(fsync, machine) == "fsync" and syscall_number("futex", machine) == futex
        table = syscall_classes(machine)
        assert (table[fsync], table[futex], len(table)) == (Kind.SYNC, Kind.FUTEX, 512)
    assert syscall_name(-1, "x86_64") == "" and syscall_name(500, "x86_64") == "syscall 500"
    assert syscall_number("no_such_call", "x86_64") is None


def test_nonsense_targets_are_refused() -> None:
    for pids in ([], [0], [-1], range(1, 1000)):
        with pytest.raises(BadInput):
            BelowProbe(pids)


class TestReasons:
    pytestmark = live

    def test_a_sleep(self, probe: BelowProbe) -> None:
        records = seen(probe, lambda: time.sleep(0.01))
        assert spent(records, Kind.SLEEP) == pytest.approx(10e6, rel=0.1)
        assert spent(records, *(kind for kind in ASLEEP if kind != Kind.SLEEP)) < 1e6

    def test_a_lock(self, probe: BelowProbe) -> None:
        lock = threading.Lock()
        lock.acquire()
        records = seen(probe, lambda: lock.acquire(timeout=0.01))
        assert spent(records, Kind.FUTEX) == pytest.approx(10e6, rel=0.1)
        assert {syscall_name(int(n)) for n in records["syscall"][records["kind"] == Kind.FUTEX]} == {"futex"}

    def test_a_pipe_and_who_filled_it(self, probe: BelowProbe) -> None:
        read, write = os.pipe()
        code = f"import os, time; time.sleep(0.3); os.write({write}, b'x'); time.sleep(5)"
        with subprocess.Popen([sys.executable, "-c", code], pass_fds=[write]) as writer:
            try:
                records = seen(probe, lambda: os.read(read, 1))
            finally:
                writer.kill()
                os.close(read)
                os.close(write)
        waits = records[records["kind"] == Kind.READ]
        assert len(waits) == 1 and int(waits["end_ns"][0] - waits["start_ns"][0]) > 50e6
        assert int(waits["culprit_tgid"][0]) == writer.pid

    def test_a_disk(self, probe: BelowProbe, tmp_path: os.PathLike[str]) -> None:
        def write() -> None:
            with open(os.path.join(tmp_path, "file"), "wb") as file:
                file.write(os.urandom(1 << 20))
                file.flush()
                os.fsync(file.fileno())

        before = probe.thread_totals(threading.get_native_id())
        records = seen(probe, write)
        after = probe.thread_totals(threading.get_native_id())
        assert after is not None
        waited = int(after["ns"][Kind.SYNC]) - (int(before["ns"][Kind.SYNC]) if before is not None else 0)
        assert waited >= spent(records, Kind.SYNC)
        # A file system in memory waits for nothing.
        assert waited == 0 or Kind.SYNC in records["kind"] or waited < 50_000 * after["count"][Kind.SYNC]

    def test_a_taken_cpu_and_who_took_it(self, probe: BelowProbe) -> None:
        cpus = os.sched_getaffinity(0)
        cpu = max(cpus)
        code = (
            f"import os, sys, time; os.sched_setaffinity(0, {{{cpu}}})\n"
            "os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))\n"
            "sys.stdin.read(1); begun = time.monotonic()\n"
            "while time.monotonic() < begun + 0.02: pass\n"
        )
        with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as hog:
            assert hog.stdin
            time.sleep(0.5)
            os.sched_setaffinity(0, {cpu})
            try:

                def ask() -> None:
                    assert hog.stdin
                    hog.stdin.write(b"x")
                    hog.stdin.flush()
                    begun = time.thread_time()
                    while time.thread_time() < begun + 0.005:
                        pass

                records = seen(probe, ask)
            finally:
                os.sched_setaffinity(0, cpus)
                hog.stdin.close()
                hog.wait()
        taken = records[(records["kind"] == Kind.PREEMPTED) & (records["culprit_tgid"] == hog.pid)]
        # Others may have had the CPU too, before the hog let go of it or after.
        assert 19e6 < int((taken["end_ns"] - taken["start_ns"]).sum()) < 200e6

    def test_system_calls_only_when_deep(self, probe: BelowProbe) -> None:
        assert len(seen(probe, lambda: time.sleep(0.002))["kind"] == Kind.SYSCALL)
        assert not probe.syscalls()
        probe.go_deep()
        records = seen(probe, lambda: time.sleep(0.002))
        calls = records[records["kind"] == Kind.SYSCALL]
        assert "clock_nanosleep" in {syscall_name(int(number)) for number in calls["syscall"]}
        mine = [c for c in probe.syscalls() if c.tid == threading.get_native_id()]
        sleeps = next(c for c in mine if c.name == "clock_nanosleep")
        assert sleeps.calls == 1 and sleeps.total_ns == sleeps.longest_ns > 2e6
        probe.go_back()
        assert "syscalls" not in probe.attached
        assert Kind.SYSCALL not in seen(probe, lambda: time.sleep(0.002))["kind"]


class TestTotals:
    pytestmark = live

    def test_short_waits_are_in_the_totals_alone(self) -> None:
        with BelowProbe([os.getpid()], min_ns=1_000_000_000) as probe:
            for _ in range(20):
                time.sleep(0.001)
            records = probe.read()
            totals = probe.totals()[threading.get_native_id()]
        assert Kind.SLEEP not in records["kind"]
        assert totals["count"][Kind.SLEEP] >= 20 and totals["ns"][Kind.SLEEP] > 20e6

    def test_what_a_full_ring_loses_is_counted_and_in_the_totals(self) -> None:
        with BelowProbe([os.getpid()], min_ns=0, ring_bytes=4096) as probe:
            probe.read()
            for _ in range(200):
                time.sleep(0.0001)
            lost, kept = probe.lost, len(probe.read())
            totals = probe.totals()[threading.get_native_id()]
        assert lost > 100 and kept <= 64
        assert totals["count"][Kind.SLEEP] >= 150  # a timer may ring before the thread has left
        assert probe.lost >= lost  # still readable

    def test_faults_are_the_kernels(self, probe: BelowProbe) -> None:
        time.sleep(0.001)  # what the kernel counts is read when the thread leaves the CPU
        own = threading.get_native_id()
        first, before = probe.thread_totals(own), resource.getrusage(resource.RUSAGE_THREAD)
        pages = mmap.mmap(-1, 500 * mmap.PAGESIZE)
        for page in range(500):
            pages[page * mmap.PAGESIZE] = 1
        time.sleep(0.001)
        after, last = resource.getrusage(resource.RUSAGE_THREAD), probe.thread_totals(own)
        assert first is not None and last is not None
        assert last["minor_faults"] - first["minor_faults"] == pytest.approx(
            after.ru_minflt - before.ru_minflt, abs=20
        )

    def test_threads_that_end_are_forgotten(self, probe: BelowProbe) -> None:
        gate, tids = threading.Event(), []

        def waits() -> None:
            tids.append(threading.get_native_id())
            gate.wait()

        def known(wanted: bool) -> bool:
            end = time.monotonic() + 5
            while (tids[0] in probe.totals()) != wanted and time.monotonic() < end:
                time.sleep(0.005)
            return tids[0] in probe.totals()

        thread = threading.Thread(target=waits)
        thread.start()
        while not tids:
            time.sleep(0.001)
        assert known(True)
        gate.set()
        thread.join()
        assert not known(False)

    def test_every_run_of_a_program_is_counted(self, probe: BelowProbe) -> None:
        before = probe.hits()
        for _ in range(10):
            time.sleep(0.001)
        after = probe.hits()
        assert after["mine"] - before["mine"] >= 20 and after["switch"] > before["switch"]


class TestMissing:
    pytestmark = live

    def test_a_tracepoint_that_is_not_there_is_named_and_the_rest_works(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        groups = dict(below_module.GROUPS)
        groups["network"] = groups["network"]._replace(tracepoints=("no_such_tracepoint",))
        monkeypatch.setattr(below_module, "GROUPS", groups)
        with BelowProbe([os.getpid()]) as probe:
            assert probe.missing == ["network: this kernel has no tracepoint no_such_tracepoint"]
            assert set(probe.attached) == set(ALWAYS) - {"network"}
            assert Kind.SLEEP in seen(probe, lambda: time.sleep(0.002))["kind"]

    def test_without_type_information_it_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(below_module, "_types_of", lambda points: {})
        with pytest.raises(PrismError, match="no tracepoint sched_switch"):
            BelowProbe([os.getpid()]).start()

    def test_without_rights_it_says_which(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(command: int, attribute: bytes) -> int:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(kernel, "_bpf", refuse)
        with pytest.raises(PrismError) as refused:
            BelowProbe([os.getpid()]).start()
        assert "CAP_BPF" in refused.value.remedy

    def test_nothing_stays_open(self) -> None:
        def count() -> int:
            return len(os.listdir("/proc/self/fd"))

        with BelowProbe([os.getpid()]):
            pass
        before = count()
        for _ in range(3):
            with BelowProbe([os.getpid()]) as probe:
                probe.go_deep()
        assert count() == before and probe.totals() == {} and len(probe.read()) == 0


class TestMachine:
    pytestmark = live

    def test_memory_made_free_and_a_process_killed_for_want_of_it(self) -> None:
        group = memory_group(24 << 20)
        code = (
            "import sys; sys.stdin.readline()\n"
            "kept = []\n"
            "while True: kept.append(bytearray(b'x' * (1 << 20)))\n"
        )
        with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, text=True) as child:
            try:
                (group / "cgroup.procs").write_text(str(child.pid))
                with BelowProbe([child.pid]) as probe:
                    if not {"oom", "reclaim"} <= set(probe.attached):
                        pytest.skip("; ".join(probe.missing))
                    assert child.stdin
                    child.stdin.write("go\n")
                    child.stdin.flush()
                    assert child.wait(60) == -signal.SIGKILL
                    records = probe.read()
            finally:
                child.kill()
                child.wait()
                group.rmdir()
        killed = records[records["kind"] == Kind.OOM]
        assert child.pid in killed["culprit_tgid"].tolist()
        # Whether it took long enough for a record depends on what there was to be made free.
        reclaim = records[records["kind"] == Kind.RECLAIM]
        assert set(reclaim["tgid"].tolist()) <= {child.pid}

    def test_a_segment_sent_again_on_a_socket_of_ours(self) -> None:
        """A full queue of connections drops further ones, which are asked for again after a second."""
        server, clients = socket.socket(), [socket.socket() for _ in range(4)]
        try:
            server.bind(("127.0.0.1", 0))
            server.listen(0)
            with BelowProbe([os.getpid()]) as probe:
                if "network" not in probe.attached:
                    pytest.skip("; ".join(probe.missing))
                for client in clients:
                    client.setblocking(False)
                    with contextlib.suppress(BlockingIOError):
                        client.connect(server.getsockname())
                time.sleep(2.2)
                records = probe.read()
            again = records[records["kind"] == Kind.RETRANSMIT]
            port = server.getsockname()[1]
            mine = again[(again["value"] & 0xFFFF) == port]
            assert len(mine) >= 1
            inodes = {os.fstat(client.fileno()).st_ino for client in clients}
            assert set(mine["culprit_tid"].tolist()) <= inodes
            moments = machine_spans(records, inodes)
            assert any(f"to port {port}" in span.name for span in moments)
            assert not machine_spans(again, ())
        finally:
            for opened in (server, *clients):
                opened.close()


def memory_group(limit: int) -> Path:
    """A control group of ours with so much memory, or a skip."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    path = next((line.split(":", 2)[2] for line in lines if ":memory:" in line), None)
    root = Path("/sys/fs/cgroup/memory") if path is not None else Path("/sys/fs/cgroup")
    unified = next((line[3:] for line in lines if line.startswith("0::")), "/")
    group = root / (path if path is not None else unified).lstrip("/") / f"latencyprism-{os.getpid()}"
    limits = "memory.limit_in_bytes" if path is not None else "memory.max"
    try:
        group.mkdir()
        (group / limits).write_text(str(limit))
    except OSError as error:
        with contextlib.suppress(OSError):
            group.rmdir()
        pytest.skip(f"no control group with a memory limit: {error}")
    return group
