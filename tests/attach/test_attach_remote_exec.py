"""Python 3.14 and later by words in memory: what is published is distrusted, and all is put back."""

from __future__ import annotations

import ctypes
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from latencyprism.attach import remote_exec
from latencyprism.attach.inject import Injector
from latencyprism.attach.memory import read_memory
from latencyprism.attach.permissions import conditions
from latencyprism.attach.remote_exec import RemoteExec, layouts, read_places
from latencyprism.bench import attaching
from latencyprism.errors import TargetRefused

LOOP = "print('ready')\nn = 0\nwhile True: n += 1\n"
IDLE = "import threading\nprint('ready')\nthreading.Event().wait()\n"
VERSIONS = sorted(layouts())


def _offsets(version: tuple[int, int]) -> dict[str, int]:
    """Offsets as an interpreter of that version would publish them, small and all different."""
    return {
        "runtime_size": 4096, "interpreters_head": 808, "interpreter_size": 16384, "interpreter_id": 64,
        "interpreter_next": 72, "threads_main": 80, "thread_size": 1024, "thread_interpreter": 16,
        "native_thread_id": 160, "eval_breaker": 24, "support": 296, "enabled": 7904, "pending_call": 0,
        "path": 4, "path_size": 512,
    }  # fmt: skip


class Image:
    """The memory of a made-up interpreter, in this very process: runtime, two interpreters, a thread."""

    def __init__(self, version: tuple[int, int], **changes: int) -> None:
        self.offsets = {**_offsets(version), **changes}
        layout = layouts()[version]
        self.buffer = ctypes.create_string_buffer(1 << 16)
        self.base = ctypes.addressof(self.buffer)
        self.main, self.sub, self.thread = self.base + 0x4000, self.base + 0x8000, self.base + 0xC000
        words = [0] * layout.words
        words[0] = int.from_bytes(b"xdebugpy", "little")
        words[1] = version[0] << 24 | version[1] << 16 | 10 << 8 | 0xF0
        for name, index in layout.at.items():
            words[index] = self.offsets[name]
        self.put(self.base, struct.pack(f"<{len(words)}Q", *words))
        one = _offsets(version)
        # The newest interpreter comes first; the main one is the one with number 0.
        self.word(self.base + one["interpreters_head"], self.sub)
        self.word(self.sub + one["interpreter_id"], 1)
        self.word(self.sub + one["interpreter_next"], self.main)
        self.word(self.main + one["threads_main"], self.thread)
        self.put(self.main + one["enabled"], (1).to_bytes(4, "little"))
        self.word(self.thread + one["thread_interpreter"], self.main)
        self.word(self.thread + one["native_thread_id"], os.getpid())

    def put(self, address: int, data: bytes) -> None:
        ctypes.memmove(address, data, len(data))

    def word(self, address: int, value: int) -> None:
        self.put(address, value.to_bytes(8, "little"))


@pytest.mark.parametrize("version", VERSIONS)
def test_table_of_each_known_version(version: tuple[int, int]) -> None:
    image = Image(version)
    places = read_places(os.getpid(), image.base, (*version, 10))
    assert (places.interpreters_head, places.pending_call, places.path) == (808, 296, 300)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"path_size": 256}, "256 bytes"),
        ({"interpreters_head": 5000}, "not inside"),
        ({"threads_main": 1 << 40}, "not inside"),
        ({"thread_size": 0}, "not inside"),
        ({"interpreter_size": 1 << 50}, "not inside"),
        ({"support": 600}, "place for a path"),
        ({"pending_call": 4, "path": 4}, "place for a path"),
    ],
)
def test_nonsense_is_refused(changes: dict[str, int], why: str) -> None:
    image = Image((3, 14), **changes)
    with pytest.raises(TargetRefused) as caught:
        read_places(os.getpid(), image.base, (3, 14, 10))
    assert why in caught.value.why and caught.value.remedy


def test_cookie_version_and_build_are_checked() -> None:
    image = Image((3, 14))
    with pytest.raises(TargetRefused, match=r"3\.14\.10"):
        read_places(os.getpid(), image.base, (3, 14, 9))
    with pytest.raises(TargetRefused, match="no layout"):
        read_places(os.getpid(), image.base, (3, 99, 0))
    image.word(image.base + 16, 1)
    with pytest.raises(TargetRefused, match="free-threaded"):
        read_places(os.getpid(), image.base, (3, 14, 10))
    image.put(image.base, b"xdebugPY")
    with pytest.raises(TargetRefused, match="does not begin"):
        read_places(os.getpid(), image.base, (3, 14, 10))
    with pytest.raises(TargetRefused):
        read_places(os.getpid(), 8, (3, 14, 10))


class _Identity:
    pid = os.getpid()


class _Python:
    """As much of a PythonInfo as is asked for."""

    def __init__(self, image: Image) -> None:
        self.identity, self.version, self.runtime = _Identity(), (3, 14, 10), (image.base, image.base + 4096)


def _remote(image: Image) -> RemoteExec:
    return RemoteExec(_Python(image), os.getpid())  # type: ignore[arg-type]


def test_request_and_withdrawal_touch_what_they_must(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(remote_exec, "shared_folder", lambda pid: (tmp_path, str(tmp_path)))
    stale = tmp_path / "lprism-run-3fffff-00.py"
    stale.write_text("of a writer that is gone")
    image = Image((3, 14))
    untouched = bytes(image.buffer.raw)
    image.put(image.thread + 24, bytes((0x11, 0x07)))
    remote = _remote(image)
    remote.request(b"pass\n")
    (script,) = tmp_path.iterdir()
    assert script.read_bytes() == b"pass\n" and script.stat().st_mode & 0o777 == 0o600
    raw = read_memory(os.getpid(), image.thread, 1024)
    assert raw[296:300] == b"\1\0\0\0" and raw[300:812] == str(script).encode().ljust(512, b"\0")
    assert raw[24:26] == bytes((0x1F, 0x07)), "bits are added, no other byte is written"
    with pytest.raises(TargetRefused, match="another tool"):
        _remote(image).request(b"pass\n")
    remote.withdraw()
    # The request of a writer that was killed is taken over.
    image.put(image.thread + 296, b"\1\0\0\0" + b"/dev/shm/lprism-run-3fffff-0011.py\0")
    remote.request(b"pass\n")
    remote.withdraw()
    remote.withdraw()
    image.put(image.thread + 24, bytes(2))
    assert list(tmp_path.iterdir()) == [] and image.buffer.raw == untouched


def test_interpreter_that_is_not_ready_is_refused() -> None:
    cases = {
        "switched off": lambda image: image.put(image.main + 7904, bytes(4)),
        "main thread is not to be found": lambda image: image.word(image.main + 80, 0),
        "another thread": lambda image: image.word(image.thread + 160, 1),
        "main interpreter is not": lambda image: image.word(image.sub + 72, 0),
    }
    for why, spoil in cases.items():
        image = Image((3, 14))
        spoil(image)
        with pytest.raises(TargetRefused, match=why):
            _remote(image)


@pytest.fixture
def newest() -> str:
    found = attaching.find_pythons().get("3.14")
    if found is None:
        pytest.skip("no Python 3.14 on this machine (scripts/setup_python314.py)")
    return found


def test_busy_target_is_not_stopped(start, newest: str) -> None:
    target = start(LOOP, newest)
    injector = Injector(target.pid)
    for _ in range(50):
        report = injector.run(*target.note())
        assert (report.route, report.stops, report.held_us) == ("remote", 0, 0.0)
    assert target.process.poll() is None
    remote = injector._remote
    assert remote is not None
    thread = remote._find_thread()
    assert not any(read_memory(target.pid, thread + remote._places.pending_call, 516))
    assert not list(Path("/dev/shm").glob(f"lprism-run-{os.getpid():x}-*"))


@pytest.mark.parametrize("wait", ["threading.Event().wait()", "time.sleep(60)", "os.read(os.pipe()[0], 1)",
                                  "asyncio.run(asyncio.sleep(60))"])  # fmt: skip
def test_waiting_target_is_entered_there(start, newest: str, wait: str) -> None:
    target = start(f"import asyncio, os, threading, time\nprint('ready')\n{wait}\n", newest)
    target.wait_in_syscall()
    try:
        report = Injector(target.pid).run(*target.note(), timeout_s=1.5)
    except TargetRefused as refusal:
        # A relative sleep cannot be resumed exactly: left alone.
        assert "sleep" in wait and "resumed" in refusal.why, refusal
    else:
        assert report.route == "gil"
    assert target.process.poll() is None


def test_remote_debugging_switched_off(newest: str) -> None:
    process = subprocess.Popen(
        [newest, "-X", "disable-remote-debug", "-uc", LOOP], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None and process.stdout.readline().strip() == "ready"
        with pytest.raises(TargetRefused, match="switched off") as caught:
            Injector(process.pid)
        assert "PYTHON_DISABLE_REMOTE_DEBUG" in caught.value.remedy
        assert "route" in [one.name for one in conditions(process.pid) if not one.ok]
    finally:
        process.kill()
        process.communicate()


def test_native_code_runs_nothing_later(start, newest: str) -> None:
    target = start(
        "import hashlib, sys\nprint('ready')\n"
        "hashlib.pbkdf2_hmac('sha256', b'x', b'y', 9_000_000)\nprint('done')\n"
        "sys.stdin.readline()\nprint('bye')\n",
        newest,
    )
    time.sleep(0.1)
    text, seen = target.note()
    with pytest.raises(TargetRefused, match="native code"):
        Injector(target.pid).run(text, seen, timeout_s=0.3)
    assert target.line() == "done"
    target.process.stdin.write("\n")
    target.process.stdin.flush()
    assert target.line() == "bye" and target.process.wait(5) == 0
    assert not seen()


def test_script_of_a_killed_writer_is_taken_away(start, newest: str) -> None:
    target = start(
        "import hashlib\nprint('ready')\nwhile True: hashlib.pbkdf2_hmac('sha256', b'x', b'y', 400_000)\n",
        newest,
    )
    dying = (
        "import os, signal, sys\nfrom latencyprism.attach.inject import Injector\n"
        f"one = Injector({target.pid})\none._remote.request(b'pass')\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", dying], check=False)
    time.sleep(1.0)
    Injector(target.pid).run(*target.note(), timeout_s=5)
    alive = [path for path in Path("/dev/shm").glob("lprism-run-*") if path.stat().st_uid == os.geteuid()]
    assert not [one for one in alive if not Path(f"/proc/{int(one.name.split('-')[2], 16)}").exists()]
    assert target.process.poll() is None
