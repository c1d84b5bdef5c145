"""Python stacks read from outside, on every supported interpreter, against what the target itself says."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from latencyprism.attach import layout, stacks
from latencyprism.attach.interpreter import python_of
from latencyprism.attach.layout import COOKIE, layouts
from latencyprism.attach.stacks import StackReader
from latencyprism.errors import TargetRefused

PARKED = """
import threading, time
class Engine:
    def inner(self, hold):
        hold.acquire()
    def outer(self, hold):
        self.inner(hold)
def named_grün():
    Engine().outer(lock)
lock = threading.Lock(); lock.acquire()
thread = threading.Thread(target=named_grün, daemon=True); thread.start()
time.sleep(0.2)
print("ready"); print(threading.main_thread().ident, thread.ident, getattr(thread, "native_id"), flush=True)
time.sleep(60)
"""

BUSY = """
import threading
def leaf(n):
    total = 0
    for i in range(n): total += i
    return total
def gen():
    while True:
        yield leaf(30)
def middle(source):
    return next(source) + sorted([3, 1, 2], key=lambda v: leaf(5))[0]
def loop():
    source = gen()
    while True:
        middle(source)
for _ in range(2): threading.Thread(target=loop, daemon=True).start()
print("ready", flush=True)
loop()
"""


def test_every_frame_of_a_parked_thread_is_read(start: Callable[..., object], any_python: str) -> None:
    target = start(PARKED, python=any_python)
    main, worker, native = map(int, target.line().split())  # type: ignore[attr-defined]
    reader = StackReader(python_of(target.pid))  # type: ignore[attr-defined]
    threads = {thread.ident: thread for thread in reader.threads()}
    assert set(threads) == {main, worker}
    assert threads[worker].tid == native and threads[main].tid == target.pid  # type: ignore[attr-defined]
    stack = reader.stack(threads[worker])
    assert stack
    told = [reader.function(frame.code) for frame in stack]
    assert [one.name for one in told] == [
        "_bootstrap", "_bootstrap_inner", "run", "named_grün", "outer", "inner",
    ]  # fmt: skip
    assert told[0].file.endswith("threading.py") and told[-1].file == "<string>"
    assert [one.line for one in told[-2:]] == [6, 4]
    if reader.layout.version >= (3, 11):
        assert told[-1].qualname == "Engine.inner"
    outermost = reader.stack(threads[main])
    assert outermost and reader.function(outermost[0].code).name == "<module>"
    assert reader.stack(threads[worker]) == stack and reader.torn == 0


def test_busy_stacks_are_whole_or_dropped(start: Callable[..., object], any_python: str) -> None:
    target = start(BUSY, python=any_python)
    reader = StackReader(python_of(target.pid))  # type: ignore[attr-defined]
    known = {"<module>", "loop", "middle", "gen", "leaf", "<lambda>", "_bootstrap", "_bootstrap_inner", "run"}
    seen: set[str] = set()
    took = []
    threads = reader.threads()
    assert len(threads) == 3
    for _ in range(600):
        for thread in threads:
            begun = time.perf_counter()
            stack = reader.stack(thread)
            took.append(time.perf_counter() - begun)
            if stack:
                names = [reader.function(frame.code).name for frame in stack]
                seen |= set(names)
                assert names[0] in ("<module>", "_bootstrap")
    assert seen <= known and {"loop", "middle", "leaf", "gen"} <= seen
    assert (
        reader.whole > 1000 and reader.torn < 0.5 * reader.whole
    )  # the more the processor is shared, the more
    assert sorted(took)[len(took) // 2] < 0.001


def test_a_wrong_layout_is_refused_and_not_believed(
    start: Callable[..., object], any_python: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = start(PARKED, python=any_python)
    info = python_of(target.pid)  # type: ignore[attr-defined]
    right = layouts()[info.version[0], info.version[1]]
    for field in ("thread.interpreter", "frame.code", "object.type", "text.state"):
        wrong = replace(right, fields={**right.fields, field: right.fields[field] + 8}, told={})
        monkeypatch.setattr(stacks, "layouts", lambda wrong=wrong: {wrong.version: wrong})
        with pytest.raises(TargetRefused) as refusal:
            StackReader(info)
            pytest.fail(field)
        assert "cannot read the Python stacks" in refusal.value.what, field
    monkeypatch.setattr(stacks, "layouts", dict)
    with pytest.raises(TargetRefused, match="not known"):
        StackReader(info)


def test_a_target_that_ends_is_said_to_be_gone(start: Callable[..., object]) -> None:
    target = start(PARKED)
    reader = StackReader(python_of(target.pid))  # type: ignore[attr-defined]
    thread = reader.threads()[0]
    target.kill()  # type: ignore[attr-defined]
    with pytest.raises(TargetRefused, match="gone"):
        reader.stack(thread)


def test_what_the_interpreter_tells_wins_unless_it_is_nonsense() -> None:
    known = layouts()[3, 13]
    assert known.told
    words = [0] * (layout.TOLD_BYTES // 8)
    words[1] = (3 << 24) | (13 << 16)
    for name, at in known.told.items():
        words[at] = known[name] + 64
    raw = COOKIE + b"".join(word.to_bytes(8, "little") for word in words[1:])
    assert known.corrected(raw)["thread.next"] == known["thread.next"] + 64
    assert known.corrected(b"\0" * layout.TOLD_BYTES) is known
    words[known.told["thread.next"]] = 1 << 40
    raw = COOKIE + b"".join(word.to_bytes(8, "little") for word in words[1:])
    assert known.corrected(raw) is known
    words[1] = (3 << 24) | (14 << 16)
    assert known.corrected(COOKIE + b"".join(word.to_bytes(8, "little") for word in words[1:])) is known
