"""Targets that are unlike the usual one: attached to all the same, or refused in words with a remedy."""

from __future__ import annotations

import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from latencyprism.agent.session import ProbePlan, ProbeSession
from latencyprism.attach import inject, interpreter
from latencyprism.attach.inject import Injector
from latencyprism.attach.interpreter import python_of
from latencyprism.attach.permissions import conditions
from latencyprism.attach.process import children, read_process
from latencyprism.bench import attach_target
from latencyprism.bench.attach_stand_in import StandIn
from latencyprism.bench.attaching import _plan
from latencyprism.engines.packs import load_pack
from latencyprism.errors import TargetRefused

pytestmark = pytest.mark.attach_safety

LOOP = "print('ready')\nn = 0\nwhile True: n += 1\n"
IDLE = "import threading\nprint('ready')\nthreading.Event().wait()\n"


def _why(pid: int) -> TargetRefused:
    with pytest.raises(TargetRefused) as caught:
        Injector(pid)
    return caught.value


def test_traced_by_gdb(start) -> None:
    if shutil.which("gdb") is None:
        pytest.skip("gdb is not installed")
    target = start(LOOP)
    gdb = subprocess.Popen(
        ["gdb", "-q", "-nx", "-p", str(target.pid)], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        until = time.monotonic() + 20
        while not read_process(target.pid).tracer_pid and time.monotonic() < until:
            time.sleep(0.05)
        refusal = _why(target.pid)
        assert (
            "already traced" in refusal.what and str(gdb.pid) in refusal.why and "debugger" in refusal.remedy
        )
        assert "tracer" in [one.name for one in conditions(target.pid) if not one.ok]
    finally:
        gdb.kill()
        gdb.wait()
    time.sleep(0.1)
    assert read_process(target.pid).tracer_pid == 0
    assert Injector(target.pid).run(*target.note()).stops >= 1


def test_stopped_target_is_not_resumed_and_nobody_waits_for_it(start) -> None:
    target = start(IDLE)
    injector = Injector(target.pid)
    target.process.send_signal(signal.SIGSTOP)
    time.sleep(0.05)
    began = time.monotonic()
    for attempt in (lambda: Injector(target.pid), lambda: injector.run("1", lambda: False)):
        with pytest.raises(TargetRefused, match="stopped") as caught:
            attempt()
        assert caught.value.remedy == f"kill -CONT {target.pid}"
    # Past the look at its state, at the stop itself: still refused, and still as it was.
    with pytest.raises(TargetRefused, match="stopped"):
        injector._tracer.attempt("gil", b"pass\n")
    assert time.monotonic() - began < 3
    assert read_process(target.pid).state == "T" and read_process(target.pid).tracer_pid == 0
    target.process.send_signal(signal.SIGCONT)
    injector.run(*target.note())


SUB = {
    "3.10": "import _xxsubinterpreters as s\none=s.create()\ns.run_string(one,'x=1')\n",
    "3.11": "import _xxsubinterpreters as s\none=s.create()\ns.run_string(one,'x=1')\n",
    "3.12": "import _xxsubinterpreters as s\none=s.create()\ns.run_string(one,'x=1')\n",
    "3.13": "import _interpreters as s\none=s.create()\ns.exec(one,'x=1')\n",
    "3.14": "import _interpreters as s\none=s.create()\ns.exec(one,'x=1')\n",
}


def test_sub_interpreters(start, any_python: str) -> None:
    """At work it is entered. While it waits, ``PyGILState_Check`` cannot be relied on from 3.12 on: refused
    in words there, or entered, but never forced."""
    told = subprocess.run(
        [any_python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"],
        capture_output=True,
        text=True,
    )
    begin = SUB[told.stdout.strip()]
    busy = start(begin + LOOP, any_python)
    for _ in range(5):
        Injector(busy.pid).run(*busy.note())
    assert busy.process.poll() is None
    idle = start(begin + IDLE, any_python)
    idle.wait_in_syscall()
    try:
        Injector(idle.pid).run(*idle.note(), timeout_s=0.5)
    except TargetRefused as refusal:
        assert "sub-interpreters" in refusal.why
    assert idle.process.poll() is None and read_process(idle.pid).state == "S"


def test_no_room_for_a_text(start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entered while it waits; at work it is refused, and was not touched."""
    monkeypatch.setattr(inject, "find_slots", lambda pid, maps: [])
    idle, busy = start(IDLE), start(LOOP)
    idle.wait_in_syscall()
    assert Injector(idle.pid).run(*idle.note()).route == "gil"
    text, seen = busy.note()
    injector = Injector(busy.pid)
    before = Path(f"/proc/{busy.pid}/status").read_text().partition("Threads")[0]
    with pytest.raises(TargetRefused, match="leaves room") as caught:
        injector.run(text, seen, timeout_s=0.3)
    assert caught.value.remedy
    assert not seen() and before == Path(f"/proc/{busy.pid}/status").read_text().partition("Threads")[0]


def test_little_room_is_used_by_short_texts(start, monkeypatch: pytest.MonkeyPatch) -> None:
    from latencyprism.attach.slack import Slot, find_slots

    def small(pid: int, maps: list) -> list[Slot]:
        return [Slot(pid, one.address + one.size - 256, 256) for one in find_slots(pid, maps)[:1]]

    monkeypatch.setattr(inject, "find_slots", small)
    target = start(LOOP)
    injector = Injector(target.pid)
    assert injector.run(*target.note()).route == "pending"
    text, seen = target.note()
    with pytest.raises(TargetRefused, match="leaves room"):
        injector.run(text + "#" * 240, seen, timeout_s=0.2)


MUSL = (
    "import mmap, sys\nf=open(sys.argv[1],'rb')\nm=mmap.mmap(f.fileno(),4096,access=mmap.ACCESS_READ)\n"
    + LOOP
)


def test_musl(tmp_path: Path) -> None:
    library = tmp_path / "ld-musl-x86_64.so.1"
    library.write_bytes(bytes(4096))
    process = subprocess.Popen([sys.executable, "-uc", MUSL, str(library)], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        refusal = _why(process.pid)
        assert "musl" in refusal.why and "glibc" in refusal.remedy
        assert "libc" in [one.name for one in conditions(process.pid) if not one.ok]
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("machine", ["aarch64", "riscv64"])
def test_other_machine(start, monkeypatch: pytest.MonkeyPatch, machine: str) -> None:
    target = start(LOOP)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    refusal = _why(target.pid)
    assert "x86_64" in refusal.why and machine in refusal.why and refusal.remedy
    assert "machine" in [one.name for one in conditions(target.pid) if not one.ok]


# A 32-bit program that pauses for ever: mov $29 (pause), %eax; int $0x80; jmp back.
PAUSE_32 = bytes.fromhex("b81d000000cd80ebf7")


def _program_32() -> bytes:
    import struct

    ident = b"\x7fELF\x01\x01\x01" + bytes(9)
    header = struct.pack("<HHIIIIIHHHHHH", 2, 3, 1, 0x8048054, 52, 0, 0, 52, 32, 1, 0, 0, 0)
    size = 84 + len(PAUSE_32)
    return ident + header + struct.pack("<8I", 1, 0, 0x8048000, 0x8048000, size, size, 5, 4096) + PAUSE_32


def test_32_bit_program(tmp_path: Path) -> None:
    path = tmp_path / "pause"
    path.write_bytes(_program_32())
    path.chmod(0o755)
    try:
        process = subprocess.Popen([str(path)])
    except OSError:
        pytest.skip("this kernel runs no 32-bit programs")
    try:
        time.sleep(0.1)
        if process.poll() is not None:
            pytest.skip("this kernel runs no 32-bit programs")
        refusal = _why(process.pid)
        assert "64-bit" in refusal.why and refusal.remedy
        assert not next(one for one in conditions(process.pid) if one.name == "machine").ok
    finally:
        process.kill()
        process.wait()


def test_free_threaded_is_refused_by_its_symbols(start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told by a function that only such a build has; here one that every build has stands for it."""
    target = start(LOOP)
    monkeypatch.setattr(interpreter, "_OPTIONAL", ("Py_Version", "Py_IncRef"))
    monkeypatch.setattr(interpreter, "_FREE_THREADED", "Py_IncRef")
    refusal = _why(target.pid)
    assert "free-threaded" in refusal.why and "GIL" in refusal.remedy


def _plan_of(module: str, owner: str) -> ProbePlan:
    entry = load_pack("vllm").ranges[-1]
    return ProbePlan(
        "vllm", "engine+worker", 0, {name: (module, owner, hook[2]) for name, hook in entry.hooks.items()}
    )


HALF = """
import sys, types
module = types.ModuleType('engine_half_there')
sys.modules['engine_half_there'] = module
print('ready')
n = 0
while True: n += 1
"""


def test_half_imported_modules(start) -> None:
    """The module is there, its class is not yet: refused in words, nothing stays, and later it works."""
    target = start(HALF)
    with pytest.raises(TargetRefused, match="nothing to hook"):
        ProbeSession(target.pid, _plan_of("engine_half_there", "Scheduler"), slots=16)
    path = target.folder / "names"
    left = "','.join(sorted(m for m in __import__('sys').modules if 'latencyprism' in m))+'.'"
    Injector(target.pid).run(
        f"open({str(path)!r},'w').write({left})", lambda: path.exists() and path.read_text() != ""
    )
    assert path.read_text() == "."


def test_target_that_ends_while_a_probe_is_attached() -> None:
    for delay_ms in range(0, 30, 3):
        with StandIn(sys.executable) as target:
            victim = os.fork()
            if victim == 0:
                time.sleep(delay_ms / 1000)
                os.kill(target.pid, signal.SIGKILL)
                os._exit(0)
            try:
                ProbeSession(target.pid, _plan(), slots=16).close()
            except TargetRefused as refusal:
                assert "gone" in str(refusal) or "ended" in str(refusal), refusal
            os.waitpid(victim, 0)


@pytest.fixture
def inside() -> Iterator[Callable[[list[str]], int]]:
    """``inside(["--mount", ...])``: pid, as seen here, of a stand-in in namespaces of its own."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("needs uid 0 and unshare")
    holders: list[subprocess.Popen[str]] = []

    def begin(kinds: list[str], folder: Path) -> int:
        (folder / "loop").write_bytes(bytes(8 * (attach_target.LOOP_STAMPS + attach_target.STAMPS)))
        os.mkfifo(folder / "wake")
        private = "mount -t tmpfs none /dev/shm && " if "--mount" in kinds else ""
        command = f"{private}exec {sys.executable} {attach_target.__file__} {folder}"
        holder = subprocess.Popen(["unshare", *kinds, "--fork", "sh", "-c", command], text=True)
        holders.append(holder)
        until = time.monotonic() + 10
        while time.monotonic() < until:
            if (folder / "loop").read_bytes()[:8] != bytes(8):
                return children(holder.pid)[0].pid
            if holder.poll() is not None:
                pytest.skip("unshare is not permitted here")
            time.sleep(0.05)
        raise AssertionError("the target did not start")

    yield begin
    for holder in holders:
        for child in children(holder.pid):
            os.kill(child.pid, signal.SIGKILL)
        holder.kill()
        holder.wait()


@pytest.mark.root
@pytest.mark.parametrize(
    "kinds", [["--pid"], ["--mount"], ["--pid", "--mount", "--mount-proc"]], ids=" ".join
)
def test_whole_attachment_in_namespaces_of_its_own(inside, kinds: list[str], tmp_path: Path) -> None:
    """The probe's files go into the target's own /dev/shm, under the path that it sees."""
    pid = inside(kinds, tmp_path)
    info = read_process(pid)
    assert (info.ns_pid != pid) == ("--pid" in kinds)
    session = ProbeSession(pid, _plan(), slots=64)
    try:
        until = time.monotonic() + 3
        while not session.ring.pending() and time.monotonic() < until:
            time.sleep(0.01)
        assert session.ring.pending() > 0
    finally:
        assert session.close()
    assert not list(Path(f"/proc/{pid}/root/dev/shm").glob(f"lprism-{session.nonce:016x}*"))
    assert all(one.ok for one in conditions(pid)), [one for one in conditions(pid) if not one.ok]
    if "--mount" in kinds:
        assert "of its own" in next(one for one in conditions(pid) if one.name == "folder").detail


def test_interpreter_started_through_the_loader(tmp_path: Path) -> None:
    """The executable is then the dynamic loader; the interpreter is one of the files it mapped."""
    loader = next(
        (
            path
            for path in ("/lib64/ld-linux-x86-64.so.2", "/lib/ld-linux-x86-64.so.2")
            if os.path.exists(path)
        ),
        None,
    )
    if loader is None:
        pytest.skip("no dynamic loader in the usual places")
    ack = tmp_path / "ack"
    process = subprocess.Popen(
        [loader, os.path.realpath(sys.executable), "-uc", LOOP], stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None and process.stdout.readline()
        assert "python" in os.path.basename(python_of(process.pid).module)
        Injector(process.pid).run(f"open({str(ack)!r},'w').close()", ack.exists)
    finally:
        process.kill()
        process.communicate()


def test_static_interpreter(start) -> None:
    """The distribution's own: the interpreter is part of the executable, and few libraries are mapped."""
    system = next(
        (path for path in ("/usr/bin/python3", "/usr/bin/python3.11") if os.path.exists(path)), None
    )
    if system is None:
        pytest.skip("no Python of the distribution's own")
    busy, idle = start(LOOP, system), start(IDLE, system)
    info = python_of(busy.pid)
    if not info.static:
        pytest.skip("the distribution's Python is not static")
    assert "libpython" not in info.module
    for _ in range(10):
        assert Injector(busy.pid).run(*busy.note()).route in ("pending", "remote")
    idle.wait_in_syscall()
    assert Injector(idle.pid).run(*idle.note()).route == "gil"
    assert busy.process.poll() is None and idle.process.poll() is None
