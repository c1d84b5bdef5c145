"""Objects of the target that do not behave: what is written is plain, what they raise stays inside."""

from __future__ import annotations

import pytest

from latencyprism.records.step import NULL

pytestmark = pytest.mark.attach_safety

SCRIPT = """
ran = []
class Index:
    def __index__(self): ran.append("index"); return 5
    def __int__(self): ran.append("int"); return 5
    def __str__(self): ran.append("str"); return "x" * 10**7
class Inttish(int):
    def __index__(self): ran.append("index"); return 5
class Raising:
    @property
    def value(self): raise RuntimeError("secret prompt text")
    def __getattr__(self, name): raise SystemExit("secret")
    def __len__(self): raise MemoryError
class Meta(type):
    def __setattr__(cls, name, value): ran.append("setattr"); raise TypeError
    def __getattribute__(cls, name): ran.append("getattribute"); return type.__getattribute__(cls, name)
class Guarded(metaclass=Meta):
    def step(self, x): return x
class Loop:
    def step(self, x): return x
loop, guarded = Loop(), Guarded()
ran.clear()
"""


def test_only_plain_integers_are_written(start, python, monkeypatch) -> None:
    reader = """
def reader(probe, config):
    main = sys.modules["__main__"]
    values = (7, main.Index(), 2**63, -2**63 - 1, 2**200, "text", None, 1.5, True, main.Inttish(3), 2**63 - 1)
    def leave(state, args, result, start, end):
        probe.emit(9, values if args[1] else (1, 2))
    probe.observe(main.Loop, "step", None, leave)
    return []
"""
    target = start(SCRIPT, python)
    session = target.attach(monkeypatch, reader)
    assert target.ask("[loop.step(1), loop.step(0), len(ran)]") == [1, 0, 0]
    records = [record.words for record in session.read()]
    assert records[0][:11] == (7, *[NULL] * 9, 2**63 - 1)
    assert records[1][:2] == (1, 2)
    assert session.ring.records() == 2
    assert session.health()["errors"] == 1
    assert "no plain integer" in session.ring.message()


def test_what_objects_raise_is_one_error_each_and_never_quoted(start, python, monkeypatch) -> None:
    reader = """
def reader(probe, config):
    main = sys.modules["__main__"]
    bad = main.Raising()
    def leave(state, args, result, start, end):
        if args[1] == 0: bad.value
        if args[1] == 1: bad.anything
        if args[1] == 2: len(bad)
        probe.emit(9, (args[1], size([1, 2])))
    probe.observe(main.Loop, "step", None, leave)
    return []
"""
    target = start(SCRIPT, python)
    session = target.attach(monkeypatch, reader)
    assert target.ask("[loop.step(k) for k in range(4)]") == [0, 1, 2, 3]
    assert [record.words[:2] for record in session.read()] == [(3, 2)]
    assert session.health()["errors"] == 3
    assert "secret" not in session.ring.message() and "MemoryError at probe line" in session.ring.message()


def test_metaclass_of_an_observed_class_is_not_asked(start, python, monkeypatch) -> None:
    reader = """
def reader(probe, config):
    owner = find_class("__main__", "Guarded")
    main = sys.modules["__main__"]
    main.ran.clear()
    probe.observe(owner, "step", None, lambda state, args, result, start, end: probe.emit(9, (result,)))
    return []
"""
    target = start(SCRIPT, python)
    session = target.attach(monkeypatch, reader)
    assert target.ask("[guarded.step(4), ran]") == [4, []]
    assert [record.words[0] for record in session.read()] == [4]
    assert session.close()


def test_half_imported_module_is_told_with_the_reason(start, monkeypatch) -> None:
    reader = """
def reader(probe, config):
    main = sys.modules["__main__"]
    probe.observe(main.Loop, "step", None, lambda *given: None)
    probe.observe_named(("half", "Scheduler", "schedule"))
    probe.observe_named(("never", "Scheduler", "schedule"))
    probe.observe_named(("__main__", "Nothing", "schedule"))
    probe.observe_named(("__main__", "Loop", "nothing"))
    return []
"""
    half = """
import importlib.machinery
half = types.ModuleType("half")
half.__spec__ = importlib.machinery.ModuleSpec("half", None); half.__spec__._initializing = True
def __getattr__(name): raise SystemExit
half.__getattr__ = __getattr__
sys.modules["half"] = half
"""
    target = start(SCRIPT + half)
    message = target.attach(monkeypatch, reader).ring.message()
    assert "half.Scheduler.schedule: its module is still being imported" in message
    assert "never.Scheduler.schedule: its module is not imported" in message
    assert "__main__.Nothing.schedule: no such class" in message
    assert "Loop.nothing: no such method" in message


def test_threads_stay_out_of_each_others_way_while_the_probe_goes(start, python, monkeypatch) -> None:
    """Detached in the middle of many calls in several threads: nothing is raised in any of them."""
    script = (
        SCRIPT
        + """
bad, stop = [], []
def run():
    loop = Loop()
    while not stop:
        try:
            for k in range(200):
                if loop.step(k) != k: bad.append(k)
            time.sleep(0.0005)
        except BaseException as error:
            bad.append(repr(error))
threads = [threading.Thread(target=run) for _ in range(3)]
[t.start() for t in threads]
def finish():
    stop.append(1); [t.join() for t in threads]
    return bad
"""
    )
    reader = """
def reader(probe, config):
    main = sys.modules["__main__"]
    probe.observe(main.Loop, "step", lambda args: args[1], lambda s, a, r, b, e: probe.emit(9, (s, r)))
    return []
"""
    target = start(script, python)
    for _ in range(5):
        session = target.attach(monkeypatch, reader)
        assert session.close()
    assert target.ask("finish()") == []
