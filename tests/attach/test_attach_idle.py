"""A target that waits runs the text at once and goes on waiting as if nothing had been."""

from __future__ import annotations

import time

import pytest

from latencyprism.attach.inject import Injector
from latencyprism.errors import TargetRefused

pytestmark = pytest.mark.attach_safety

# A target begins when it is told to, so that the injector can be made before.
HEAD = (
    "import sys, time, threading, queue, select, asyncio, os, socket, ctypes, signal\n"
    "print('ready')\nsys.stdin.readline()\nprint('begun')\n"
)
# Each waits for something that comes after 0.8 s, then tells how long that took (seconds) and what it got.
TIMED = {
    "queue.get": "q=queue.Queue(); threading.Timer(0.8, q.put, (7,)).start(); got=q.get()",
    "queue.get timeout": "q=queue.Queue()\ntry: q.get(timeout=0.8)\nexcept queue.Empty: got=7",
    "time.sleep": "time.sleep(0.8); got=7",
    "asyncio.sleep": "asyncio.run(asyncio.sleep(0.8)); got=7",
    "asyncio call": "got=asyncio.run(asyncio.wait_for(asyncio.to_thread(lambda: time.sleep(0.8) or 7), 9))",
    "select": "select.select([0],[],[],0.8); got=7",
    "recv": "a,b=socket.socketpair(); threading.Timer(0.8, b.send, (b'7',)).start(); got=int(a.recv(9))",
    "pipe read": "r,w=os.pipe(); threading.Timer(0.8, os.write, (w,b'7')).start(); got=int(os.read(r,9))",
    "join": "t=threading.Timer(0.8, int); t.start(); t.join(); got=7",
    "event": "e=threading.Event(); threading.Timer(0.8, e.set).start(); got=7*e.wait(9)",
}
ENDLESS = "r,w=os.pipe(); p=select.poll(); p.register(r); threading.Timer(0.8, os.write, (w,b'7')).start(); "


def _timed(body: str) -> str:
    return (
        HEAD
        + "began=time.monotonic()\n"
        + body
        + "\nprint('%.3f' % (time.monotonic()-began), got)\nsys.stdin.readline()\n"
    )


def _begin(target) -> Injector:
    injector = Injector(target.pid)
    target.process.stdin.write("\n")
    target.process.stdin.flush()
    assert target.line() == "begun"
    target.wait_in_syscall()
    return injector


def _inject_thrice(target) -> str:
    """The route of the first of three texts; on a slow machine the wait may be over before the third."""
    injector = _begin(target)
    routes = []
    for _ in range(3):
        routes.append(injector.run(*target.note()).route)
        target.wait_in_syscall()
    return routes[0]


@pytest.mark.parametrize("kind", TIMED)
def test_wait_ends_when_it_should(start, kind: str) -> None:
    target = start(_timed(TIMED[kind]))
    assert _inject_thrice(target) == "gil"
    took, got = target.line().split()
    assert got == "7"
    assert 0.79 <= float(took) < 1.5


@pytest.mark.parametrize("kind", ["queue.get", "asyncio.sleep"])
def test_idle_target_of_every_version(start, python: str, kind: str) -> None:
    target = start(_timed(TIMED[kind]), python)
    assert _inject_thrice(target) == "gil"
    took, got = target.line().split()
    assert got == "7" and 0.79 <= float(took) < 1.5


def test_endless_poll_is_exact(start) -> None:
    target = start(_timed(ENDLESS + "got=7*len(p.poll())"))
    assert _inject_thrice(target) == "gil"
    took, got = target.line().split()
    assert got == "7" and 0.79 <= float(took) < 1.5


def test_poll_with_a_limit_is_at_most_started_anew(start) -> None:
    target = start(_timed("p=select.poll(); p.register(os.pipe()[0]); p.poll(800); got=7"))
    assert _inject_thrice(target) == "gil"
    took, _ = target.line().split()
    # Each borrowing starts it anew: three of them within the first moments add little.
    assert 0.79 <= float(took) < 2.0


def test_pause_is_not_woken(start) -> None:
    target = start(HEAD + "signal.pause()\nprint('woken')\n")
    assert _inject_thrice(target) == "gil"
    assert target.process.poll() is None
    target.wait_in_syscall()


def test_native_caller_of_poll_does_not_see_the_stop(start) -> None:
    """C code that does not repeat an interrupted call must not get EINTR for our sake."""
    target = start(_timed("got=7+ctypes.CDLL(None).poll(None, 0, 800)"))
    assert _inject_thrice(target) == "gil"
    assert target.line().split()[1] == "7"


def test_gil_held_in_a_wait_is_refused(start) -> None:
    target = start(_timed("got=7+ctypes.PyDLL(None).poll(None, 0, 800)"))
    injector = _begin(target)
    text, seen = target.note()
    with pytest.raises(TargetRefused, match="holds the GIL"):
        injector.run(text, seen, timeout_s=0.3)
    assert target.line().split()[1] == "7"
    assert not seen()


def test_another_thread_keeps_the_gil_and_the_text_waits_for_it(start) -> None:
    hog = "threading.Timer(0.4, lambda: ctypes.PyDLL(None).poll(None, 0, 700)).start()\n"
    target = start(_timed(hog + "q=queue.Queue(); threading.Timer(1.4, q.put, (7,)).start(); got=q.get()"))
    injector = _begin(target)
    time.sleep(0.5)
    report = injector.run(*target.note(), timeout_s=3.0)
    assert report.route == "gil"
    assert target.line().split()[1] == "7"


def test_signal_during_a_borrowed_wait_still_arrives(start) -> None:
    target = start(HEAD + "signal.signal(signal.SIGUSR1, lambda *a: print('signalled'))\ntime.sleep(3.0)\n")
    assert _inject_thrice(target) == "gil"
    target.process.send_signal(10)
    assert target.line() == "signalled"
    assert target.process.poll() is None


def test_signal_mask_and_alternate_stack_are_kept(start) -> None:
    """faulthandler runs on an alternate signal stack; the way back must not take it away."""
    target = start(
        "import faulthandler, signal, sys, time\nfaulthandler.enable()\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})\nprint('ready')\n"
        "sys.stdin.readline()\nprint('begun')\ntime.sleep(0.8)\n"
        "print(sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, ()))))\n"
        "import ctypes\nstack=(ctypes.c_uint64*3)()\nctypes.CDLL(None).sigaltstack(None, stack)\n"
        "print(stack[1] & 0xffffffff, stack[2] > 0)\n"
    )
    _inject_thrice(target)
    assert target.line() == "[12]"
    assert target.line() == "0 True"
