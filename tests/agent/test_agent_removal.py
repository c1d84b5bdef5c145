"""What is left of a probe that was there: nothing, however it ended. Compared before and after, by the
target."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from latencyprism.agent.assemble import bootstrap
from latencyprism.agent.session import remove_probe
from latencyprism.errors import TargetRefused
from latencyprism.records import ring

pytestmark = pytest.mark.attach_safety

SCRIPT = """
class Loop:
    def step(self, x): return x
    def other(self): return 2
    async def aio(self): return 3
    @staticmethod
    def fixed(): return 4
loop = Loop()
bound = loop.step
_held = dict(vars(Loop))
_before = _line = _answer = None
def same():
    '''Names of what differs from before; [] when all is as it was.'''
    now, held = traces(), dict(vars(Loop))
    changed = [key for key in now if now[key] != _before[key]]
    changed += [name for name in held if held[name] is not _held.get(name)]
    return changed + (["order"] if list(held) != list(_held) else [])
traces(); _before = traces()
"""
READER = """
def reader(probe, config):
    main = sys.modules["__main__"]
    for name in ("step", "other", "aio", "fixed"):
        probe.observe(main.Loop, name, lambda args: 1, lambda *given: probe.emit(9, (1, 2)))
    return []
"""
CALLS = "[loop.step(1), loop.other(), asyncio.run(loop.aio()), loop.fixed(), bound(5)]"


def begin(start, python, monkeypatch, **config):
    target = start(SCRIPT, python)
    assert target.ask("[asyncio.run(loop.aio()), globals().update(_before=traces())][:1]") == [3]
    assert target.ask("same()") == []
    session = target.attach(monkeypatch, READER, deep=[("__main__", "Loop", "other")], **config)
    assert "modules" in target.ask("same()")
    assert target.ask(CALLS) == [1, 2, 3, 4, 5]
    return target, session


def test_detach_leaves_nothing(start, python, monkeypatch) -> None:
    target, session = begin(start, python, monkeypatch)
    session.arm_deep(30)
    target.ask(CALLS)
    assert session.close()
    assert target.ask("same()") == []
    assert target.ask(CALLS) == [1, 2, 3, 4, 5] and target.ask("same()") == []


def test_detach_at_the_next_call(start, python, monkeypatch) -> None:
    target, session = begin(start, python, monkeypatch)
    session.ring.set_header(ring.H_COMMAND, ring.COMMAND_DETACH)
    target.ask(CALLS)
    assert session.ring.header(ring.H_STATE) == ring.STATE_DETACHED
    assert target.ask("same()") == []


def test_lease_leaves_nothing(start, python, monkeypatch) -> None:
    target, session = begin(start, python, monkeypatch)
    session.ring.set_header(ring.H_LEASE_NS, time.monotonic_ns() - 1)
    assert target.ask(CALLS) == [1, 2, 3, 4, 5]
    assert session.expired and target.ask("same()") == []


def test_attach_and_detach_again_and_again(start, python, monkeypatch) -> None:
    target, session = begin(start, python, monkeypatch)
    assert session.close()
    for _ in range(5):
        session = target.attach(monkeypatch, READER)
        target.ask(CALLS)
        assert sum(1 for _ in session.read()) >= 4
        assert session.close()
    assert target.ask("same()") == []


def test_probe_whose_reader_fails_leaves_nothing(start, python, monkeypatch) -> None:
    target = start(SCRIPT, python)
    target.ask("globals().update(_before=traces())")
    broken = READER.replace("return []", "raise KeyError('half way')")
    with pytest.raises(TargetRefused, match="KeyError"):
        target.attach(monkeypatch, broken)
    assert target.ask("same()") == []
    assert target.ask(CALLS) == [1, 2, 3, 4, 5]


def test_removed_by_another_process(start, monkeypatch, python) -> None:
    target, _ = begin(start, python, monkeypatch)
    assert remove_probe(target.pid)
    assert target.ask("same()") == []


def test_late_copy_of_the_command_does_nothing(start, python, monkeypatch) -> None:
    """A pending call that was queued while the target idled runs when all is over."""
    kept: list[str] = []
    monkeypatch.setattr(
        "latencyprism.agent.session.ProbeSession._unlink", lambda self: kept.extend(map(str, self._files))
    )
    target, session = begin(start, python, monkeypatch)
    text = next(name for name in kept if name.endswith(".py"))
    run = f"exec({bootstrap(text)!r}, {{}})"
    try:
        assert target.ask(f"[{run}, loop.step(1)]")[1] == 1  # the same command twice
        assert sum(r.kind == 9 for r in session.read()) == (
            6 if target.ask("hasattr(sys, 'monitoring')") else 5
        )
        assert session.close()
        target.ask(run)
        assert target.ask("same()") == [] and target.ask("loop.step(1)") == 1
        assert session.plan.reader == "test"
    finally:
        for name in kept:
            os.unlink(name)


def test_forked_child_is_silent_and_clean(start, python, monkeypatch) -> None:
    target, session = begin(start, python, monkeypatch)
    child = """
def forked():
    read, write = os.pipe()
    if os.fork() == 0:
        try:
            values = [loop.step(1), loop.step(2), loop.other()]
            gone = "_latencyprism_probe" not in sys.modules and "lprism" not in open("/proc/self/maps").read()
            changed = [n for n in vars(Loop) if vars(Loop)[n] is not _held[n]]
            os.write(write, json.dumps([values, gone, changed]).encode())
        finally:
            os._exit(0)
    os.wait()
    answer = os.read(read, 65536); os.close(read); os.close(write)
    return json.loads(answer)
"""
    target.ask(f"exec({child!r}, globals())")
    list(session.read())
    assert target.ask("forked()") == [[1, 2, 2], True, []]
    assert list(session.read()) == [] and session.health()["errors"] == 0
    target.ask("loop.step(1)")
    assert sum(1 for _ in session.read()) == 1 and session.live


def test_somebody_elses_wrapper_stays_and_ours_below_is_silent(start, monkeypatch) -> None:
    target, session = begin(start, sys.executable, monkeypatch)
    target.ask(
        "exec('_ours = vars(Loop)[\"step\"]\\nLoop.step = lambda self, x: _ours(self, x) + 100', globals())"
    )
    assert session.close()
    if not target.ask("hasattr(sys, 'monitoring')"):
        assert "wrapped by somebody else: Loop.step" in session.last_message
    assert target.ask("loop.step(1)") == 101


def test_bare_process_keeps_at_most_libraries_of_python(start, python, monkeypatch) -> None:
    """A process that never imported mmap gets its modules back as they were; the library itself stays
    mapped."""
    target = start(SCRIPT, python)
    drop = "[sys.modules.pop(n, None) and 0 for n in ('mmap', 'ctypes', '_ctypes')]"
    target.ask(
        f"[{drop}, globals().pop('mmap'), globals().pop('ctypes'), globals().update(_before=traces())][:1]"
    )
    session = target.attach(monkeypatch, READER)
    assert target.ask("'mmap' in sys.modules and 'ctypes' not in sys.modules") is True
    target.ask(CALLS)
    assert session.close()
    assert target.ask("same()") == []


@pytest.mark.parametrize("leave", ["lambda *given: 1 / 0", "lambda *given: probe.dropped()"])
def test_a_probe_that_can_read_no_step_goes_all_the_same(start, python, monkeypatch, leave: str) -> None:
    target = start(SCRIPT, python)
    assert target.ask("[asyncio.run(loop.aio()), globals().update(_before=traces())][:1]") == [3]
    reader = f"""
def reader(probe, config):
    probe.observe(sys.modules["__main__"].Loop, "step", None, {leave})
    return []
"""
    session = target.attach(monkeypatch, reader)
    assert target.ask("loop.step(1)") == 1 and session.live
    session.ring.set_header(ring.H_LEASE_NS, 0)
    assert target.ask("loop.step(1)") == 1
    assert session.expired and target.ask("same()") == []


def test_ring_and_pipe_are_given_back_where_an_undo_fails_badly(start, monkeypatch) -> None:
    target = start(SCRIPT)
    reader = """
def reader(probe, config):
    def fails():
        raise SystemExit
    probe.observe(sys.modules["__main__"].Loop, "step", None, lambda *given: probe.emit(9, (1, 2)))
    probe.undo.append(fails)
    return []
"""
    session = target.attach(monkeypatch, reader)
    session.ring.set_header(ring.H_LEASE_NS, 0)
    target.ask("loop.step(1)")
    assert session.expired
    maps = Path(f"/proc/{target.pid}/maps").read_text()
    assert f"lprism-{session.nonce:016x}" not in maps
