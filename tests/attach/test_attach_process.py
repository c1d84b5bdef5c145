"""/proc as the attach package reads it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latencyprism.attach.process import (
    Identity,
    ancestors,
    children,
    list_processes,
    parse_cmdline,
    parse_stat,
    printable,
    read_process,
)
from latencyprism.errors import TargetRefused


def test_this_process() -> None:
    info = read_process(os.getpid())
    assert info.identity.alive()
    assert info.ppid == os.getppid()
    assert info.uid == os.geteuid()
    assert info.exe == os.path.realpath(sys.executable)
    assert info.root == f"/proc/{os.getpid()}/root"
    assert info.tracer_pid == 0
    assert any(one.pid == os.getpid() for one in list_processes())


def test_reused_pid_and_zombie_are_not_alive() -> None:
    info = read_process(os.getpid())
    assert not Identity(info.pid, info.start_ticks + 1).alive()
    child = subprocess.Popen(["true"])
    time.sleep(0.2)
    identity = read_process(child.pid).identity
    assert read_process(child.pid).state == "Z"
    assert not identity.alive()
    child.wait()
    assert not identity.alive()
    with pytest.raises(TargetRefused):
        read_process(child.pid)


def test_family() -> None:
    child = subprocess.Popen(["sh", "-c", "sleep 20 & wait"], stdout=subprocess.DEVNULL)
    below = []
    try:
        until = time.monotonic() + 5
        while len(below) < 2 and time.monotonic() < until:
            below = [one for one in children(os.getpid()) if child.pid in (one.pid, one.ppid)]
        assert [one.comm for one in below] == ["sh", "sleep"]
        assert [one.pid for one in children(os.getpid(), recursive=False) if one.pid == child.pid] == [
            child.pid
        ]
        assert [one.pid for one in ancestors(below[1].pid)][:2] == [child.pid, os.getpid()]
    finally:
        for one in below[1:]:
            os.kill(one.pid, 9)
        child.kill()
        child.wait()


def test_command_line_of_a_renamed_process() -> None:
    assert parse_cmdline(b"python\0-m\0vllm\0") == ["python", "-m", "vllm"]
    assert parse_cmdline(b"VLLM::EngineCore_0\0\0\0\0\0") == ["VLLM::EngineCore_0"]
    assert parse_cmdline(b"ray::worker    \0\0") == ["ray::worker"]
    assert parse_cmdline(b"python\0-c\0\0x\0") == ["python", "-c", "", "x"]
    assert parse_cmdline(b"") == []


def test_stat_with_a_misleading_name() -> None:
    line = b"7 (a) R 1 (x) S 3 " + b"0 " * 17 + b"99 0 0\n"
    comm, state, ppid, start = parse_stat(line)
    assert (comm, state, ppid, start) == ("a) R 1 (x", "S", 3, 99)


@given(st.binary(max_size=300))
def test_hostile_text_never_reaches_the_terminal(raw: bytes) -> None:
    assert printable(raw).isprintable()
    assert all(part.isprintable() for part in parse_cmdline(raw))


@given(st.binary(max_size=300))
def test_stat_gives_fields_or_value_error(raw: bytes) -> None:
    with contextlib.suppress(ValueError):
        parse_stat(raw)
