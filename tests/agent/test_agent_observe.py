"""Observed methods of a live process, on each interpreter: what is seen and what is not."""

from __future__ import annotations

import pytest

from latencyprism.records import ring

pytestmark = pytest.mark.attach_safety

SCRIPT = """
class Base:
    def inherited(self, x):
        return x + 1
class Loop(Base):
    def __init__(self):
        self.step_fn = self.step
    def step(self, x, y=7, *rest, z=0, **more):
        if x < 0: raise KeyError(x)
        return x + y + z
    def recurse(self, n):
        if n == 0: return 0
        if n == 100: raise OSError
        return n + self.recurse(n - 1)
    def only_positional(self, a, /, b, *, c=3):
        return (a, b, c)
    async def aio(self, delay, value):
        await asyncio.sleep(delay)
        if value < 0: raise KeyError
        return value
    def gen(self, n):
        yield from range(n)
    @staticmethod
    def fixed(x):
        return x
    @classmethod
    def of_class(cls, x):
        return cls.__name__ + str(x)
    def decorated(self, x, y=2): return x * y
    def keep(self, big):
        raise ValueError
def passing(f):
    @functools.wraps(f)
    def inner(*args, **kwargs):
        return f(*args, **kwargs)
    return inner
Loop.decorated = passing(Loop.decorated)
class Other(Base): pass
class Slow:
    def __getattr__(self, name): raise SystemExit(9)
loop, other = Loop(), Other()
bound = loop.step
def attempt(f, *a):
    try: return f(*a)
    except Exception as error: return type(error).__name__
"""

READER = """
def reader(probe, config):
    main = sys.modules["__main__"]
    def as_int(value):
        return value if isinstance(value, int) else -1
    def note(number):
        def leave(state, args, result, start, end):
            given = [as_int(value) for value in args[1:4]]
            probe.emit(9, (number, state, len(args), as_int(result), start, end, *given))
        return leave
    for number, name in enumerate(config["observe"]):
        probe.observe(main.Loop, name, lambda args: 5, note(number))
    return []
"""


def see(session, count=9):
    return [r.words[:count] for r in session.read() if r.kind == 9]


def spans_of(session):
    return [r.words[:3] for r in session.read() if r.kind == ring.KIND_SPAN]


def test_arguments_and_results_are_seen_as_given(start, python, monkeypatch) -> None:
    target = start(SCRIPT, python)
    session = target.attach(monkeypatch, READER, observe=["step", "only_positional", "decorated"])
    assert target.ask("loop.step(1)") == 8
    assert target.ask("loop.step(1, 2, 3, z=4, q=5)") == 7
    assert target.ask("loop.step(y=1, x=2)") == 3
    assert target.ask("loop.only_positional(1, b=2)") == [1, 2, 3]
    assert target.ask("loop.decorated(4)") == 8
    assert target.ask("loop.decorated(y=3, x=4)") == 12
    records = see(session)
    assert [r[0] for r in records] == [0, 0, 0, 1, 2, 2]
    assert [r[3] for r in records[:3]] == [8, 7, 3]
    assert records[1][2] == 4 and records[1][6:9] == (1, 2, 3)
    assert records[2][6:8] == (2, 1)
    assert records[3][6:8] == (1, 2)
    assert records[4][6] == 4 and records[5][6:8] == (4, 3)
    assert all(r[1] == 5 and r[4] <= r[5] for r in records)
    assert session.health()["errors"] == 0


def test_exceptions_pass_and_recursion_pairs(start, python, monkeypatch) -> None:
    target = start(SCRIPT, python)
    session = target.attach(monkeypatch, READER, observe=["step", "recurse"])
    assert target.ask("[attempt(loop.step, -1), loop.step(1), attempt(loop.step, -1)]") == [
        "KeyError",
        8,
        "KeyError",
    ]
    assert target.ask("[attempt(loop.recurse, 101), loop.recurse(3)]") == ["OSError", 6]
    seen = see(session)
    assert [(r[0], r[3]) for r in seen] == [(0, 8), (1, 0), (1, 1), (1, 3), (1, 6)]
    starts = [r[4] for r in seen[1:]]
    assert starts == sorted(starts, reverse=True), "the innermost call began last"
    assert session.health()["errors"] == 0


def test_threads_pair_each_with_itself(start, python, monkeypatch) -> None:
    reader = READER.replace("probe.emit(9,", "probe.pairs = getattr(probe, 'pairs', []); probe.pairs.append(")
    target = start(
        SCRIPT
        + """
def turns(n):
    threads = [threading.Thread(target=lambda k=k: [loop.step(k, k) for _ in range(n)]) for k in range(4)]
    [t.start() for t in threads]; [t.join() for t in threads]
    pairs = sys.modules["_latencyprism_probe"].pairs
    return [len(pairs), sum(p[3] != 2 * p[6] for p in pairs), sum(p[4] > p[5] for p in pairs)]
""",
        python,
    )
    target.attach(monkeypatch, reader, observe=["step"])
    assert target.ask("turns(2000)") == [8000, 0, 0]


def test_coroutines_span_what_is_awaited(start, python, monkeypatch) -> None:
    target = start(
        SCRIPT
        + """
async def many():
    task = asyncio.ensure_future(loop.aio(5, 1))
    await asyncio.sleep(0)
    task.cancel()
    values = await asyncio.gather(*[loop.aio(0.05, k) for k in (1, 2, -3)], return_exceptions=True)
    return [v if isinstance(v, int) else type(v).__name__ for v in values]
""",
        python,
    )
    session = target.attach(monkeypatch, READER, observe=["aio"])
    assert target.ask("asyncio.run(many())") == [1, 2, "KeyError"]
    assert target.ask("inspect.iscoroutinefunction(Loop.aio)") is True
    seen = see(session)
    assert [r[3] for r in seen] == [1, 2]
    assert all(45e6 < r[5] - r[4] < 2e9 for r in seen)


def test_generators_c_functions_and_what_is_missing_are_reported(start, python, monkeypatch) -> None:
    target = start(
        SCRIPT + "class Holder(dict): part = functools.partial(int)\nLoop.part = Holder.part\n", python
    )
    session = target.attach(monkeypatch, READER, observe=["step", "gen", "part", "absent"])
    message = session.ring.message()
    assert "Loop.gen: a generator" in message and "Loop.absent: no such method" in message
    assert "Loop.part: not a method" in message
    assert target.ask("list(loop.gen(3))") == [0, 1, 2]


def test_static_class_and_inherited_methods(start, python, monkeypatch) -> None:
    target = start(SCRIPT, python)
    session = target.attach(monkeypatch, READER, observe=["fixed", "of_class", "inherited"])
    assert target.ask("[loop.fixed(3), Loop.fixed(4), loop.of_class(5)]") == [3, 4, "Loop5"]
    assert target.ask("[loop.inherited(1), other.inherited(1)]") == [2, 2]
    assert [(r[0], r[3]) for r in see(session)] == [(0, 3), (0, 4), (1, -1), (2, 2)]


def test_method_bound_before_attach_is_seen_or_noticed(start, python, monkeypatch) -> None:
    target = start(SCRIPT, python)
    session = target.attach(monkeypatch, READER, observe=["step"])
    assert target.ask("[bound(1), loop.step_fn(2), loop.step(3)]") == [8, 9, 10]
    seen = [r[3] for r in see(session)]
    if target.ask("hasattr(sys, 'monitoring')"):
        assert seen == [8, 9, 10]
    else:
        assert seen == [10]
        assert "Loop.step_fn (Loop.step)" in session.ring.message()


def test_readers_exceptions_stay_inside(start, python, monkeypatch) -> None:
    reader = """
def reader(probe, config):
    main = sys.modules["__main__"]
    def enter(args):
        if args[1] == 1: raise KeyError
        if args[1] == 2: main.Slow().anything
    def leave(state, args, result, start, end):
        if args[1] in (1, 2): raise AssertionError("leave must not run after enter failed")
        if args[1] == 3: main.Slow().anything
        if args[1] == 4: raise GeneratorExit
    probe.observe(main.Loop, "step", enter, leave)
    return []
"""
    target = start(SCRIPT, python)
    session = target.attach(monkeypatch, reader)
    assert target.ask("[loop.step(k) for k in range(6)]") == [7, 8, 9, 10, 11, 12]
    assert session.health()["errors"] == 4


def test_targets_own_signal_is_not_swallowed(start, python, monkeypatch) -> None:
    """An engine whose handler of SIGTERM raises must end even if the signal arrives in the probe's code."""
    reader = """
def reader(probe, config):
    main = sys.modules["__main__"]
    def enter(args):
        main.arrived.append(1)
        end = now_ns() + 3_000_000_000
        while now_ns() < end: pass
    probe.observe(main.Loop, "step", enter)
    return []
"""
    target = start(
        SCRIPT
        + """
arrived = []
def handler(number, frame):
    raise SystemExit(3)
signal.signal(signal.SIGTERM, handler)
def go():
    threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    try: loop.step(1)
    except SystemExit as error: return ["exit", error.code, len(arrived)]
""",
        python,
    )
    target.attach(monkeypatch, reader)
    assert target.ask("go()") == ["exit", 3, 1]


def test_calls_that_raise_do_not_keep_their_arguments(start, python, monkeypatch) -> None:
    target = start(
        SCRIPT
        + """
class Big: pass
def failing():
    big = Big(); ref = weakref.ref(big)
    attempt(loop.keep, big)
    return ref
def swept():
    ref = failing()
    time.sleep(0.3); failing(); time.sleep(0.3); failing()
    gc.collect()
    return ref() is None
""",
        python,
    )
    target.attach(monkeypatch, READER, observe=["keep"])
    assert target.ask("swept()") is True


def test_deep_spans_come_and_go(start, python, monkeypatch) -> None:
    target = start(SCRIPT, python)
    session = target.attach(monkeypatch, READER, observe=["step"], deep=[("__main__", "Loop", "inherited")])
    before = target.ask("[repr(Base.__dict__['inherited'].__name__), loop.step(1)]")
    session.arm_deep(5)
    target.ask("[loop.step(1), loop.inherited(4), loop.inherited(4), loop.step(1)]")
    assert session.ring.header(ring.H_DEEP_ARMED) == 1
    spans = spans_of(session)
    assert len(spans) == 2 and all(s[0] == 0 and s[1] <= s[2] for s in spans)
    session.ring.set_header(ring.H_DEEP_UNTIL_NS, 0)
    target.ask("[loop.step(1), loop.inherited(4)]")
    assert session.ring.header(ring.H_DEEP_ARMED) == 0 and not spans_of(session)
    assert target.ask("[repr(Base.__dict__['inherited'].__name__), loop.step(1)]") == before


def test_marks_of_torch_compile_refuse_a_hook(start, python, monkeypatch) -> None:
    target = start(
        SCRIPT
        + """
def compiled(self): return 1
compiled._torchdynamo_orig_callable = compiled
Loop.compiled = compiled
class TorchCompileWrapper: pass
class Model(Loop, TorchCompileWrapper):
    def forward(self): return 2
""",
        python,
    )
    reader = """
def reader(probe, config):
    main = sys.modules["__main__"]
    for owner, name in (main.Loop, "compiled"), (main.Model, "forward"), (main.Loop, "step"):
        probe.observe(owner, name)
    return []
"""
    session = target.attach(monkeypatch, reader)
    message = session.ring.message()
    assert "Loop.compiled: compiled" in message and "Model.forward: in a class compiled" in message
    assert target.process.poll() is None


def test_method_with_many_locals_is_observed_alike(start, python, monkeypatch) -> None:
    """CPython 3.12 is slow in telling the arguments of such a method: it is wrapped there."""
    many = "class Big:\n    def step(self, x, y=1):\n        if x is None:\n"
    many += "".join(f"            v{n} = {n}\n" for n in range(40)) + "        return x + y\nbig = Big()\n"
    reader = READER.replace("main.Loop", "main.Big")
    target = start(SCRIPT + many, python)
    session = target.attach(monkeypatch, reader, observe=["step"])
    assert target.ask("[big.step(1), big.step(2, y=3)]") == [2, 5]
    assert [(r[2], r[3]) for r in see(session)][1] == (3, 5)
    wrapped = target.ask("Big.step.__code__.co_filename == '<latencyprism>'")
    assert wrapped == (target.ask("sys.version_info < (3, 13)"))


def test_without_a_free_tool_id_methods_are_wrapped(start, python, monkeypatch) -> None:
    target = start(SCRIPT, python)
    if not target.ask("hasattr(sys, 'monitoring')"):
        pytest.skip("this version has no tool ids")
    target.ask("[sys.monitoring.use_tool_id(n, 'mine') for n in range(6)]")
    session = target.attach(monkeypatch, READER, observe=["step"])
    assert target.ask("loop.step(1)") == 8 and [r[3] for r in see(session)] == [8]
    assert "no monitoring tool id is free" in session.ring.message()
    assert session.close()
    assert target.ask("[sys.monitoring.get_tool(n) for n in range(6)]") == ["mine"] * 6
    assert target.ask("Loop.step.__code__.co_filename") == "<string>"


def test_code_that_dynamo_holds_compiled_is_refused(start, monkeypatch) -> None:
    """By dynamo's own list of compiled frames, and any torch module once dynamo is loaded."""
    script = (
        SCRIPT
        + """
frames = types.ModuleType("torch._C._dynamo.eval_frame")
frames._debug_get_cache_entry_list = lambda code: [1] if code is Loop.step.__code__ else []
sys.modules[frames.__name__] = frames
sys.modules["torch._dynamo"] = types.ModuleType("torch._dynamo")
Module = type("Module", (), {"__module__": "torch.nn.modules.module"})
class Attention(Module):
    def forward(self): return 3
"""
    )
    reader = """
def reader(probe, config):
    main = sys.modules["__main__"]
    for owner, name in (main.Loop, "step"), (main.Attention, "forward"), (main.Loop, "recurse"):
        probe.observe(owner, name)
    return []
"""
    target = start(script)
    message = target.attach(monkeypatch, reader).ring.message()
    assert "Loop.step: compiled by torch.compile" in message
    assert "Attention.forward: a torch module" in message
    assert target.ask("Loop.step.__code__.co_filename") == "<string>"
