"""Whatever becomes of the tracer, the target goes on: killed at any point, interrupted, out of time."""

from __future__ import annotations

import random
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from latencyprism.attach.inject import Injector
from latencyprism.attach.process import read_process
from latencyprism.bench import attach_kill

pytestmark = pytest.mark.attach_safety

BUSY = """
import json, sys, threading
value = {"a": [1, 2.5, "x", None] * 20}
text = json.dumps(value)
ended = []
threading.Thread(target=lambda: ended.append(sys.stdin.readline()), daemon=True).start()
print("ready")
while not ended:
    assert json.loads(text) == value
print("right")
"""
IDLE = """
import queue, sys, threading
items = queue.Queue()
print("ready")
threading.Thread(target=lambda: items.put(sys.stdin.readline()), daemon=True).start()
items.get()
print("right")
"""

DYING = """
import os, signal, sys
from latencyprism.attach import borrow, inject
from latencyprism.attach.memory import write_memory
pid, stage, number, text = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
entered = 0
def enter(self, tracee, image, whole=borrow.Borrower._enter):
    global entered
    entered += 1
    if entered < number:
        return whole(self, tracee, image)
    write_memory(self.pid, image.address, image.data)
    if stage != "written":
        tracee.set_registers(image.entry)
    if stage == "mask":
        tracee.set_signal_mask(borrow.BLOCKED_SIGNALS)
    os.kill(os.getpid(), signal.SIGKILL)
borrow.Borrower._enter = enter
inject.Injector(pid).run(text, lambda: False)
"""


def _finish(target) -> None:
    assert read_process(target.pid).tracer_pid == 0
    target.process.stdin.write("\n")
    target.process.stdin.flush()
    assert target.line() == "right"
    assert target.process.wait(5) == 0


def _wait_for(seen, limit_s: float = 3.0) -> bool:
    until = time.monotonic() + limit_s
    while not seen() and time.monotonic() < until:
        time.sleep(0.01)
    return bool(seen())


# (script, stage of death, which entering of the thread dies, does the text run all the same?)
DEATHS = {
    "busy, before the registers": (BUSY, "written", 1, False),
    "busy, after the registers": (BUSY, "registers", 1, True),
    "busy, after the mask": (BUSY, "mask", 1, True),
    "idle, looking, before the registers": (IDLE, "written", 1, False),
    "idle, looking, after the mask": (IDLE, "mask", 1, False),
    "idle, calling, before the registers": (IDLE, "written", 2, False),
    "idle, calling, after the registers": (IDLE, "registers", 2, True),
    "idle, calling, after the mask": (IDLE, "mask", 2, True),
}


@pytest.mark.parametrize("kind", DEATHS)
def test_killed_tracer(start, kind: str) -> None:
    script, stage, number, runs = DEATHS[kind]
    target = start(script)
    if script is IDLE:
        target.wait_in_syscall()
    text, seen = target.note()
    tracer = subprocess.run(
        [sys.executable, "-c", DYING, str(target.pid), stage, str(number), text], timeout=20, check=False
    )
    assert tracer.returncode == -signal.SIGKILL
    assert _wait_for(seen, 3.0 if runs else 0.2) is runs
    # The next watcher finds the text of the dead one, takes it away and gets in.
    injector = Injector(target.pid)
    again, seen_again = target.note()
    injector.run(again, seen_again)
    _finish(target)


INTERRUPTED = """
import sys
from latencyprism.attach.inject import Injector
injector, path = Injector(int(sys.argv[1])), sys.argv[2]
print("ready", flush=True)
for number in range(100_000):
    try:
        injector.run(f"open({path!r},'w').write('{number}')", lambda: open(path).read() == str(number))
    except KeyboardInterrupt:
        print("interrupted", flush=True)
"""


def test_interrupted_tracer_leaves_nothing_stopped(start, tmp_path: Path) -> None:
    target = start(BUSY)
    path = tmp_path / "number"
    path.write_text("")
    tracer = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(target.pid), str(path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert tracer.stdout is not None
        tracer.stdout.readline()
        chance = random.Random(7)
        for _ in range(15):
            time.sleep(0.02 + chance.random() * 0.01)
            tracer.send_signal(signal.SIGINT)
            # Python drops an interrupt that falls into a callback of its own.
            while not select.select([tracer.stdout], [], [], 5.0)[0]:
                tracer.send_signal(signal.SIGINT)
            tracer.stdout.readline()
    finally:
        tracer.kill()
        tracer.communicate()
    assert read_process(target.pid).state in "RS"
    _finish(target)


@pytest.mark.parametrize("idle", [False, True], ids=["at work", "in a wait"])
def test_tracer_killed_at_random_moments(idle: bool) -> None:
    """By a timer of the kernel anywhere in the attempt, and one in four right between registers and mask."""
    told = attach_kill.run(sys.executable, 32, 5, idle=idle, say=lambda text: None)
    assert told["survived"] == told["kills"] == 32
    assert told["wrong"] == 0
    assert told["between_registers_and_mask"] >= 4
    assert len(told["died"]) >= 2
