"""Run one engine and end it, with all its descendants, when the starter closes our standard input or dies.

``guard.py GRACE_SECONDS COMMAND...``: prints the engine's process id. A pipe rather than PR_SET_PDEATHSIG
alone: the latter fires when the *thread* that started us ends, and is not inherited by the engine's own
children. We are their subreaper, so none can slip away by losing its parent.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
_libc = ctypes.CDLL(None, use_errno=True)


def main(grace_s: float, command: list[str]) -> int:
    _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
        start_new_session=True,
        preexec_fn=lambda: _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0),
    )
    sys.stdout.write(f"{child.pid}\n")
    sys.stdout.flush()
    _wait_for_either(child.pid)
    _end(child.pid, grace_s)
    child.wait()
    # Whoever is left is dead and adopted by us; uncollected they would stay as zombies where init collects
    # none.
    try:
        while os.waitpid(-1, 0)[0]:
            pass
    except ChildProcessError:
        return 0
    return 0


def _wait_for_either(pid: int) -> None:
    """Until our standard input ends or the engine does."""
    watcher = select.poll()
    watcher.register(0, select.POLLIN | select.POLLHUP)
    while True:
        if watcher.poll(200) and not os.read(0, 64):
            return
        if _ended(pid):
            return
        _reap_others(pid)


def _end(engine: int, grace_s: float) -> None:
    """SIGTERM to the engine alone (it ends its own), SIGKILL to whatever of its tree is left afterwards."""
    _signal(engine, signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    while time.monotonic() < deadline and not _ended(engine):
        time.sleep(0.05)
    for _ in range(50):
        left = [pid for pid in _descendants() if not _ended(pid)]
        if not left:
            return
        for pid in left:
            _signal(pid, signal.SIGKILL)
        time.sleep(0.05)
        _reap_others(engine)


def _descendants() -> list[int]:
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            fields = _stat(int(name))
            if fields:
                children.setdefault(int(fields[1]), []).append(int(name))
    found, queue = [], [os.getpid()]
    while queue:
        for pid in children.get(queue.pop(), []):
            found.append(pid)
            queue.append(pid)
    return found


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the state on, or None where the process is gone."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()
    except OSError:
        return None


def _ended(pid: int) -> bool:
    fields = _stat(pid)
    return fields is None or fields[0] in "ZX"


def _reap_others(engine: int) -> None:
    """Collect adopted children that ended; the engine itself is left to Popen.wait()."""
    for pid in _descendants():
        fields = _stat(pid)
        if pid != engine and fields and fields[0] == "Z" and int(fields[1]) == os.getpid():
            os.waitpid(pid, os.WNOHANG)


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(main(float(sys.argv[1]), sys.argv[2:]))
