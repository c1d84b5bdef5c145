"""Writing a capture without holding up the watcher: packed rows now, everything else in a process apart."""

from __future__ import annotations

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

from latencyprism.errors import PrismError
from latencyprism.recorder.atomic import temporary_prefix
from latencyprism.recorder.capture import Capture, raw_chunks

_MAX_LINE_BYTES = 4 << 20


class CaptureJob:
    """One capture on its way to ``out``.

    Call ``advance`` between polls until it returns True (the raw rows are on disk and the writing process
    runs), or once without a budget; then ``poll`` now and again until it returns what became of it. The
    capture's lists must not change meanwhile. ``close`` ends it safely at any time: nothing half-written
    is left under the final name, no process and no temporary file stay behind.
    """

    def __init__(
        self,
        capture: Capture,
        out: str | os.PathLike[str],
        finish: str | None = None,
        finish_seconds: float = 60.0,
    ) -> None:
        """``finish``: ``module:function`` run in the writing process, which takes the Capture
        and returns it, for instance with a verdict. PrismError if no temporary file can be made."""
        self.out = Path(out)
        self.result: dict[str, Any] | None = None
        """What the writing process said: path, bytes, steps, seconds, verdict, or ``error``."""
        self._finish = ["--finish", finish, "--finish-seconds", str(finish_seconds)] if finish else []
        self._chunks: Iterator[bytes] = raw_chunks(capture)
        self._process: subprocess.Popen[bytes] | None = None
        self._line = b""
        # Beside the capture: the raw file can be large, and /tmp is often memory.
        try:
            descriptor, raw = tempfile.mkstemp(
                prefix=f".{self.out.name[:100]}.", suffix=".raw", dir=self.out.parent
            )
        except OSError as error:
            raise PrismError(
                f"cannot write the capture to {self.out}", error.strerror or str(error), "name another folder"
            ) from None
        self._raw = Path(raw)
        self._file: BinaryIO | None = open(descriptor, "wb")  # noqa: SIM115 - closed when the rows are out

    def advance(self, budget_ms: float | None = None) -> bool:
        """Put out rows for about ``budget_ms`` (a piece takes 1-4 ms; None: all); True once the writing
        process runs. PrismError if the disk refuses; the job is then closed."""
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
            self.close()
            raise PrismError(
                f"cannot write the capture to {self.out}", error.strerror or str(error), "free space"
            ) from None
        return True

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
        """What became of the capture, or None while it is being written. Never waits."""
        if self.result is not None or self._process is None:
            return self.result
        assert self._process.stdout is not None
        code = self._process.poll()
        piece = self._process.stdout.read(_MAX_LINE_BYTES)
        if piece:
            self._line = (self._line + piece)[:_MAX_LINE_BYTES]
        if code is not None:
            self._process.stdout.close()
            self.result = self._told(code)
            self._remove_leftovers(self._process.pid)
        return self.result

    def _told(self, code: int) -> dict[str, Any]:
        try:
            told = json.loads(self._line)
            if isinstance(told, dict):
                return told
        except ValueError:
            pass  # it said nothing whole: the exit code speaks
        return {"event": "capture", "path": None, "error": f"the writing process ended with {code}"}

    def wait(self, seconds: float) -> dict[str, Any] | None:
        """``poll`` for up to ``seconds``; for a watcher that is about to leave."""
        self.advance()
        until = time.monotonic() + seconds
        while self.poll() is None and time.monotonic() < until:
            number = self.fileno()
            with selectors.DefaultSelector() as selector:
                if number is not None:
                    selector.register(number, selectors.EVENT_READ)
                selector.select(min(0.05, seconds))
            if self._line and self._process is not None:
                # The line is out: what is left of the process is its exit.
                time.sleep(0.005)
        return self.result

    def close(self) -> None:
        """End the writing process if it still runs, and remove what is not a whole capture."""
        self._chunks = iter(())
        if self._file is not None:
            self._file.close()
            self._file = None
        process = self._process
        if process is None:
            self._raw.unlink(missing_ok=True)
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
        self._raw.unlink(missing_ok=True)
        ours = temporary_prefix(self.out, pid)
        for part in self.out.parent.iterdir():
            if part.name.startswith(ours):
                part.unlink(missing_ok=True)
