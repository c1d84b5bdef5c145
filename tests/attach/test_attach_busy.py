"""A target at work keeps working, and right, while it is attached to again and again."""

from __future__ import annotations

import threading
import time

import pytest

from latencyprism.attach.inject import Injector
from latencyprism.attach.memory import read_memory
from latencyprism.attach.ptrace import Registers, Tracee, in_tracer_thread
from latencyprism.attach.slack import SLOT_BYTES
from latencyprism.bench.attaching import quantile, run_stand_in
from latencyprism.errors import TargetRefused

pytestmark = pytest.mark.attach_safety

BUSY = """
import json, math, threading
value = {"a": [1, 2.5, "x", None] * 20}
text = json.dumps(value)
def floats():
    expected = math.fsum(math.sin(i) for i in range(500))
    while True:
        assert math.fsum(math.sin(i) for i in range(500)) == expected
threading.Thread(target=floats, daemon=True).start()
print("ready")
while True:
    assert json.loads(text) == value
"""


def test_cycles_leave_a_busy_target_right_and_as_it_was(any_python: str) -> None:
    """Whole attachments with the real probe: no wrong result, no trace, a record in every one."""
    figures = run_stand_in(any_python, 20)
    assert (figures["crashes"], figures["hangs"], figures["wrong"]) == (0, 0, 0)
    assert figures["left"] == [] and figures["leftovers"] == 0
    assert figures["attached"] == 20 and figures["silent"] == 0
    assert figures["compared"]["attribute"] > 10 and figures["compared"]["mapping"] > 10
    assert all(figures["iterations"].values())
    stopped = figures["routes"].keys() & {"pending", "gil"}
    assert (figures["stops"] > 0) == bool(stopped)


def test_pending_route_is_taken_and_short(start) -> None:
    target = start(BUSY)
    injector = Injector(target.pid)
    reports = []
    for _ in range(20):
        text, seen = target.note()
        reports.append(injector.run(text, seen))
    assert {report.route for report in reports} == {"pending"}
    held = quantile([report.held_us for report in reports], 0.5)
    # Measured at 0.1 to 0.2 ms; the limit leaves room for a loaded machine.
    assert held is not None and held < 5000
    assert target.process.poll() is None


def test_parent_that_polls_its_child_does_not_take_a_stop_for_its_end(start) -> None:
    target = start(BUSY)
    ended = threading.Event()

    def poll() -> None:
        while not ended.is_set():
            assert target.process.poll() is None

    poller = threading.Thread(target=poll)
    poller.start()
    try:
        injector = Injector(target.pid)
        for _ in range(20):
            injector.run(*target.note(), timeout_s=10)
    finally:
        ended.set()
        poller.join()
    assert target.process.returncode is None


def test_text_is_removed_after_use(start) -> None:
    target = start(BUSY)
    injector = Injector(target.pid)
    for _ in range(10):
        injector.run(*target.note())
    for slot in injector._slots:
        assert read_memory(target.pid, slot.address, SLOT_BYTES) == bytes(SLOT_BYTES)


def test_every_register_and_vector_comes_back(start) -> None:
    """Borrow the thread for a call that changes nothing, follow it home, compare all state bit by bit."""
    target = start(BUSY)
    injector = Injector(target.pid)

    def once() -> tuple[Registers, Registers, bytes, bytes, int, int] | None:
        with Tracee(target.pid) as tracee:
            assert tracee.stop() is not None
            found = injector._borrower._resumed(tracee)
            if isinstance(found, str):
                return None
            after, vectors, mask = found.after, tracee.xstate(), tracee.signal_mask()
            if injector._borrower._holds_gil(tracee, after, vectors, mask) is None:
                return None
            return after, tracee.registers(), vectors, tracee.xstate(), mask, tracee.signal_mask()

    compared = 0
    for _ in range(60):
        got = in_tracer_thread(once)
        if got is None:
            continue
        compared += 1
        for name, _ in Registers._fields_:
            assert getattr(got[0], name) == getattr(got[1], name), name
        assert got[2] == got[3]
        assert got[4] == got[5]
    assert compared > 30


NATIVE = """
import hashlib, sys
print("ready")
hashlib.pbkdf2_hmac("sha256", b"x", b"y", 3_000_000)
print("done")
sys.stdin.readline()
print("bye")
"""


def test_main_thread_in_native_code_is_refused_and_nothing_runs_later(start) -> None:
    target = start(NATIVE)
    time.sleep(0.1)
    text, seen = target.note()
    with pytest.raises(TargetRefused, match="native code"):
        Injector(target.pid).run(text, seen, timeout_s=0.3)
    assert target.line() == "done"
    target.process.stdin.write("\n")
    target.process.stdin.flush()
    assert target.line() == "bye"
    assert target.process.wait(5) == 0
    assert not seen()
