"""Start a real engine on loopback, know its processes, and end it with everything it started.

>>> with start("llama.cpp") as server:
...     server.pid, server.url
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from latencyprism.errors import PrismError
from latencyprism.lab.install import EngineEnv, EngineName, clean_environ, ensure
from latencyprism.lab.launch import Options, launch
from latencyprism.lab.metrics import parse
from latencyprism.lab.models import INSIDE, TINY, Shape, ensure_model

_READY_S: dict[EngineName, float] = {"llama.cpp": 30.0, "transformers": 120.0, "vllm": 420.0}


@dataclass
class Server:
    """A running engine. ``pid`` is the process whose steps are watched (vLLM: EngineCore), ``main_pid`` the
    one that was started, ``log`` a file with everything the engine said."""

    engine: EngineName
    env: EngineEnv
    port: int
    model: str
    log: Path
    options: Options
    main_pid: int
    start_s: float
    _guard: subprocess.Popen[str]
    _stop_s: float

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pids(self) -> tuple[int, ...]:
        """The started process and all its living descendants."""
        return tuple(descendants(self.main_pid))

    @property
    def roles(self) -> dict[str, int]:
        """``main``, and for vLLM ``engine_core`` and ``worker`` (``worker1``.. for more ranks)."""
        roles = {"main": self.main_pid}
        for pid in self.pids:
            title = _title(pid)
            name = {"VLLM::EngineCore": "engine_core", "VLLM::Worker": "worker"}.get(title.partition("_")[0])
            if name:
                taken = sum(key.startswith(name) for key in roles)
                roles[name + (str(taken) if taken else "")] = pid
        return roles

    @property
    def pid(self) -> int:
        roles = self.roles
        return roles.get("engine_core", self.main_pid)

    def alive(self) -> bool:
        return _living(self.main_pid)

    def metrics(self) -> dict[str, float]:
        """The engine's own counters (``metrics.parse``); empty where it has no /metrics (Transformers)."""
        status, body = self.get("/metrics")
        return parse(body) if status == 200 else {}

    def get(self, path: str, timeout_s: float = 10.0) -> tuple[int, str]:
        """Status and body of a GET; raises OSError where nobody answers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        with contextlib.closing(connection):
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode("utf-8", "replace")

    def complete(self, max_tokens: int = 4, *, prompt_tokens: int = 3, timeout_s: float = 60.0) -> int:
        """One request, not streamed; returns the number of tokens the server says it produced."""
        # Imported here: load.py starts from a Server.
        from latencyprism.lab.wire import completion_body

        prompt = [300 + index % 900 for index in range(prompt_tokens)]
        body = completion_body(self.engine, self.model, prompt, max_tokens, stream=False)
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        with contextlib.closing(connection):
            connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            said = answer.read()
        if answer.status != 200:
            raise PrismError(f"{self.engine} refused a request", f"status {answer.status}: {said[:200]!r}")
        return int(json.loads(said)["usage"]["completion_tokens"])

    def stop(self) -> None:
        """End the engine and its descendants: SIGTERM, and SIGKILL after a grace time. Harmless twice."""
        if self._guard.stdin and not self._guard.stdin.closed:
            self._guard.stdin.close()
        try:
            self._guard.wait(self._stop_s + 10)
        except subprocess.TimeoutExpired:
            self._guard.kill()
            self._guard.wait()
        if self._guard.stdout:
            self._guard.stdout.close()
        self.log.unlink(missing_ok=True)

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def start(
    engine: EngineName,
    options: Options | None = None,
    *,
    shape: Shape = TINY,
    ready_s: float | None = None,
) -> Server:
    """Install if needed, start, wait until it answers, and send it one small request to warm it.

    Raises EngineUnavailable where it cannot be installed; PrismError, with the end of its log, where it
    ends or does not answer within ``ready_s`` seconds (default: 30 llama.cpp, 120 Transformers, 420 vLLM).
    """
    options = options or Options()
    env = ensure(engine)
    model = ensure_model(env, shape)
    port = free_port()
    plan = launch(env, model, port, options)
    handle, name = tempfile.mkstemp(prefix=f"latencyprism-{engine}-", suffix=".log")
    began = time.monotonic()
    with os.fdopen(handle, "wb") as log:
        guard = subprocess.Popen(
            [sys.executable, "-I", "-S", str(INSIDE / "guard.py"), str(plan.stop_s), *plan.command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=clean_environ(plan.environ),
            start_new_session=True,
        )
    assert guard.stdout is not None
    first = guard.stdout.readline().strip()
    if not first.isdigit():
        guard.wait()
        raise PrismError(f"cannot start {engine}", _tail(Path(name)), f"Its log: {name}")
    server = Server(engine, env, port, plan.model, Path(name), options, int(first), 0.0, guard, plan.stop_s)
    try:
        _await(server, began + (ready_s or _READY_S[engine]))
        # A prompt of more than one chunk, so that neither prefill nor decode is done for the first time
        # later.
        server.complete(prompt_tokens=min(options.batch_tokens + 32, options.context // 2))
    except BaseException as failure:
        said = _tail(server.log)
        server.stop()
        if isinstance(failure, (OSError, http.client.HTTPException, ValueError, KeyError, PrismError)):
            raise PrismError(f"{engine} did not start", f"{failure}; its log ends: {said}") from failure
        raise
    server.start_s = time.monotonic() - began
    return server


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _await(server: Server, deadline: float) -> None:
    while time.monotonic() < deadline:
        if not server.alive():
            raise PrismError("it ended by itself")
        try:
            if server.get("/health", 2.0)[0] == 200:
                return
        except (OSError, http.client.HTTPException):
            pass  # not listening yet
        time.sleep(0.1)
    raise PrismError("it did not answer in time")


def _tail(log: Path, most: int = 600) -> str:
    return log.read_text("utf-8", "replace")[-most:].strip()


def descendants(root: int) -> list[int]:
    """A process and all that it started and that live, itself first."""
    found, queue = [], [root]
    while queue:
        pid = queue.pop(0)
        if not _living(pid):
            continue
        found.append(pid)
        # /proc/PID/task/TID/children needs a kernel option; without it the tree is cut at the root.
        for task in _listing(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError):
                queue += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
    return found


def _listing(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except OSError:
        return []


def _living(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode("utf-8", "replace").strip()
    except OSError:
        return ""
