"""Writing a capture away from the watcher: a forked copy packs, then becomes the writing process.

The watcher runs at real-time priority beside engines that need every core: whatever takes more than a
millisecond belongs elsewhere. The copy lowers itself before it packs, and further when it writes
(``recorder.write``).
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import sys
import tempfile
import time
import warnings
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from latencyprism.errors import PrismError
from latencyprism.recorder.atomic import temporary_prefix
from latencyprism.recorder.capture import Capture, write_raw
from latencyprism.recorder.forked import part_from_watch
from latencyprism.recorder.idle import come_forward

_MAX_SAID_BYTES = 1 << 20
WRITER_NICE = 10
_JOBS: weakref.WeakSet[CaptureJob] = weakref.WeakSet()


class CaptureJob:
    """One capture on its way to ``out``.

    Call ``poll`` now and again until it returns what became of it. Nothing here raises: a disk that refuses
    is a result with ``error``. ``close`` ends it safely at any time: nothing half-written is left under the
    final name, no process and no temporary file stay.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        make: Callable[[], Capture],
        finish: str | None = None,
        finish_seconds: float = 60.0,
        keep: Sequence[int] = (),
    ) -> None:
        """``make`` is called in the copy and sees the records as they are now, whatever becomes of them here.
        ``finish``: ``module:function`` run in the writing process, which takes the Capture
        and returns it, for instance with a verdict. ``keep``: descriptors that ``make`` reads from."""
        self.out = Path(out)
        self.result: dict[str, Any] | None = None
        """What the writing process said: path, bytes, steps, seconds, verdict, or ``error``."""
        self.verdict: dict[str, Any] | None = None
        """The verdict of ``finish`` as soon as ``poll`` has heard it, which is before the file is whole."""
        _JOBS.add(self)
        self._said = b""
        self._read_fd = -1
        self._raw = self.out
        self._pid: int | None = None
        finish_arguments = ["--finish", finish, "--finish-seconds", str(finish_seconds)] if finish else []
        try:
            # Beside the capture: the raw file can be large, and /tmp is often memory.
            descriptor, raw = tempfile.mkstemp(
                prefix=f".{self.out.name[:100]}.", suffix=".raw", dir=self.out.parent
            )
            os.close(descriptor)
            self._raw = Path(raw)
            self._fork(make, finish_arguments, keep)
        except (OSError, ValueError) as error:
            self.result = _refused(self.out, error)
            self._drop_raw()

    def _fork(self, make: Callable[[], Capture], finish: list[str], keep: Sequence[int]) -> None:
        self._read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._read_fd, False)
        with warnings.catch_warnings():
            # Python 3.12 warns of forks beside threads; the copy takes no lock of theirs.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            _become_writer(make, str(self._raw), str(self.out), finish, write_fd, keep)
        os.close(write_fd)
        self._pid = pid

    @property
    def pid(self) -> int | None:
        """The writing process while it runs."""
        return self._pid

    def fileno(self) -> int | None:
        """Becomes readable when ``poll`` has something to say; None once it is over."""
        return self._read_fd if self.result is None and self._read_fd >= 0 else None

    def poll(self) -> dict[str, Any] | None:
        """What became of the capture, or None while it is on its way. Takes microseconds."""
        if self.result is not None or self._pid is None:
            return self.result
        ended, status = os.waitpid(self._pid, os.WNOHANG)
        with contextlib.suppress(BlockingIOError):
            while len(self._said) < _MAX_SAID_BYTES and (piece := os.read(self._read_fd, 65536)):
                self._said += piece
        self._hear_verdict()
        if ended:
            pid, self._pid = self._pid, None
            os.close(self._read_fd)
            self._read_fd = -1
            self.result = self._told(os.waitstatus_to_exitcode(status))
            self._remove_leftovers(pid)
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
        until = time.monotonic() + seconds
        while self.poll() is None and time.monotonic() < until:
            # Again and again, because it lowers itself when it comes to writing; and all, as they write one
            # after the other.
            for job in list(_JOBS):
                if job.pid is not None:
                    come_forward(job.pid)
            number = self.fileno()
            with selectors.DefaultSelector() as selector:
                if number is not None:
                    selector.register(number, selectors.EVENT_READ)
                selector.select(min(0.05, seconds))
            if self._said:
                # A pipe that was closed stays readable: what is left of the process is its exit.
                time.sleep(0.005)
        return self.result

    def close(self) -> None:
        """End the writing process if it still runs, and remove what is not a whole capture."""
        if self.poll() is None and self._pid is not None:
            os.kill(self._pid, signal.SIGTERM)
            until = time.monotonic() + 0.5
            while self.poll() is None and time.monotonic() < until:
                time.sleep(0.01)
            if self._pid is not None:
                os.kill(self._pid, signal.SIGKILL)
            while self.poll() is None:
                time.sleep(0.005)

    def _drop_raw(self) -> None:
        if self._raw != self.out:
            with contextlib.suppress(OSError):
                self._raw.unlink(missing_ok=True)

    def _remove_leftovers(self, pid: int) -> None:
        self._drop_raw()
        ours = temporary_prefix(self.out, pid)
        with contextlib.suppress(OSError):
            for part in self.out.parent.iterdir():
                if part.name.startswith(ours):
                    part.unlink(missing_ok=True)


def _refused(out: Path, error: BaseException) -> dict[str, Any]:
    why = getattr(error, "strerror", None) or str(error)
    return {"event": "capture", "path": None, "error": f"cannot write the capture to {out}: {why}"}


def _become_writer(
    make: Callable[[], Capture], raw: str, out: str, finish: list[str], said_fd: int, keep: Sequence[int]
) -> NoReturn:
    """In the copy: let go of everything of the watcher's, pack, and replace the program."""
    try:
        os.dup2(said_fd, 1)
        nothing = os.open(os.devnull, os.O_RDWR)
        os.dup2(nothing, 0)
        os.dup2(nothing, 2)
        part_from_watch(keep, WRITER_NICE)
        try:
            write_raw(raw, make())
        except (OSError, PrismError) as error:
            os.write(1, json.dumps(_refused(Path(out), error)).encode() + b"\n")
            os._exit(1)
        os.execv(sys.executable, [sys.executable, "-m", "latencyprism.recorder.write", raw, out, *finish])
    finally:
        os._exit(70)
