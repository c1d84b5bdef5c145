"""What was learned of an engine survives the watch: kept in a file, taken up by the next one; and ``ack``."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import threading
from contextlib import suppress
from math import expm1
from pathlib import Path
from typing import Any

from latencyprism.detect.memory import remember, restore
from latencyprism.engines.discovery import Replica
from latencyprism.errors import BadInput
from latencyprism.sentinel import acknowledge
from latencyprism.sentinel.attendant import Attendant, Raised
from latencyprism.sentinel.priority import start_alike
from latencyprism.sentinel.replica_watch import ReplicaWatch

SAVE_PERIOD_NS = 60_000_000_000
BYTES_MAX = 2_000_000
_PLACES = re.compile(r"--?(host|port|uds|api-key|root-path|ssl-[a-z-]+)(=.*)?")
"""Options that say where an engine listens, not what it runs."""


def key_of(replica: Replica) -> str:
    """File name of what is known of this engine: name, version, and a hash of what it was started with, so
    that another version, model or layout begins from nothing."""
    main = next((m.process for m in replica.members if m.role == "api"), replica.members[0].process)
    words, skip = [], False
    for word in main.cmdline:
        if skip:
            skip = False
            continue
        option = _PLACES.fullmatch(word)
        if option:
            skip = option[2] is None
            continue
        words.append(word)
    shape = hashlib.sha256("\0".join(words).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    name = "-".join(
        re.sub(r"[^A-Za-z0-9.+_]", "_", part)[:40] for part in (replica.engine, replica.version or "any")
    )
    return f"{name}-{shape}.json"


class MemoryWatch(Attendant):
    """``folder`` None: nothing is kept or taken up; ``ack`` works all the same."""

    name = "memory"
    prompt = False

    def __init__(self, folder: Path | None) -> None:
        super().__init__()
        self._folder = folder
        self._watches: list[ReplicaWatch] = []
        self._saved_ns = 0
        self._writer: threading.Thread | None = None

    def attached(self, watch: ReplicaWatch) -> None:
        self._watches.append(watch)
        if self._folder is None:
            return
        path = self._folder / key_of(watch.replica)
        try:
            data = read_state(path)
            if data is None:
                return
            restore(watch.detector, data)
        except BadInput as problem:
            self.say(f"{path}: {problem.what}: {problem.why}; beginning from nothing")
            self.emit("notice", engine=watch.replica.engine, pid=watch.replica.engine_pid,
                      text=f"{problem.what}: {problem.why}")  # fmt: skip
            return
        steps = watch.detector.steps
        self.emit(
            "restored", engine=watch.replica.engine, pid=watch.replica.engine_pid, steps=steps, path=str(path)
        )
        self.say(f"{watch.replica.engine} {watch.replica.engine_pid}: expectations of {steps} steps taken up")

    def tick(self, now_ns: int) -> list[Raised]:
        for watch in self._watches:
            self._acknowledge(watch)
        if not self._saved_ns:
            self._saved_ns = now_ns
        if now_ns - self._saved_ns >= SAVE_PERIOD_NS and not self._writing:
            self._saved_ns = now_ns
            kept = [found for watch in self._watches if (found := self._state(watch)) is not None]
            self._writer = threading.Thread(target=_write_all, args=(kept,), name="memory", daemon=True)
            start_alike(self._writer)
        return []

    def detached(self, watch: ReplicaWatch) -> None:
        if watch in self._watches:
            self._watches.remove(watch)
        if self._writer is not None:
            self._writer.join(1.0)
        found = self._state(watch)
        if found is not None:
            _write_all([found])

    @property
    def _writing(self) -> bool:
        return self._writer is not None and self._writer.is_alive()

    def _state(self, watch: ReplicaWatch) -> tuple[Path, dict[str, Any]] | None:
        if self._folder is None:
            return None
        state = remember(watch.detector)
        return None if state is None else (self._folder / key_of(watch.replica), state)

    def _acknowledge(self, watch: ReplicaWatch) -> None:
        identity = next(
            m.process.identity for m in watch.replica.members if m.pid == watch.replica.engine_pid
        )
        if not acknowledge.asked(identity):
            return
        shift = expm1(watch.detector.ack())
        acknowledge.answer(identity, shift)
        pid = watch.replica.engine_pid
        self.emit("acknowledged", engine=watch.replica.engine, pid=pid, shift=round(shift, 4))
        self.say(f"{watch.replica.engine} {pid}: {shift * 100:+.1f} % is normal from now on")


def read_state(path: Path) -> object:
    """None if there is no such file. BadInput if it is not one of ours."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise BadInput("this state cannot be read", error.strerror or str(error)) from None
    with os.fdopen(fd, "rb") as file:
        try:
            raw = file.read(BYTES_MAX + 1)
        except OSError as error:
            raise BadInput("this state cannot be read", error.strerror or str(error)) from None
    if len(raw) > BYTES_MAX:
        raise BadInput("this state cannot be used", "it is too large")
    try:
        found: object = json.loads(raw)
    except (ValueError, RecursionError):
        raise BadInput("this state cannot be used", "it is no JSON") from None
    if found is None:
        raise BadInput("this state cannot be used", "it is empty")
    return found


def _write_all(kept: list[tuple[Path, dict[str, Any]]]) -> None:
    """Whole or not at all. A full disk must not end the watch: then the older file stays."""
    for path, state in kept:
        with suppress(OSError):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            fd, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".new")
            try:
                with os.fdopen(fd, "w") as out:
                    json.dump(state, out, allow_nan=False)
                os.replace(name, path)
            except (OSError, ValueError):
                os.unlink(name)
