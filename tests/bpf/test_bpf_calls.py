"""Timed calls: right, complete, only where asked for; libraries gone, stripped or of another version."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from bpf_targets import Caller

from latencyprism.attach.maps import open_mapped, read_maps
from latencyprism.bench.bpf import StubTarget, come_and_go, killed, stream
from latencyprism.bpf import kernel
from latencyprism.bpf.calls import CALL_DTYPE, CallProbe, Function
from latencyprism.bpf.loader import LoadedObject
from latencyprism.bpf.stubs import CLASSES, ENDBR64, NOP, OTHER, PUSH, StubFile, class_of
from latencyprism.errors import BadInput, PrismError, TargetRefused

live = [pytest.mark.bpf, pytest.mark.root]
gcc = pytest.mark.skipif(not shutil.which("gcc"), reason="gcc is not installed")

_SOURCE = """
#include <time.h>
long lp_wait(long ms, long b, long c) {
    struct timespec t = {0, ms * 1000000}; nanosleep(&t, 0); return ms + b + c;
}
long lp_quick(long a) { return a + 1; }
"""
_TARGET = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
print("ready", flush=True)
for line in sys.stdin:
    print(library.lp_wait(int(line), 20, 3), library.lp_quick(1), flush=True)
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("library")
    (folder / "source.c").write_text(_SOURCE)
    path = folder / "liblp.so"
    subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-o", path, folder / "source.c"], check=True)
    return path


class Target:
    """A Python process that has ``path`` mapped and calls it."""

    def __init__(self, path: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _TARGET, str(path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.process.stdout and self.process.stdout.readline() == "ready\n"
        self.mapping = next(
            m
            for m in read_maps(self.process.pid)
            if m.path.removesuffix(" (deleted)") == str(path) and "x" in m.perms
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    def call(self, ms: int) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(f"{ms}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == f"{ms + 23} 2\n"

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def target(library: Path, tmp_path: Path) -> Iterator[Target]:
    own = tmp_path / "liblp.so"
    shutil.copy(library, own)
    started = Target(own)
    yield started
    started.close()


def probe(target: Target, *functions: Function, **more: object) -> CallProbe:
    file = open_mapped(target.pid, target.mapping)
    try:
        return CallProbe(target.pid, [file], functions, **more)  # type: ignore[arg-type]
    finally:
        os.close(file)


def test_the_first_instruction_tells_the_class() -> None:
    for first, kind in (
        (b"\x55\x48\x89\xe5", PUSH), (b"\x41\x57\x41\x56", PUSH), (b"\xf3\x0f\x1e\xfa", ENDBR64),
        (b"\x0f\x1f\x44\x00\x00", NOP), (b"\x48\x83\xec\x08", OTHER), (b"", OTHER), (b"\x41", OTHER),
    ):  # fmt: skip
        assert class_of(first, "x86_64") == kind
    assert class_of(b"\x55", "aarch64") == OTHER
    assert CALL_DTYPE.itemsize == 56


def test_stubs_of_every_class_run_as_often_as_told() -> None:
    file = StubFile(clones=3)
    try:
        for kind, stub in file.stubs.items():
            code = ctypes.string_at(file.address(stub.offset), 8)
            assert kind in CLASSES and class_of(code) == kind
            begun = time.perf_counter()
            file.run(kind, 1_000_000)
            assert time.perf_counter() - begun > 0.0001
            file.run(kind, 0)
        assert len(set(file.clones)) == 3
    finally:
        file.close()


@gcc
class TestCalls:
    pytestmark = live

    @pytest.mark.parametrize("ways", [("session",), ("multi",), ("perf",)])
    def test_a_call_is_timed(self, target: Target, ways: tuple[str, ...]) -> None:
        try:
            watch = probe(target, Function("lp_wait"), Function("lp_quick"), ways=ways)
        except PrismError as error:
            pytest.skip(f"{ways[0]}: {error}")
        try:
            before = time.monotonic_ns()
            target.call(10)
            after = time.monotonic_ns()
            calls = watch.read()
            assert calls["function"].tolist() == [0, 1] and calls["tid"].tolist() == [target.pid] * 2
            assert before <= calls["start_ns"][0] <= calls["end_ns"][0] - 10e6 <= calls["end_ns"][1] <= after
            assert calls["result"].tolist() == [33, 2] and watch.way == ways[0]
            assert [t.calls for t in watch.totals()] == [1, 1] and watch.lost == watch.untimed == 0
        finally:
            watch.close()
        target.call(1)

    def test_arguments_where_they_are_wanted(self, target: Target) -> None:
        watch = probe(target, Function("lp_wait", args=True), Function("lp_quick", returns=False))
        try:
            target.call(2)
            first, second = sorted(watch.read(), key=lambda call: int(call["function"]))
        finally:
            watch.close()
        assert first["args"].tolist() == [2, 20, 3] and first["result"] == 25
        assert second["start_ns"] == second["end_ns"] and second["args"][0] == 1

    def test_quick_calls_only_count(self, target: Target) -> None:
        watch = probe(
            target, Function("lp_wait", min_ns=5_000_000), Function("lp_quick", stream=False)
        )  # fmt: skip
        try:
            for ms in (1, 10, 1):
                target.call(ms)
            assert watch.read()["function"].tolist() == [0]
            wait, quick = watch.totals()
            assert wait.calls == quick.calls == 3
            assert wait.total_ns > 12e6 and 10e6 < wait.longest_ns < wait.total_ns
        finally:
            watch.close()

    def test_what_was_read_stays_as_it_was(self, target: Target) -> None:
        watch = probe(target, Function("lp_wait", returns=False), ring_bytes=4096)
        target.call(1)
        one = watch.read()
        kept = one.copy()
        for _ in range(70):  # more than the ring holds
            target.call(0)
            watch.read()
        assert one == kept
        watch.close()
        assert one == kept

    def test_what_is_dropped_is_no_longer_hit_and_the_rest_is(self, target: Target) -> None:
        file = open_mapped(target.pid, target.mapping)
        watch = CallProbe(target.pid, [file], [Function("lp_wait"), Function("lp_quick")])
        try:
            target.call(1)
            watch.drop([1])
            assert watch.attached == (0,)
            target.call(1)
            assert [t.calls for t in watch.totals()] == [2, 1]
            watch.drop([0])
            target.call(1)
            assert watch.attached == () and [t.calls for t in watch.totals()] == [2, 1]
        finally:
            watch.close()
            os.close(file)

    def test_a_full_ring_is_counted_and_the_totals_are_whole(self, target: Target) -> None:
        watch = probe(target, Function("lp_quick", returns=False), ring_bytes=4096)
        try:
            for _ in range(100):
                target.call(0)
            kept = len(watch.read())
            assert kept + watch.lost == 100 and 0 < kept <= 64
            assert watch.totals()[0].calls == 100
        finally:
            watch.close()


@gcc
class TestBadLibraries:
    pytestmark = live

    def test_deleted_while_mapped(self, target: Target) -> None:
        os.unlink(target.mapping.path)
        again = next(m for m in read_maps(target.pid) if m.start == target.mapping.start)
        target.mapping = again
        watch = probe(target, Function("lp_wait"))
        try:
            target.call(1)
            assert len(watch.read()) == 1
        finally:
            watch.close()

    def test_replaced_while_mapped(self, target: Target, tmp_path: Path) -> None:
        other = tmp_path / "other.so"
        other.write_bytes(b"not a library at all")
        os.replace(other, target.mapping.path)
        target.mapping = next(m for m in read_maps(target.pid) if m.start == target.mapping.start)
        watch = probe(target, Function("lp_wait"))
        try:
            target.call(1)
            assert len(watch.read()) == 1
        finally:
            watch.close()

    @pytest.mark.skipif(not shutil.which("strip"), reason="strip is not installed")
    def test_stripped(self, library: Path, tmp_path: Path) -> None:
        own = tmp_path / "liblp.so"
        shutil.copy(library, own)
        subprocess.run(["strip", "--strip-all", own], check=True)
        target = Target(own)
        try:
            watch = probe(target, Function("lp_wait"))
            target.call(1)
            assert len(watch.read()) == 1
            watch.close()
        finally:
            target.close()

    def test_a_function_of_another_version_is_named_and_the_rest_is_probed(self, target: Target) -> None:
        watch = probe(target, Function("lp_of_the_future"), Function("lp_wait"))
        try:
            assert watch.missing == ["lp_of_the_future"] and watch.attached == (1,)
            target.call(1)
            assert watch.read()["function"].tolist() == [1]
        finally:
            watch.close()
        with pytest.raises(TargetRefused, match="lp_of_the_future"):
            probe(target, Function("lp_of_the_future"))

    def test_no_library_at_all(self, target: Target, tmp_path: Path) -> None:
        junk = tmp_path / "junk"
        junk.write_bytes(b"\x7fELF" + os.urandom(200))
        file = os.open(junk, os.O_RDONLY)
        try:
            with pytest.raises(BadInput):
                CallProbe(target.pid, [file], [Function("lp_wait")])
        finally:
            os.close(file)
        with pytest.raises(BadInput):
            CallProbe(target.pid, [], [])


@gcc
class TestOldKernels:
    pytestmark = live

    def test_without_sessions_two_probes_do(self, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = LoadedObject.load

        def load(
            self: LoadedObject, section: str, kind: int, attach_type: int = 0, attach_btf_id: int = 0
        ) -> int:
            if attach_type == kernel.ATTACH_UPROBE_SESSION:
                raise kernel.FeatureMissing("cannot load", "Invalid argument")
            return whole(self, section, kind, attach_type, attach_btf_id)

        monkeypatch.setattr(LoadedObject, "load", load)
        watch = probe(target, Function("lp_wait"))
        try:
            target.call(1)
            assert watch.way == "multi" and len(watch.read()) == 1
        finally:
            watch.close()

    def test_without_multi_links_perf_events_do(
        self, target: Target, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def missing(*_: object, **__: object) -> int:
            raise kernel.FeatureMissing("cannot attach uprobes", "Invalid argument")

        monkeypatch.setattr(kernel, "link_uprobe_multi", missing)
        watch = probe(target, Function("lp_wait"))
        try:
            target.call(1)
            assert watch.way == "perf" and len(watch.read()) == 1
        finally:
            watch.close()

    def test_without_rings_it_is_refused_with_what_is_needed(
        self, target: Target, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = kernel.map_create

        def create(kind: int, *rest: object) -> int:
            if kind == kernel.MAP_RINGBUF:
                raise kernel.refused("cannot create the eBPF map ring", OSError(22, "Invalid argument"))
            return whole(kind, *rest)  # type: ignore[arg-type]

        monkeypatch.setattr(kernel, "map_create", create)
        with pytest.raises(PrismError) as refused:
            probe(target, Function("lp_wait"))
        assert "Linux" in refused.value.remedy

    def test_another_process_is_not_seen(self, caller: Caller, target: Target) -> None:
        watch = probe(target, Function("lp_wait"))
        try:
            caller.call(10)
            assert len(watch.read()) == 0
        finally:
            watch.close()


@pytest.mark.bpf
@pytest.mark.root
def test_a_killed_profiler_leaves_nothing_and_the_target_goes_on() -> None:
    result = killed(3, lambda _: None)
    assert result["unharmed"] == result["gone_within_1s"] == 3


@pytest.mark.bpf
@pytest.mark.root
def test_a_target_that_ends_under_a_probe_is_no_trouble() -> None:
    target = StubTarget()
    stub = target.file.stubs[target.kind]
    watch = CallProbe(target.pid, [target.file.descriptor], [Function("stub", offset=stub.offset)])
    target.order("run 1000")
    target.hear()
    target.process.kill()
    target.process.wait()
    assert len(watch.read()) == 1000
    watch.close()
    target.close()
    with pytest.raises(PrismError, match="gone"):
        file = StubFile()
        CallProbe(target.pid, [file.descriptor], [Function("stub", offset=stub.offset)])


@pytest.mark.bpf
@pytest.mark.root
def test_every_call_comes_out_as_a_record_or_as_lost() -> None:
    result = stream(0.5, 20_000)
    assert result["events"] > 5_000 and result["lost"] == 0
    assert 0 < result["reader_cpu"] < 1
    come = come_and_go(rounds=1)
    assert come["pairs"] == 100 and come["attach_s"] > 0 and come["way"] in ("session", "multi", "perf")
    json.dumps({**result, **come})
