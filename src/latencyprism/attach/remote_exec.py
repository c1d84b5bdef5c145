"""Python 3.14 and later: asking the interpreter itself to run a script, by words in its memory (PEP 768).

Nothing is stopped. The interpreter publishes where its main thread looks for the path of a script; the path
is written there, then a flag, then bits that make the thread look. It opens the file, so the file must be
there under that name in the target's own root until it has answered.
"""

from __future__ import annotations

import os
import re
import secrets
import struct
import time
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..errors import TargetRefused
from ..tomlfile import parse_toml
from .interpreter import PythonInfo
from .memory import read_memory, write_memory
from .shared_folder import owner_of, shared_folder, sweep

_WORD = 8
_MOST_INTERPRETERS = 1024
_SIZE_LIMIT = 1 << 26
_FOLDER_MARK = "lprism-run-"
_SCRIPT = re.compile(_FOLDER_MARK + r"([0-9a-f]{1,7})-[0-9a-f]+\.py")
# A thread that has just taken the path needs this long at most to have opened the file.
_OPENING_S = 0.02


@dataclass(frozen=True, slots=True)
class Layout:
    """Word numbers in the published table, for one minor version; ``run``: versions it was run against."""

    version: tuple[int, int]
    run: tuple[str, ...]
    words: int
    at: dict[str, int]


@dataclass(frozen=True, slots=True)
class Places:
    """Offsets in bytes as one interpreter publishes them, checked for sense."""

    interpreters_head: int
    interpreter_id: int
    interpreter_next: int
    threads_main: int
    enabled: int
    thread_interpreter: int
    native_thread_id: int
    eval_breaker: int
    pending_call: int
    path: int


@cache
def _table() -> dict[str, Any]:
    text = files("latencyprism.attach").joinpath("remote_exec.toml").read_text(encoding="utf-8")
    return parse_toml(text, "the layouts of remote execution")


@cache
def layouts() -> dict[tuple[int, int], Layout]:
    """The known layouts by minor version."""
    found = {}
    for row in _table()["layout"]:
        major, minor = map(int, row["version"].split("."))
        numbers = {name: value for name, value in row.items() if isinstance(value, int) and name != "words"}
        found[major, minor] = Layout((major, minor), tuple(row["run"]), row["words"], numbers)
    return found


def read_places(pid: int, table_address: int, version: tuple[int, ...]) -> Places:
    """What the interpreter of ``version`` publishes at ``table_address``. Raises TargetRefused when it is not
    what that version publishes: the cookie, the version, every offset inside of its structure."""
    layout = layouts().get((version[0], version[1]))
    if layout is None:
        raise _odd(pid, f"no layout is known for Python {version[0]}.{version[1]}")
    words = struct.unpack(f"<{layout.words}Q", read_memory(pid, table_address, layout.words * _WORD))
    if words[0] != int.from_bytes(_table()["cookie"].encode(), "little"):
        raise _odd(pid, "its runtime does not begin with the table that tools look for")
    told = (words[1] >> 24, words[1] >> 16 & 255, words[1] >> 8 & 255)
    if told[: len(version)] != tuple(version):
        raise _odd(pid, f"the table is that of Python {told[0]}.{told[1]}.{told[2]}")
    if words[2]:
        raise _odd(pid, "its Python is free-threaded")
    one = {name: words[index] for name, index in layout.at.items()}
    _refuse_nonsense(pid, one)
    return Places(
        interpreters_head=one["interpreters_head"],
        interpreter_id=one["interpreter_id"],
        interpreter_next=one["interpreter_next"],
        threads_main=one["threads_main"],
        enabled=one["enabled"],
        thread_interpreter=one["thread_interpreter"],
        native_thread_id=one["native_thread_id"],
        eval_breaker=one["eval_breaker"],
        pending_call=one["support"] + one["pending_call"],
        path=one["support"] + one["path"],
    )


def _refuse_nonsense(pid: int, one: dict[str, int]) -> None:
    bytes_of_path: int = _table()["path_bytes"]
    if one["path_size"] != bytes_of_path:
        raise _odd(pid, f"its place for a path has {one['path_size']} bytes, not {bytes_of_path}")
    inside = {
        "runtime_size": ("interpreters_head",),
        "interpreter_size": ("interpreter_id", "interpreter_next", "threads_main", "enabled"),
        "thread_size": ("thread_interpreter", "native_thread_id", "eval_breaker", "support"),
    }
    for whole, parts in inside.items():
        if not 0 < one[whole] < _SIZE_LIMIT or any(one[part] + 4 > one[whole] for part in parts):
            raise _odd(pid, "the offsets that it publishes are not inside of their structures")
    ends = (one["pending_call"] + 4, one["path"] + bytes_of_path)
    if one["support"] + max(ends) > one["thread_size"] or one["pending_call"] + 4 > one["path"]:
        raise _odd(pid, "the place for a path is not inside of the thread's state")


class RemoteExec:
    """One prepared target of Python 3.14 or later.

    Making one reads memory and changes nothing. Raises TargetRefused when the interpreter does not publish
    what is known, has remote debugging switched off, or its main thread is not the process's.
    """

    def __init__(self, python: PythonInfo, ns_pid: int) -> None:
        self.pid = python.identity.pid
        self.verified = (
            ".".join(map(str, python.version)) in layouts()[python.version[0], python.version[1]].run
        )
        self._table_address = python.runtime[0]
        self._ns_pid = ns_pid
        self._places = read_places(self.pid, self._table_address, python.version)
        self._script: Path | None = None
        self._file = -1
        self._find_thread()

    def _word(self, address: int) -> int:
        return int.from_bytes(read_memory(self.pid, address, _WORD), "little")

    def _find_thread(self) -> int:
        """Address of the main thread's state in the main interpreter, known by its number 0."""
        places = self._places
        interpreter = self._word(self._table_address + places.interpreters_head)
        for _ in range(_MOST_INTERPRETERS):
            if not interpreter:
                break
            if self._word(interpreter + places.interpreter_id) == 0:
                return self._thread_of(interpreter)
            interpreter = self._word(interpreter + places.interpreter_next)
        raise _odd(self.pid, "its main interpreter is not to be found")

    def _thread_of(self, interpreter: int) -> int:
        places = self._places
        if int.from_bytes(read_memory(self.pid, interpreter + places.enabled, 4), "little") != 1:
            raise TargetRefused(
                f"process {self.pid} cannot be attached to",
                "its Python has remote debugging switched off",
                "start it without PYTHON_DISABLE_REMOTE_DEBUG and -X disable-remote-debug",
            )
        thread = self._word(interpreter + places.threads_main)
        if not thread or self._word(thread + places.thread_interpreter) != interpreter:
            raise _odd(self.pid, "its main thread is not to be found")
        if self._word(thread + places.native_thread_id) != self._ns_pid:
            raise _odd(self.pid, "its main interpreter runs in another thread than the main one")
        return thread

    def request(self, text: bytes) -> None:
        """Have the main thread run ``text`` when it next looks. ``withdraw`` must follow in any case.

        Raises TargetRefused when another tool's request is waiting, or no file can be put in its reach.
        """
        places, thread = self._places, self._find_thread()
        if any(read_memory(self.pid, thread + places.pending_call, 4)) and not self._take_over(thread):
            raise TargetRefused(
                f"process {self.pid} cannot be attached to",
                "another tool asks it to run a script at this moment",
                "end that tool, then try again",
            )
        path = self._put_script(text)
        write_memory(self.pid, thread + places.path, path.ljust(_table()["path_bytes"], b"\0"))
        write_memory(self.pid, thread + places.pending_call, (1).to_bytes(4, "little"))
        self.wake(thread)

    def _take_over(self, thread: int) -> bool:
        """Take away the request of a writer of ours that was killed; True when it was one."""
        raw = read_memory(self.pid, thread + self._places.path, _table()["path_bytes"])
        name = os.path.basename(raw.split(b"\0", 1)[0].decode("utf-8", "replace"))
        if not _left_behind(name):
            return False
        write_memory(self.pid, thread + self._places.pending_call, bytes(4))
        return True

    def wake(self, thread: int | None = None) -> None:
        """Make the main thread look; one byte, so that no other part of the word is written."""
        address = (self._find_thread() if thread is None else thread) + self._places.eval_breaker
        bits = read_memory(self.pid, address, 1)[0] | _table()["wake_bits"]
        write_memory(self.pid, address, bytes((bits,)))

    def _put_script(self, text: bytes) -> bytes:
        folder, inside = shared_folder(self.pid)
        _reclaim(folder)
        sweep(folder)
        name = f"{_FOLDER_MARK}{os.getpid():x}-{secrets.token_hex(8)}.py"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            self._script, self._file = folder / name, os.open(folder / name, flags, 0o600)
            os.write(self._file, text)
            if os.geteuid() == 0:
                os.fchown(self._file, *owner_of(self.pid))
        except OSError as error:
            raise TargetRefused(
                f"process {self.pid} cannot be attached to",
                f"no file can be put in {inside} of it: {error.strerror}",
                "make room there",
            ) from None
        return os.fsencode(f"{inside}/{name}")

    def withdraw(self, acknowledged: bool = False) -> None:
        """Take flag, path and file away. What has not run by now will not run later. Harmless twice.

        Raises TargetRefused when the target is gone; the file is taken away then too.
        """
        script, self._script = self._script, None
        if script is None:
            return
        try:
            # First the text: a thread that has taken the path already then runs nothing. Through the
            # descriptor: the name is in a folder of the target, which may have put a link there.
            if self._file >= 0:
                os.ftruncate(self._file, 0)
            thread = self._find_thread()
            flag = thread + self._places.pending_call
            taken = not any(read_memory(self.pid, flag, 4))
            write_memory(self.pid, flag, bytes(4))
            write_memory(self.pid, thread + self._places.path, bytes(_table()["path_bytes"]))
            if taken and not acknowledged:
                # It opens the file right after it lowered the flag; not finding it, it would say so.
                time.sleep(_OPENING_S)
        finally:
            if self._file >= 0:
                os.close(self._file)
                self._file = -1
            script.unlink(missing_ok=True)


def _left_behind(name: str) -> bool:
    """True for the name of a script whose writer is gone."""
    writer = _SCRIPT.fullmatch(name)
    return writer is not None and not os.path.exists(f"/proc/{int(writer[1], 16)}")


def _reclaim(folder: Path) -> None:
    """Take away scripts of writers that are gone."""
    for path in folder.glob(f"{_FOLDER_MARK}*.py"):
        if _left_behind(path.name):
            path.unlink(missing_ok=True)


def _odd(pid: int, why: str) -> TargetRefused:
    return TargetRefused(
        f"process {pid} cannot be attached to",
        why,
        "use eBPF and host signals for it",
    )
