"""The conditions that `check` shows, and what is known of an interpreter before it is touched."""

from __future__ import annotations

import os
import signal
import subprocess
import time

from latencyprism.attach import access
from latencyprism.attach.interpreter import python_of
from latencyprism.attach.permissions import conditions
from latencyprism.attach.shared_folder import sweep

LOOP = "import time\nprint('ready')\nwhile True: time.sleep(0.01)\n"
NAMES = ["process", "state", "tracer", "rights", "access", "yama", "machine", "libc"]


def test_good_target_meets_all(start) -> None:
    target = start(LOOP)
    found = conditions(target.pid)
    names = [*NAMES, "python", "route", "room", "folder", "main thread", "namespaces"]
    assert [one.name for one in found] == names
    assert all(one.ok for one in found), found
    assert all(one.detail for one in found)


def test_each_bad_condition_has_a_remedy(start) -> None:
    target = start(LOOP)
    target.process.send_signal(signal.SIGSTOP)
    time.sleep(0.1)
    bad = [one for one in conditions(target.pid) if not one.ok]
    assert [one.name for one in bad] == ["state", "python"]
    assert all(one.remedy == f"kill -CONT {target.pid}" for one in bad)


def test_not_python_and_no_process() -> None:
    sleeper = subprocess.Popen(["sleep", "20"])
    try:
        time.sleep(0.1)
        assert [one.name for one in conditions(sleeper.pid) if not one.ok] == ["python"]
    finally:
        sleeper.kill()
        sleeper.wait()
    (only,) = conditions(sleeper.pid)
    assert (only.name, only.ok) == ("process", False)


def test_yama_is_read_as_it_is(monkeypatch, tmp_path) -> None:
    scope = tmp_path / "ptrace_scope"
    monkeypatch.setattr(access, "_YAMA", str(scope))
    assert access.yama_scope() is None
    for text, value in (("2\n", 2), ("junk", None)):
        scope.write_text(text)
        assert access.yama_scope() == value


def test_interpreter_of_each_version(start, any_python: str) -> None:
    target = start(LOOP, any_python)
    told = subprocess.run(
        [any_python, "-c", "import sys; print(*sys.version_info[:3])"], capture_output=True, text=True
    )
    version = tuple(map(int, told.stdout.split()))
    info = python_of(target.pid)
    assert info.version == version[: len(info.version)] and len(info.version) >= 2
    assert not info.free_threaded and not info.musl and info.machine == "x86_64"
    assert info.runtime[0] < info.runtime[1]


def test_files_of_a_killed_watcher_are_swept_up(tmp_path) -> None:
    """Old ones of ours alone: neither a running watcher's, nor others' files, nor what a link leads to."""
    kept, victim = tmp_path / "lprism-0123456789abcdef.ring", tmp_path / "victim"
    old = [
        tmp_path / name for name in ("lprism-fedcba9876543210.ring", "lprism-run-1a2b-0123456789abcdef.py")
    ]
    others = [tmp_path / "lprism-notes.md", victim]
    for path in (kept, *old, *others):
        path.write_text("x")
    pipe, link = tmp_path / "lprism-00112233445566aa.wake", tmp_path / "lprism-aa112233445566aa.py"
    os.mkfifo(pipe)
    link.symlink_to(victim)
    for path in (*old, *others, pipe):
        os.utime(path, (1, 1))
    os.utime(link, (1, 1), follow_symlinks=False)
    assert sorted(sweep(tmp_path)) == sorted(path.name for path in (*old, pipe))
    assert kept.exists() and victim.exists() and link.is_symlink() and others[0].exists()
