"""Tracing a child of this process from a process of its own.

The kernel reports the stops of a traced child to whoever in its parent waits for it: a ``Popen.poll`` in
another thread would take a stop for the child's end. So a target that is a child of this process is traced by
a small helper, which reads one request a line on its standard input and answers with one line of JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Protocol

from ..errors import TargetRefused
from .access import CAP_SYS_PTRACE, has_capability, yama_scope
from .borrow import Attempt, Borrower
from .interpreter import python_of
from .process import read_process
from .ptrace import Gone

# Longer than any stop can take: the helper's own limits add up to less than two seconds.
_ANSWER_LIMIT_S = 10.0
_LINE_LIMIT = 65536


class Tracer(Protocol):
    """Whatever makes one stop of the target: in this process or in a helper."""

    def attempt(self, route: str, text: int | bytes) -> Attempt: ...


def tracer_for(borrower: Borrower) -> Tracer:
    """The borrower itself, or a helper process where the target is a child of this process.

    Under Yama without CAP_SYS_PTRACE only an ancestor may trace, which a helper is not; then this process
    traces, and nobody in it must wait for the child meanwhile.
    """
    own_child = read_process(borrower.pid).ppid == os.getpid()
    if own_child and (has_capability(CAP_SYS_PTRACE) or not yama_scope()):
        return HelperTracer(borrower.pid)
    return borrower


class HelperTracer:
    """A helper process that traces ``pid``; it ends with this object or with this process."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._number = 0
        self._rest = b""
        source = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(pid)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env={**os.environ, "PYTHONPATH": path},
            # An interrupt from the terminal is for this process, not for the one that holds a target.
            start_new_session=True,
        )
        self._finish = weakref.finalize(self, _end, self._process)
        self._answer()

    def attempt(self, route: str, text: int | bytes) -> Attempt:
        """As Borrower.attempt."""
        self._number += 1
        assert self._process.stdin is not None
        told_text = text.hex() if isinstance(text, bytes) else str(text)
        try:
            self._process.stdin.write(f"{self._number} {route} {told_text}\n".encode())
        except OSError:
            raise self._lost() from None
        told = self._answer()
        return Attempt(
            entered=told.get("entered") is True,
            why=str(told.get("why", "")),
            final=told.get("final") is True,
            stop_us=float(str(told.get("stop_us", 0))),
            held_us=float(str(told.get("held_us", 0))),
        )

    def _answer(self) -> dict[str, object]:
        """The answer to the last request; those to requests given up before are dropped."""
        until = time.monotonic() + _ANSWER_LIMIT_S
        while True:
            told = self._line(until)
            if told.get("number") != self._number:
                continue
            if told.get("gone"):
                raise Gone
            refused = told.get("refused")
            if isinstance(refused, list):
                raise TargetRefused(*map(str, refused[:3]))
            return told

    def _line(self, until: float) -> dict[str, object]:
        assert self._process.stdout is not None
        while b"\n" not in self._rest:
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, until - time.monotonic()))
            more = os.read(self._process.stdout.fileno(), _LINE_LIMIT) if ready else b""
            if not more or len(self._rest) > _LINE_LIMIT:
                raise self._lost()
            self._rest += more
        line, self._rest = self._rest.split(b"\n", 1)
        try:
            told = json.loads(line)
        except ValueError:
            raise self._lost() from None
        return told if isinstance(told, dict) else {}

    def _lost(self) -> TargetRefused:
        self._finish()
        return TargetRefused(
            f"process {self.pid} could not be traced", "the tracing helper ended", "try again"
        )


def _end(process: subprocess.Popen[bytes]) -> None:
    """The helper ends when its input does; one that does not is killed, and the kernel lets its target go."""
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()
    try:
        process.wait(2)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _reply(borrower: Borrower, line: str) -> dict[str, object]:
    number, route, text = line.split()
    told: dict[str, object] = {"number": int(number)}
    try:
        attempt = borrower.attempt(route, bytes.fromhex(text) if route == "gil" else int(text))
    except Gone:
        return {**told, "gone": True}
    except TargetRefused as error:
        return {**told, "refused": [error.what, error.why, error.remedy]}
    told.update(entered=attempt.entered, why=attempt.why, final=attempt.final)
    return {**told, "stop_us": attempt.stop_us, "held_us": attempt.held_us}


def serve(pid: int) -> None:
    """The helper's life: one answer when it is ready, then one for each line of input until that ends."""

    def say(told: dict[str, object]) -> None:
        sys.stdout.write(json.dumps(told) + "\n")
        sys.stdout.flush()

    try:
        borrower = Borrower(python_of(pid))
    except TargetRefused as error:
        say({"number": 0, "refused": [error.what, error.why, error.remedy]})
        return
    say({"number": 0})
    for line in sys.stdin:
        say(_reply(borrower, line))


if __name__ == "__main__":
    serve(int(sys.argv[1]))
