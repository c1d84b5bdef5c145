"""Targets of the attach tests: processes started here, ended here by their pid."""

from __future__ import annotations

import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from latencyprism.bench import attaching

VERSIONS = attaching.VERSIONS


@pytest.fixture(params=VERSIONS[:-1])
def python(request: pytest.FixtureRequest) -> str:
    """Path of an interpreter, once for each minor version that is entered by a stop."""
    return _found(request)


@pytest.fixture(params=VERSIONS)
def any_python(request: pytest.FixtureRequest) -> str:
    """Path of an interpreter, once for each supported minor version."""
    return _found(request)


def _found(request: pytest.FixtureRequest) -> str:
    found = attaching.find_pythons().get(request.param)
    if found is None:
        pytest.skip(f"no Python {request.param} on this machine")
    return found


class Target:
    """A script run by some interpreter; its lines of output; ``ack`` is a file that injected texts make."""

    def __init__(self, python: str, script: str, folder: Path) -> None:
        self.folder = folder
        self.count = 0
        self.process = subprocess.Popen(
            [python, "-u", "-c", script], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
        )
        self.pid = self.process.pid

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def note(self) -> tuple[str, Callable[[], bool]]:
        """A text that leaves a file, and whether that file is there."""
        self.count += 1
        path = self.folder / f"ack.{self.pid}.{self.count}"
        return f"open({str(path)!r},'w').close()", path.exists

    def wait_in_syscall(self, limit_s: float = 5.0) -> None:
        """Until the main thread sleeps in the same system call at two looks."""
        until = time.monotonic() + limit_s
        last = ""
        while time.monotonic() < until:
            now = Path(f"/proc/{self.pid}/syscall").read_text()
            if now == last and now.split()[0].isdigit():
                return
            last = now
            time.sleep(0.02)
        raise AssertionError("the target did not come to rest")

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Target]]:
    """``start(script, python=...)``: a target that has printed its first line."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        pytest.skip("attaching needs Linux on x86_64")
    targets: list[Target] = []

    def begin(script: str, python: str = sys.executable) -> Target:
        target = Target(python, script, tmp_path)
        targets.append(target)
        assert target.line() == "ready"
        return target

    yield begin
    for target in targets:
        target.kill()
