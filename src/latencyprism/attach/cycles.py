"""Attach and detach over and over against a target that checks its own results.

The target runs four kinds of work at once (json, zlib, floating point, sockets), compares every result with
what it must be, and tells at its end how much it did and how often it was wrong.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ..errors import PrismError, TargetRefused
from .inject import Injector, InjectReport

_START_LIMIT_S = 20.0
_END_LIMIT_S = 10.0

TARGET = r"""
import json, math, socket, sys, threading, zlib
import __main__ as main

main.ended, main.wrong, main.done, main.calls = False, [], {}, 0
TEXT = json.dumps({"a": [1, 2.5, "x", None] * 20, "b": {"c": list(range(50))}})
DATA = bytes(range(256)) * 64
PACKED = zlib.compress(DATA)

def step(text):
    return json.loads(text)

def series():
    return math.fsum(math.sin(i) * math.sqrt(i) for i in range(200))

EXPECTED = {"json": step(TEXT), "zlib": DATA, "float": series(), "socket": DATA[:4096]}
LEFT, RIGHT = socket.socketpair()

def echo():
    LEFT.sendall(DATA[:4096])
    got = b""
    while len(got) < 4096:
        got += RIGHT.recv(4096 - len(got))
    return got

WORK = {
    "json": lambda: main.step(TEXT),
    "zlib": lambda: zlib.decompress(PACKED),
    "float": series,
    "socket": echo,
}

def run(name):
    while not main.ended:
        try:
            good = WORK[name]() == EXPECTED[name]
        except Exception as error:
            good = False
            main.wrong.append(repr(error))
        if not good:
            main.wrong.append(name)
        main.done[name] = main.done.get(name, 0) + 1

threads = [threading.Thread(target=run, args=(name,), daemon=True) for name in ("zlib", "float", "socket")]
for thread in threads:
    thread.start()
print("ready", flush=True)
run("json")
for thread in threads:
    thread.join(5)
left = sorted(name for name in vars(main) if name.startswith("prism"))
print(json.dumps({"wrong": main.wrong[:10], "wrong_count": len(main.wrong), "done": main.done,
                  "calls": main.calls, "restored": main.step is step, "left": left}), flush=True)
"""

_ATTACH = (
    "import __main__ as m\n"
    "if not hasattr(m,'prism_kept'):\n"
    " m.prism_kept=m.step\n"
    " def prism_step(t,f=m.step,m=m):\n"
    "  m.calls+=1\n"
    "  return f(t)\n"
    " m.step=prism_step\n"
    " del m.prism_step,m.m\n"
)
_DETACH = (
    "import __main__ as m\nif hasattr(m,'prism_kept'):\n m.step=m.prism_kept\n del m.prism_kept\n del m.m\n"
)
_END = "import __main__\n__main__.ended=True\n"


@dataclass(frozen=True, slots=True)
class CyclesReport:
    """What ``run_cycles`` saw. Times of one injection each: ``stop_us``, ``held_us`` and ``ack_ms`` as in
    InjectReport; ``wrong`` results of the target out of ``done``; ``restored``: the wrapped function is back
    and no name of ours is left; ``calls`` of it seen while attached; ``exit_code`` of the target.
    """

    version: tuple[int, ...]
    cycles: int
    injections: int
    routes: dict[str, int]
    stop_us: tuple[float, ...]
    held_us: tuple[float, ...]
    ack_ms: tuple[float, ...]
    wrong: int
    wrong_examples: tuple[str, ...]
    done: dict[str, int]
    calls: int
    restored: bool
    exit_code: int | None


def quantile(values: tuple[float, ...], q: float) -> float | None:
    """The value below which a share ``q`` of them lies (nearest rank); None when there are none."""
    return sorted(values)[min(len(values) - 1, int(q * len(values)))] if values else None


class _Target:
    """The target process and the file through which it acknowledges: 8 bytes, the number of the last text."""

    def __init__(self, python: str, folder: str) -> None:
        self._ack = Path(folder) / "ack"
        self._ack.write_bytes(bytes(8))
        self._count = 0
        try:
            self.process = subprocess.Popen(
                [python, "-c", TARGET], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
            )
        except OSError as error:
            raise PrismError("the target did not start", error.strerror or str(error)) from None

    def wait_ready(self) -> None:
        assert self.process.stdout is not None
        if self.process.stdout.readline().strip() != "ready":
            raise PrismError("the target did not start", f"exit code {self.process.poll()}")

    def run(self, injector: Injector, text: str) -> InjectReport:
        self._count += 1
        nonce = self._count
        note = f"__import__('pathlib').Path({str(self._ack)!r}).write_bytes(({nonce}).to_bytes(8,'little'))"
        return injector.run(
            f"{text}{note}\n", lambda: self._ack.read_bytes() == nonce.to_bytes(8, "little"), _START_LIMIT_S
        )

    def end(self) -> dict[str, object]:
        """The target's own last line; empty when it was not given."""
        try:
            out, _ = self.process.communicate(timeout=_END_LIMIT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            out, _ = self.process.communicate()
        try:
            told = json.loads(out.strip().splitlines()[-1])
        except (IndexError, ValueError):
            return {}
        return told if isinstance(told, dict) else {}


def run_cycles(python: str, cycles: int, pause_s: float = 0.0) -> CyclesReport:
    """Start a self-checking target with the interpreter ``python``, attach to it and detach ``cycles`` times.

    Each cycle is two injections: one wraps a function of the target, the other puts it back. ``pause_s`` of
    rest between two. Raises TargetRefused when the target cannot be attached to; a target that dies is told
    by ``exit_code``, not raised.
    """
    with tempfile.TemporaryDirectory() as folder:
        target = _Target(python, folder)
        try:
            target.wait_ready()
            injector = Injector(target.process.pid)
            reports = _cycle(target, injector, cycles, pause_s)
            told = target.end()
        finally:
            if target.process.poll() is None:
                target.process.kill()
                target.process.wait()
    return _summary(injector.python.version, cycles, reports, told, target.process.returncode)


def _cycle(target: _Target, injector: Injector, cycles: int, pause_s: float) -> list[InjectReport]:
    reports: list[InjectReport] = []
    try:
        for _ in range(cycles):
            for text in (_ATTACH, _DETACH):
                reports.append(target.run(injector, text))
                time.sleep(pause_s)
        target.run(injector, _END)
    except TargetRefused:
        if injector.identity.alive() and target.process.poll() is None:
            raise
    return reports


def _summary(
    version: tuple[int, ...],
    cycles: int,
    reports: list[InjectReport],
    told: dict[str, object],
    code: int | None,
) -> CyclesReport:
    done, wrong = told.get("done"), told.get("wrong")
    calls, count = told.get("calls"), told.get("wrong_count")
    return CyclesReport(
        version=version,
        cycles=cycles,
        injections=len(reports),
        routes=dict(Counter(report.route for report in reports)),
        stop_us=tuple(report.stop_us for report in reports),
        held_us=tuple(report.held_us for report in reports),
        ack_ms=tuple(report.ack_ms for report in reports),
        wrong=count if isinstance(count, int) else -1,
        wrong_examples=tuple(map(str, wrong)) if isinstance(wrong, list) else (),
        done={str(key): int(value) for key, value in done.items()} if isinstance(done, dict) else {},
        calls=calls if isinstance(calls, int) else 0,
        restored=told.get("restored") is True and told.get("left") == [],
        exit_code=code,
    )
