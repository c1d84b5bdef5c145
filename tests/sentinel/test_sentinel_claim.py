"""One watcher a process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from latencyprism.attach.process import read_process
from latencyprism.errors import TargetRefused
from latencyprism.sentinel.claim import Claim, holder_of


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


def test_second_is_told_who_holds_it_and_may_have_it_afterwards() -> None:
    identity = read_process(os.getpid()).identity
    first = Claim(identity)
    assert holder_of(identity) == os.getpid()
    with pytest.raises(TargetRefused, match=str(os.getpid())):
        Claim(identity)
    first.close()
    assert holder_of(identity) is None
    Claim(identity).close()


def test_killed_holder_leaves_nothing_behind(tmp_path: Path) -> None:
    identity = read_process(os.getpid()).identity
    code = (
        "import sys, time\n"
        "from latencyprism.attach.process import Identity\n"
        "from latencyprism.sentinel.claim import Claim\n"
        f"held = Claim(Identity({identity.pid}, {identity.start_ticks}))\n"
        "print('held', flush=True)\ntime.sleep(60)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(TargetRefused, match=str(holder.pid)):
        Claim(identity)
    holder.kill()
    holder.wait()
    holder.stdout.close()
    deadline = time.monotonic() + 2
    while holder_of(identity) is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    Claim(identity).close()
