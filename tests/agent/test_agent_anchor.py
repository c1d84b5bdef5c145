"""The search's hooks inside live interpreters: what is found by its code, what is let go, what is a step."""

from __future__ import annotations

from typing import Any

import pytest

from latencyprism.agent.session import ProbePlan, ProbeSession
from latencyprism.errors import TargetRefused
from latencyprism.records import ring

pytestmark = pytest.mark.attach_safety

SCRIPT = """
class Loop:
    def step(self, x=1):
        return inner() + x
    @staticmethod
    def static(x):
        return x
    @functools.lru_cache(maxsize=None)
    def cached(self):
        return 3
    async def wait(self):
        await asyncio.sleep(0.002)
        return 5
    def burst(self):
        return 0
    def turn(self, busy):
        if busy:
            self.work()
        return busy
    def work(self):
        gc.collect()
    def stream(self):
        yield 1
def inner():
    return 41
def outer():
    def nested():
        return 7
    return nested
hidden = [outer()]
alias = types.ModuleType("alias"); alias.inner = inner; sys.modules["alias"] = alias
class Trap(types.ModuleType):
    def __getattribute__(self, name):
        raise SystemError(name)
sys.modules["trap"] = Trap("trap")
loop = Loop()
def in_thread(function):
    thread = threading.Thread(target=function); thread.start(); thread.join()
    return 1
"""
SPAN = 3


def where(target: Any, function: str) -> tuple[str, str, str]:
    name, line = target.ask(f"[{function}.__code__.co_name, {function}.__code__.co_firstlineno]")
    return "<string>", name, str(line)


def search(target: Any, *functions: str) -> ProbeSession:
    hooks = {str(index): where(target, function) for index, function in enumerate(functions)}
    thread = target.ask("threading.get_ident()")
    session = ProbeSession(target.pid, ProbePlan("anchor", "search", 0, hooks, options={"thread": thread}))
    session.renew(60)
    target.sessions.append(session)
    return session


def counts(target: Any, session: ProbeSession) -> dict[int, int]:
    found: dict[int, int] = {}
    for index, start, end in target.words(session, ring.KIND_SPAN, SPAN):
        assert start <= end
        found[index] = found.get(index, 0) + 1
    return found


def test_functions_are_found_by_their_code_and_put_back(start, python) -> None:
    target = start(SCRIPT, python)
    before = target.ask("[sorted(map(repr, vars(Loop).items())), traces()]")
    session = search(target, "Loop.step", "inner", "Loop.static", "Loop.wait", "hidden[0]", "Loop.stream")
    target.ask("[loop.step(), alias.inner(), Loop.static(2), asyncio.run(loop.wait()), hidden[0]()]")
    target.ask("[*loop.stream()]")
    monitored = target.ask("sys.version_info >= (3, 12)")
    seen = counts(target, session)
    assert seen == {0: 1, 1: 2, 2: 1, 3: 1, **({4: 1} if monitored else {})}
    unhooked = session.ring.header(ring.H_MISSING) >> 16
    assert unhooked == 0b100000 | (0 if monitored else 0b010000)
    assert "stream: " in session.ring.message()
    assert session.ring.header(ring.H_ERRORS) == 0
    assert session.close()
    after = target.ask("[sorted(map(repr, vars(Loop).items())), traces()]")
    assert before[0] == after[0]
    assert target.ask("alias.inner is inner and inner.__code__.co_filename == '<string>'")
    assert before[1]["modules"] == after[1]["modules"] and before[1]["tools"] == after[1]["tools"]
    assert target.ask("loop.step()") == 42


def test_compiled_functions_are_left_alone(start, python) -> None:
    target = start(SCRIPT + "def kernel(x):\n    return x\nkernel._torchdynamo_inline = kernel\n", python)
    session = search(target, "kernel", "inner")
    assert target.ask("[kernel(2), inner()]") == [2, 41]
    assert counts(target, session) == {1: 1}
    assert "kernel: compiled" in session.ring.message()
    assert target.ask("kernel.__code__.co_filename") == "<string>"


def test_what_is_called_too_often_is_let_go_at_once(start, python) -> None:
    target = start(SCRIPT, python)
    session = search(target, "Loop.burst", "Loop.step")
    assert target.ask("[loop.burst() for _ in range(1000)][:1] + [loop.step()]") == [0, 42]
    seen = counts(target, session)
    assert session.ring.header(ring.H_MISSING) == 1
    # A busy machine may take the processor away in the first hundred calls.
    assert 0 < seen[0] < 1000 and seen[1] == 1
    assert target.ask("Loop.burst.__code__.co_filename") == "<string>"
    assert session.live


def test_other_threads_calls_do_not_count(start, python) -> None:
    target = start(SCRIPT, python)
    session = search(target, "Loop.step")
    assert target.ask("in_thread(loop.step)") == 1
    assert counts(target, session) == {}
    assert target.ask("loop.step()") == 42
    assert counts(target, session) == {0: 1}
    assert session.ring.header(ring.H_ERRORS) == 0


def test_calls_of_the_anchor_are_steps_and_idle_turns_are_not(start, python) -> None:
    target = start(SCRIPT, python)
    hooks = {"anchor": where(target, "Loop.turn"), "witness": where(target, "Loop.work")}
    session = ProbeSession(target.pid, ProbePlan("anchor", "engine", 0, hooks))
    session.renew(60)
    target.sessions.append(session)
    target.ask("[loop.turn(busy) for busy in (1, 0, 0, 1, 1, 0)]")
    target.ask("in_thread(lambda: loop.turn(1))")
    steps = [dict(zip(ring.STEP_WIRE, words)) for words in target.words(session, ring.KIND_STEP, 29)]
    assert [step["step"] for step in steps] == [0, 1, 2]
    assert all(step["gc_ns"] > 0 for step in steps)
    assert steps[1]["gap_ns"] == steps[1]["start_ns"] - steps[0]["end_ns"] > 0
    nulls = set(ring.STEP_WIRE) - {
        "step",
        "start_ns",
        "end_ns",
        "gap_ns",
        "gc_ns",
        "self_ns",
        "self_critical_ns",
    }
    assert all(step[name] < 0 for step in steps for name in nulls)
    assert session.ring.header(ring.H_DROPPED) == 1 and session.ring.header(ring.H_ERRORS) == 0
    assert session.close()
    assert target.ask("Loop.turn.__code__.co_filename") == "<string>"


def test_a_function_that_is_nowhere_is_told(start) -> None:
    target = start(SCRIPT)
    plan = ProbePlan("anchor", "engine", 0, {"anchor": ("<string>", "gone", "1")})
    with pytest.raises(TargetRefused) as refusal:
        ProbeSession(target.pid, plan)
    assert "gone: not found in any loaded module" in refusal.value.why
