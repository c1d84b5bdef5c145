"""Probes on a real function in a real process: exact, only there, and gone when they should be."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from bpf_targets import Caller, start_caller

from latencyprism.attach.elf import Elf
from latencyprism.bpf import kernel
from latencyprism.bpf.loader import LoadedObject, read_object
from latencyprism.bpf.native import RETURN, NativeProbe, Point, entry_offset
from latencyprism.errors import BadInput, PrismError, TargetRefused

pytestmark = [pytest.mark.bpf, pytest.mark.root]

SYMBOL = "wctob"


def probe(target: Caller, *points: Point, ring_bytes: int = 1 << 20) -> NativeProbe:
    file = target.open_library()
    try:
        return NativeProbe(target.pid, [file], points, ring_bytes=ring_bytes)
    finally:
        os.close(file)


def first_instruction(target: Caller) -> bytes:
    """The bytes the target executes at the probed place."""
    library = target.library()
    file = target.open_library()
    try:
        with Elf(file) as elf:
            offset = entry_offset(elf, elf.lookup([SYMBOL])[SYMBOL].value)
    finally:
        os.close(file)
    assert offset is not None
    memory = os.open(f"/proc/{target.pid}/mem", os.O_RDONLY)
    try:
        return os.pread(memory, 4, library.start + offset - library.offset)
    finally:
        os.close(memory)


def test_every_call_and_return_is_seen_in_order_with_arguments(caller: Caller) -> None:
    watch = probe(caller, Point(SYMBOL), Point(SYMBOL, "hit_return"))
    try:
        before_ns = time.monotonic_ns()
        caller.call(500)
        after_ns = time.monotonic_ns()
        hits = list(watch.read())
        assert watch.lost == 0 and watch.seen == len(hits) == 1000
    finally:
        watch.close()
    entries, returns = hits[0::2], hits[1::2]
    assert {hit.point for hit in entries} == {0} and {hit.point for hit in returns} == {1}
    assert {hit.args[0] & 0xFFFFFFFF for hit in entries} == {65}
    assert {(hit.args[0] & 0xFFFFFFFF, hit.flags) for hit in returns} == {(65, RETURN)}
    assert {hit.tid for hit in hits} == {caller.pid}
    times = [hit.time_ns for hit in hits]
    assert times == sorted(times) and before_ns <= times[0] <= times[-1] <= after_ns


def test_another_process_with_the_same_library_is_not_seen(caller: Caller) -> None:
    watch, other = probe(caller, Point(SYMBOL)), start_caller()
    try:
        other.call(100)
        assert list(watch.read()) == [] and watch.seen == 0
    finally:
        watch.close()
        other.process.kill()
        other.process.communicate()


def test_only_the_first_of_repeated_hits_when_asked(caller: Caller) -> None:
    watch = probe(caller, Point(SYMBOL, first=True))
    try:
        caller.call(50)
        assert len(list(watch.read())) == 1 and watch.seen == 50
    finally:
        watch.close()


def test_the_descriptor_becomes_readable_when_a_waking_point_is_hit(caller: Caller) -> None:
    watch = probe(caller, Point(SYMBOL, wake=True))
    try:
        poll = select.epoll()
        poll.register(watch.fileno(), select.EPOLLIN)
        assert poll.poll(0) == []
        caller.call(1)
        assert poll.poll(2) and len(list(watch.read())) == 1
        assert poll.poll(0) == []
        poll.close()
    finally:
        watch.close()


def test_wake_ups_keep_their_interval(caller: Caller) -> None:
    file = caller.open_library()
    watch = NativeProbe(caller.pid, [file], [Point(SYMBOL, wake=True)], wake_interval_ns=300_000_000)
    os.close(file)
    try:
        poll = select.epoll()
        poll.register(watch.fileno(), select.EPOLLIN)
        caller.call(1)
        assert poll.poll(2) and len(list(watch.read())) == 1
        assert poll.poll(0) == []
        caller.call(1)
        assert poll.poll(0) == []
        assert len(list(watch.read())) == 1
        time.sleep(0.3)
        caller.call(1)
        assert poll.poll(2)
        poll.close()
    finally:
        watch.close()


def test_only_a_long_time_between_two_hits_wakes_while_asked_for(caller: Caller) -> None:
    watch = probe(caller, Point(SYMBOL, wake=True))
    try:
        poll = select.epoll()
        poll.register(watch.fileno(), select.EPOLLIN)
        watch.wake_after(200_000_000)
        caller.call(1)  # the first of all: nothing is known of the time before it
        list(watch.read())
        poll.poll(0)
        caller.call(1)
        time.sleep(0.02)
        assert poll.poll(0) == [] and len(list(watch.read())) == 1
        time.sleep(0.25)
        caller.call(1)
        assert poll.poll(2) and len(list(watch.read())) == 1
        assert poll.poll(0) == []
        watch.wake_after(0)
        caller.call(1)
        assert poll.poll(2) and len(list(watch.read())) == 1
        poll.close()
    finally:
        watch.close()


def test_many_times_a_little_too_long_wake_together(caller: Caller) -> None:
    watch = probe(caller, Point(SYMBOL, wake=True))
    try:
        poll = select.epoll()
        poll.register(watch.fileno(), select.EPOLLIN)
        caller.call(1)
        poll.poll(0)
        # Long: a minute. Late: beyond none at all, by more than half a second together.
        watch.wake_after(60_000_000_000, typical_1024=0, spare_ns=500_000_000)
        list(watch.read())
        begun = time.monotonic()
        while not poll.poll(0):
            assert time.monotonic() - begun < 5.0
            time.sleep(0.02)
            caller.call(1)
        assert time.monotonic() - begun > 0.4
        list(watch.read())
        assert poll.poll(0) == []
        watch.wake_after(60_000_000_000, typical_1024=1024, spare_ns=500_000_000)
        for _ in range(30):
            time.sleep(0.02)
            caller.call(1)
        assert poll.poll(0) == []  # none was late
        poll.close()
    finally:
        watch.close()


def test_what_a_full_ring_loses_is_counted(caller: Caller) -> None:
    watch = probe(caller, Point(SYMBOL), ring_bytes=4096)
    try:
        caller.call(300)
        kept = len(list(watch.read()))
        assert kept == 4096 // 64 - 1 or kept == 4096 // 64
        lost = watch.lost
        assert kept + lost == watch.seen == 300
        # The ring works on after that, around its end, many times over.
        for _ in range(20):
            caller.call(40)
            assert len(list(watch.read())) == 40
    finally:
        watch.close()
    assert watch.lost == lost and watch.seen == 1100


def test_close_takes_the_breakpoint_out_of_the_target(caller: Caller) -> None:
    clean = first_instruction(caller)
    watch = probe(caller, Point(SYMBOL))
    try:
        caller.call(1)
        assert first_instruction(caller) != clean
    finally:
        watch.close()
    watch.close()
    assert first_instruction(caller) == clean
    caller.call(10)


_PROBER = """
import os, sys, time
from latencyprism.attach.maps import open_mapped, read_maps
from latencyprism.bpf.native import NativeProbe, Point
pid = int(sys.argv[1])
mapping = next(m for m in read_maps(pid) if os.path.basename(m.path).startswith("libc.so"))
probe = NativeProbe(pid, [open_mapped(pid, mapping)], [Point("wctob"), Point("wctob", "hit_return")])
print("attached", flush=True)
time.sleep(60)
"""


def test_perf_events_do_the_same_where_links_of_many_are_unknown(caller: Caller) -> None:
    clean = first_instruction(caller)
    file = caller.open_library()
    watch = NativeProbe(caller.pid, [file], [Point(SYMBOL), Point(SYMBOL, "hit_return")], links="perf")
    os.close(file)
    try:
        caller.call(200)
        hits = list(watch.read())
        assert [hit.point for hit in hits] == [0, 1] * 200 and watch.lost == 0
    finally:
        watch.close()
    assert first_instruction(caller) == clean
    caller.call(10)


@pytest.mark.attach_safety
def test_a_killed_prober_leaves_the_target_unharmed_and_without_probes(caller: Caller) -> None:
    clean = first_instruction(caller)
    prober = subprocess.Popen(
        [sys.executable, "-c", _PROBER, str(caller.pid)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert prober.stdout and prober.stdout.readline() == "attached\n"
        caller.call(100)
        assert first_instruction(caller) != clean
    finally:
        prober.send_signal(signal.SIGKILL)
        prober.communicate()
    deadline = time.monotonic() + 5
    while first_instruction(caller) != clean:
        assert time.monotonic() < deadline, "the probe outlived its owner"
        time.sleep(0.02)
    caller.call(100)
    assert caller.process.poll() is None


def test_a_function_that_is_not_there_is_named(caller: Caller) -> None:
    with pytest.raises(TargetRefused, match="no_such_function"):
        probe(caller, Point("no_such_function"))


def test_a_process_that_ended_is_named() -> None:
    target = start_caller()
    file = target.open_library()
    target.process.kill()
    target.process.communicate()
    try:
        with pytest.raises(PrismError, match=f"process {target.pid} is gone"):
            NativeProbe(target.pid, [file], [Point(SYMBOL)])
    finally:
        os.close(file)


def test_nothing_stays_open_after_close_or_failure(caller: Caller) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    probe(caller, Point(SYMBOL)).close()
    with pytest.raises(PrismError):
        probe(caller, Point(SYMBOL, program="no_such_program"))
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_without_rights_the_error_says_which_are_missing() -> None:
    code = (
        "import os; from latencyprism.bpf import kernel; os.setuid(65534); kernel.map_create(27, 0, 0, 4096)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30).stderr
    assert "CAP_BPF" in said and "CAP_PERFMON" in said


def test_an_unknown_constant_is_refused() -> None:
    with pytest.raises(BadInput, match="no_such_constant"):
        LoadedObject(read_object(f"native_step.{kernel.supported_machine()}"), {"no_such_constant": 1})


def test_a_refused_program_gives_the_verifiers_reason() -> None:
    name = f"native_step.{kernel.supported_machine()}"
    loaded = LoadedObject(read_object(name))
    try:
        with pytest.raises(PrismError, match="verifier"):
            kernel.program_load(
                kernel.PROG_KPROBE,
                "broken",
                bytes([0x95]) + bytes(7),
                btf=0,
                func_info=b"",
                core_relocations=b"",
            )
        with pytest.raises(PrismError, match="without function information"):
            kernel.program_load(
                kernel.PROG_KPROBE,
                "broken",
                bytes([0x95]) + bytes(7),
                btf=0,
                func_info=b"",
                core_relocations=bytes(16),
            )
    finally:
        loaded.close()


def test_objects_are_packaged_with_their_sources() -> None:
    folder = Path(kernel.__file__).parent / "programs"
    assert {"lp_bpf.h", "native_step.bpf.c", "below.bpf.c", "below.bpf.o"} <= {
        p.name for p in folder.iterdir()
    }
