"""Processes that must not be attached to are refused with a reason, untouched."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from latencyprism.attach.inject import MAX_TEXT_BYTES, Injector
from latencyprism.attach.interpreter import python_of
from latencyprism.attach.process import children, read_process
from latencyprism.attach.ptrace import Tracee, in_tracer_thread
from latencyprism.errors import TargetRefused

pytestmark = pytest.mark.attach_safety

LOOP = "print('ready')\nn = 0\nwhile True: n += 1\n"


def test_not_python(start) -> None:
    sleeper = subprocess.Popen(["sleep", "30"])
    try:
        time.sleep(0.1)
        with pytest.raises(TargetRefused, match="not Python"):
            Injector(sleeper.pid)
    finally:
        sleeper.kill()
        sleeper.wait()


@pytest.mark.parametrize("pid", [0, -1, 1 << 22, 1 << 40, True])
def test_no_such_process(pid: int) -> None:
    with pytest.raises(TargetRefused):
        Injector(pid)


def test_itself() -> None:
    with pytest.raises(TargetRefused, match="this one"):
        Injector(os.getpid())


def test_stopped_target_stays_stopped(start) -> None:
    target = start(LOOP)
    injector = Injector(target.pid)
    target.process.send_signal(signal.SIGSTOP)
    time.sleep(0.1)
    for attempt in (lambda: Injector(target.pid), lambda: injector.run("1", lambda: False)):
        with pytest.raises(TargetRefused, match="stopped"):
            attempt()
    assert read_process(target.pid).state == "T"
    target.process.send_signal(signal.SIGCONT)
    report = Injector(target.pid).run(*target.note())
    assert report.stops >= 1


def test_zombie(start) -> None:
    target = start("print('ready')")
    time.sleep(0.3)
    with pytest.raises(TargetRefused, match="zombie"):
        Injector(target.pid)
    assert not read_process(target.pid).identity.alive()


def test_already_traced(start) -> None:
    target = start(LOOP)
    injector = Injector(target.pid)
    traced, release = threading.Event(), threading.Event()

    def trace() -> None:
        with Tracee(target.pid) as tracee:
            traced.set()
            release.wait(20)
            # Letting go needs a stop.
            tracee.stop()

    holder = threading.Thread(target=lambda: in_tracer_thread(trace))
    holder.start()
    try:
        assert traced.wait(5)
        for attempt in (lambda: python_of(target.pid), lambda: injector.run("1", lambda: False)):
            with pytest.raises(TargetRefused, match="already traced"):
                attempt()
    finally:
        release.set()
        holder.join()
    assert injector.run(*target.note()).route == "pending"


def test_target_that_ends_meanwhile(start) -> None:
    """Killed at random moments of attaching: refused as gone, or done; never another error, never a hang."""
    for delay_ms in range(12):
        target = start(LOOP)
        injector = Injector(target.pid)
        killer = threading.Timer(delay_ms / 4000, target.process.kill)
        killer.start()
        try:
            for _ in range(100):
                injector.run(*target.note())
        except TargetRefused as refused:
            assert "gone" in refused.what or "ended" in refused.what, refused
        killer.join()
        # Its end is still there for the parent that waits for it.
        assert target.process.wait(5) == -signal.SIGKILL


def test_target_that_becomes_another_program(start) -> None:
    target = start(
        "import os, sys\nprint('ready')\nsys.stdin.readline()\n"
        f"os.execv({sys.executable!r}, ['python', '-uc', \"print('second')\\nwhile True: pass\"])\n"
    )
    injector = Injector(target.pid)
    target.process.stdin.write("\n")
    target.process.stdin.flush()
    assert target.line() == "second"
    with pytest.raises(TargetRefused):
        injector.run(*target.note())
    assert target.process.poll() is None
    assert Injector(target.pid).run(*target.note()).stops >= 1


@pytest.mark.parametrize("text", ["", "a\0b", "x" * (MAX_TEXT_BYTES + 1)])
def test_text_that_does_not_fit_is_a_mistake_of_the_caller(start, text: str) -> None:
    target = start(LOOP)
    with pytest.raises(ValueError, match="bytes"):
        Injector(target.pid).run(text, lambda: True)


def test_longest_text_fits(start) -> None:
    target = start(LOOP)
    text, seen = target.note()
    Injector(target.pid).run(text + "#" * (MAX_TEXT_BYTES - len(text)), seen)


@pytest.mark.root
def test_other_user_and_missing_capability(start) -> None:
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("needs uid 0 and setpriv")
    target = start(LOOP)
    look = (
        "from latencyprism.attach.interpreter import python_of\n"
        "from latencyprism.errors import TargetRefused\n"
        f"try: python_of({target.pid}); print('reached')\nexcept TargetRefused as refused: print(refused)\n"
    )
    for drop in (
        ["--bounding-set=-sys_ptrace", "--inh-caps=-sys_ptrace"],
        ["--reuid=65534", "--clear-groups"],
    ):
        told = subprocess.run(
            ["setpriv", *drop, sys.executable, "-c", look], capture_output=True, text=True, check=False
        )
        if told.returncode and not told.stdout:
            pytest.skip(f"the dropped user cannot run this interpreter: {told.stderr.strip()[-80:]}")
        assert "CAP_SYS_PTRACE" in told.stdout, told


@pytest.mark.root
def test_own_namespaces(start, tmp_path) -> None:
    """A target in its own pid and mount namespace is attached to with the pid it has outside."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("needs uid 0 and unshare")
    ack = tmp_path / "ack"
    holder = subprocess.Popen(
        ["unshare", "--pid", "--mount", "--fork", sys.executable, "-uc", LOOP],
        stdout=subprocess.PIPE,
        text=True,
    )
    inner = None
    try:
        assert holder.stdout is not None
        if holder.stdout.readline().strip() != "ready":
            pytest.skip("unshare is not permitted here")
        inner = children(holder.pid)[0].pid
        assert read_process(inner).ns_pid == 1
        Injector(inner).run(f"open({str(ack)!r},'w').close()", ack.exists)
    finally:
        if inner is not None:
            os.kill(inner, signal.SIGKILL)
        holder.kill()
        holder.communicate()
