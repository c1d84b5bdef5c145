"""Real engines shared by all tests, and the rule that what can be tested on a machine is tested there.

LATENCYPRISM_REQUIRE (set by scripts/run_tests.py) names what this machine has: a test marked with one of
these that skips itself has failed, but for the reasons in EXCUSED.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from latencyprism.bench.attaching import find_pythons
from latencyprism.lab.install import NO_CPU_TORCH, EngineName, EngineUnavailable
from latencyprism.lab.serve import Server, start

REQUIRED = {name for name in os.environ.get("LATENCYPRISM_REQUIRE", "").split(",") if name}
# What a test may lack although the machine has the capability it is marked with.
EXCUSED = (f"engine unavailable: {NO_CPU_TORCH}", "no Python ", " is not installed", "no control group")
SERVER_FIXTURES = {"llama_server", "transformers_server", "vllm_server"}


@pytest.fixture(autouse=True)
def _state_of_its_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test takes up what the watch of another, or of the person who runs them, has learned."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))


@pytest.fixture(scope="session")
def python_of() -> Callable[[str], str]:
    """Path of an interpreter of a version ("3.14"), wherever it is installed; skips where there is none."""
    found = find_pythons()
    for path in sorted(Path.home().glob(".pyenv/versions/*/bin/python3")):
        found.setdefault(".".join(path.parents[1].name.split(".")[:2]), str(path))

    def path_of(version: str) -> str:
        if version not in found:
            pytest.skip(f"no Python {version} here")
        return found[version]

    return path_of


@pytest.fixture(scope="session")
def nameable_python_of(python_of: Callable[[str], str]) -> Callable[[str], str]:
    """The same, of one whose process a test can give a name: none that is started by a script."""

    def path_of(version: str) -> str:
        path = python_of(version)
        with open(path, "rb") as file:
            if file.read(2) == b"#!":
                pytest.skip(f"no Python {version} here whose process can be given a name")
        return path

    return path_of


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test that takes a server needs an engine, whether it says so or not."""
    for item in items:
        if SERVER_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.engine)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    needed = {mark.name for mark in item.iter_markers()} & REQUIRED
    if report.skipped and needed and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not any(excuse in reason for excuse in EXCUSED):
            report.outcome = "failed"
            report.longrepr = f"{item.nodeid}: this machine has {', '.join(sorted(needed))}, yet: {reason}"
    return report


def _serve(engine: EngineName) -> Iterator[Server]:
    try:
        server = start(engine, ready_s=280)
    except EngineUnavailable as missing:
        pytest.skip(f"engine unavailable: {missing.reason}")
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def llama_server() -> Iterator[Server]:
    """llama.cpp with default options; shared, so leave it as it was found."""
    yield from _serve("llama.cpp")


@pytest.fixture(scope="session")
def transformers_server() -> Iterator[Server]:
    """Transformers with continuous batching and default options; shared."""
    yield from _serve("transformers")


@pytest.fixture(scope="session")
def vllm_server() -> Iterator[Server]:
    """vLLM (API server, EngineCore, one Worker) with default options; shared. Takes half a minute to
    start."""
    yield from _serve("vllm")


def _autogroup_nice() -> int | None:
    """Of this session, where the kernel groups by session."""
    try:
        return int(Path("/proc/self/autogroup").read_text().split()[-1])
    except (OSError, ValueError, IndexError):
        return None


@pytest.fixture(autouse=True)
def _priority_as_before() -> Iterator[None]:
    """What runs at the lowest priority in a process of its own is called in this one by some tests: all that
    came after them would be starved."""
    policy, param, nice = os.sched_getscheduler(0), os.sched_getparam(0), os.getpriority(os.PRIO_PROCESS, 0)
    group = _autogroup_nice()
    yield
    with contextlib.suppress(OSError):
        if group is not None and _autogroup_nice() != group:
            Path("/proc/self/autogroup").write_text(str(group))
        if os.sched_getscheduler(0) != policy:
            os.sched_setscheduler(0, policy, param)
        if os.getpriority(os.PRIO_PROCESS, 0) != nice:
            os.setpriority(os.PRIO_PROCESS, 0, nice)
