"""Targets of the agent's tests: a script of some interpreter that is really attached to, and obeys lines."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from latencyprism.agent import session as session_module
from latencyprism.agent.assemble import assemble_source
from latencyprism.agent.session import ProbePlan, ProbeSession
from latencyprism.bench import attaching

HEAD = """
import sys, os, gc, json, time, types, threading, asyncio, inspect, ctypes
import mmap, signal, functools, operator, weakref
def classes(*owners):
    return [dict(vars(owner)) for owner in owners]
def traces():
    '''What a probe could leave: attributes, modules, tool ids, descriptors, mappings, collector callbacks.'''
    tools = [sys.monitoring.get_tool(n) for n in range(6)] if hasattr(sys, "monitoring") else []
    return {
        "modules": sorted(sys.modules), "tools": tools, "callbacks": [repr(c) for c in gc.callbacks],
        "descriptors": sorted(os.readlink("/proc/self/fd/" + n) for n in os.listdir("/proc/self/fd")
                              if os.path.exists("/proc/self/fd/" + n)),
        "names": sorted(globals()), "threads": threading.active_count(),
        "mappings": sorted({m.split(None, 5)[-1].strip() for m in open("/proc/self/maps") if "/" in m}),
    }
"""
TAIL = """
print("ready", flush=True)
for _line in sys.stdin:
    try:
        _answer = eval(_line, globals())
    except BaseException as _error:
        _answer = {"raised": repr(_error)}
    print(json.dumps(_answer), flush=True)
"""


@pytest.fixture(params=attaching.VERSIONS)
def python(request: pytest.FixtureRequest) -> str:
    """Path of an interpreter, once for each supported minor version."""
    found = attaching.find_pythons().get(request.param)
    if found is None:
        pytest.skip(f"no Python {request.param} on this machine")
    return str(found)


class Target:
    """A script run by some interpreter. ``ask`` has it evaluate an expression and tell the value."""

    def __init__(self, python: str, script: str) -> None:
        self.process = subprocess.Popen(
            [python, "-u", "-c", HEAD + script + TAIL],
            stdout=subprocess.PIPE,
            stdin=subprocess.PIPE,
            text=True,
        )
        self.pid = self.process.pid
        self.sessions: list[ProbeSession] = []
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def tell(self, expression: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(expression + "\n")
        self.process.stdin.flush()

    def ask(self, expression: str) -> Any:
        self.tell(expression)
        return json.loads(self._line())

    def attach(self, monkeypatch: pytest.MonkeyPatch, reader: str, **config: Any) -> ProbeSession:
        """Attach with a reader given as source; ``config`` is added to what the probe is told."""
        plan = ProbePlan("test", "engine", 0, {}, tuple(config.pop("deep", ())))
        with monkeypatch.context() as patch:
            patch.setattr(
                session_module, "assemble", lambda _, given: assemble_source(reader, {**given, **config})
            )
            session = ProbeSession(self.pid, plan, slots=256)
        session.renew(60)
        self.sessions.append(session)
        return session

    @staticmethod
    def words(session: ProbeSession, kind: int, count: int) -> list[tuple[int, ...]]:
        """The first ``count`` payload words of all records of a kind that are there."""
        return [record.words[:count] for record in session.read() if record.kind == kind]

    def kill(self) -> None:
        for session in self.sessions:
            session.close(timeout_s=0.1)
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


@pytest.fixture
def start() -> Iterator[Callable[..., Target]]:
    """``start(script, python=...)``: a target that waits for expressions to evaluate."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        pytest.skip("attaching needs Linux on x86_64")
    if os.geteuid() != 0:
        pytest.skip("needs the right to ptrace")
    targets: list[Target] = []

    def begin(script: str, python: str = sys.executable) -> Target:
        targets.append(Target(python, script))
        return targets[-1]

    yield begin
    for target in targets:
        target.kill()
