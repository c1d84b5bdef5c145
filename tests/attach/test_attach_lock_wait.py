"""A main thread that is nearly always asleep in a lock, but never for long, is attached to all the same.

So does an engine loop that waits for its worker's result: it is neither at rest, for the route through a
blocked thread, nor in code of its own, and the code it sleeps in is also that of the pending-call queue's
lock.
"""

from __future__ import annotations

import pytest

from latencyprism.attach.inject import Injector

pytestmark = pytest.mark.attach_safety

WAITS = """
import queue, threading, time
asked, done = queue.SimpleQueue(), queue.Queue()
def worker():
    while True:
        number = asked.get()
        time.sleep(0.004)
        done.put(number * number)
threading.Thread(target=worker, daemon=True).start()
print("ready")
number = 0
while True:
    number += 1
    asked.put(number)
    assert done.get() == number * number
"""


def test_a_loop_that_waits_for_results_is_attached_to(start, python: str) -> None:
    target = start(WAITS, python)
    injector = Injector(target.pid)
    for _ in range(30):
        text, seen = target.note()
        report = injector.run(text, seen, timeout_s=3.0)
        assert report.stops <= 10
    assert target.process.poll() is None
