"""Writing a capture without holding up the watcher: packed rows now, everything else in a process apart."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from latencyprism.recorder.atomic import temporary_prefix
from latencyprism.recorder.capture import Capture, raw_chunks
from latencyprism.recorder.idle import come_forward

_MAX_SAID_BYTES = 4 << 20
_POLL_BUDGET_MS = 10.0


class CaptureJob:
    """One capture on its way to ``out``.

    Call ``poll`` now and again until it returns what became of it. Nothing here raises: a disk that refuses
    is a result with ``error``. The capture's lists must not change meanwhile. ``close`` ends it safely at
    any time: nothing half-written is left under the final name, no process and no temporary file stay.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        capture: Capture,
        finish: str | None = None,
        finish_seconds: float = 60.0,
    ) -> None:
        """``finish``: ``module:function`` run in the writing process, which takes the Capture
        and returns it, for instance with a verdict."""
        self.out = Path(out)
        self.result: dict[str, Any] | None = None
        """What the writing process said: path, bytes, steps, seconds, verdict, or ``error``."""
        self._finish = ["--finish", finish, "--finish-seconds", str(finish_seconds)] if finish else []
        self._chunks: Iterator[bytes] = raw_chunks(capture)
        self._process: subprocess.Popen[bytes] | None = None
        self._raw: Path | None = None
        self._file: BinaryIO | None = None
        self._said = b""
        self.verdict: dict[str, Any] | None = None
        """The verdict of ``finish`` as soon as ``poll`` has heard it, which is before the file is whole."""
        # Beside the capture: the raw file can be large, and /tmp is often memory.
        try:
            descriptor, raw = tempfile.mkstemp(
                prefix=f".{self.out.name[:100]}.", suffix=".raw", dir=self.out.parent
            )
        except (OSError, ValueError) as error:
            self._fail(error)
            return
        self._raw = Path(raw)
        self._file = open(descriptor, "wb")  # noqa: SIM115 - closed when the rows are out

    def advance(self, budget_ms: float | None = None) -> bool:
        """Put out rows for about ``budget_ms`` (a piece takes 1-4 ms; None: all); True once that is done:
        the writing process runs, or the disk refused."""
        if self._file is None:
            return True
        until = None if budget_ms is None else time.monotonic() + budget_ms / 1e3
        try:
            for chunk in self._chunks:
                self._file.write(chunk)
                if until is not None and time.monotonic() >= until:
                    return False
            self._file.close()
            self._file = None
            self._start()
        except OSError as error:
            self._fail(error)
        return True

    def _fail(self, error: OSError | ValueError) -> None:
        why = getattr(error, "strerror", None) or str(error)
        self.result = {
            "event": "capture",
            "path": None,
            "error": f"cannot write the capture to {self.out}: {why}",
        }
        self._drop_rows()

    def _drop_rows(self) -> None:
        self._chunks = iter(())
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None
        if self._raw is not None:
            with contextlib.suppress(OSError):
                self._raw.unlink(missing_ok=True)

    def _start(self) -> None:
        command = [
            sys.executable,
            "-m",
            "latencyprism.recorder.write",
            str(self._raw),
            str(self.out),
            *self._finish,
        ]
        # A session of its own: Ctrl-C at the watcher is the watcher's to act on.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)

    @property
    def pid(self) -> int | None:
        """The writing process while it runs."""
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    def fileno(self) -> int | None:
        """Becomes readable when ``poll`` has something to say; None before the process runs."""
        if self._process is None or self._process.stdout is None or self.result is not None:
            return None
        return self._process.stdout.fileno()

    def poll(self) -> dict[str, Any] | None:
        """What became of the capture, or None while it is on its way. The first few calls take 10 ms."""
        if self.result is not None or not self.advance(_POLL_BUDGET_MS) or self._process is None:
            return self.result
        assert self._process.stdout is not None
        code = self._process.poll()
        piece = self._process.stdout.read(_MAX_SAID_BYTES)
        if piece:
            self._said = (self._said + piece)[:_MAX_SAID_BYTES]
            self._hear_verdict()
        if code is not None:
            self._process.stdout.close()
            self.result = self._told(code)
            self._remove_leftovers(self._process.pid)
        return self.result

    def _hear_verdict(self) -> None:
        line, whole, _ = self._said.partition(b"\n")
        if self.verdict is None and whole:
            with contextlib.suppress(ValueError):
                told = json.loads(line)
                if isinstance(told, dict) and isinstance(told.get("verdict"), dict):
                    self.verdict = told["verdict"]

    def _told(self, code: int) -> dict[str, Any]:
        try:
            told = json.loads(self._said.splitlines()[-1])
            if isinstance(told, dict) and told.get("event") == "capture":
                return told
        except (ValueError, IndexError):
            pass  # it said nothing whole: the exit code speaks
        return {"event": "capture", "path": None, "error": f"the writing process ended with {code}"}

    def wait(self, seconds: float) -> dict[str, Any] | None:
        """``poll`` for up to ``seconds``, at ordinary priority: for a watcher that is about to leave."""
        self.advance()
        until = time.monotonic() + seconds
        while self.poll() is None and time.monotonic() < until:
            # Again and again, because it lowers itself when it comes to writing.
            if self.pid is not None:
                come_forward(self.pid)
            number = self.fileno()
            with selectors.DefaultSelector() as selector:
                if number is not None:
                    selector.register(number, selectors.EVENT_READ)
                selector.select(min(0.05, seconds))
            if self._said and self._process is not None:
                # A pipe that was closed stays readable: what is left of the process is its exit.
                time.sleep(0.005)
        return self.result

    def close(self) -> None:
        """End the writing process if it still runs, and remove what is not a whole capture."""
        process = self._process
        if process is None:
            self._drop_rows()
            return
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(0.5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.poll()

    def _remove_leftovers(self, pid: int) -> None:
        self._drop_rows()
        ours = temporary_prefix(self.out, pid)
        for part in self.out.parent.iterdir():
            if part.name.startswith(ours):
                part.unlink(missing_ok=True)
