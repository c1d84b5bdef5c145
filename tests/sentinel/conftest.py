"""A made-up engine at work, for tests of the watch."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path

import pytest

ENGINE = str(files("latencyprism.lab").joinpath("inside", "made_up_engine.py"))


@pytest.fixture
def start_engine(tmp_path: Path) -> Iterator[Callable[[], int]]:
    """Starts a made-up engine and gives its pid; all end with the test."""
    started = []

    def start() -> int:
        process = subprocess.Popen(
            [sys.executable, ENGINE, "thread", str(tmp_path / "steps")], stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout is not None and process.stdout.readline().strip() == "ready"
        return process.pid

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def engine(start_engine: Callable[[], int]) -> int:
    """The pid of a made-up engine that is at work for a while already."""
    pid = start_engine()
    time.sleep(0.3)
    return pid
