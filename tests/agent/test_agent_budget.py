"""The probe's own cost against its budget: the dearest go first, a cold step does not count, the floor
holds."""

from __future__ import annotations

import threading
import time

import pytest

from latencyprism.agent.probe import budget
from latencyprism.records import ring

pytestmark = pytest.mark.attach_safety

SCRIPT = """
def spin(us):
    end = time.perf_counter_ns() + int(us * 1000)
    while time.perf_counter_ns() < end: pass
class Loop:
    def step(self, us):
        spin(us)
        return us
    def part(self):
        return 1
loop = Loop()
def go(steps, us):
    for _ in range(steps):
        loop.part(); loop.step(us)
    return steps
"""

# Costs in us: of the step's essential hook, of two optional values in it, of a hook of its own.
READER = """
def reader(probe, config):
    main = sys.modules["__main__"]
    costs = config["costs"]
    dear, cheap, part = probe.reading("dear"), probe.reading("cheap"), probe.reading("part")
    count = [0]
    def leave(state, args, result, start, end):
        main.spin(costs["essential"])
        for reading, name in ((dear, "dear"), (cheap, "cheap")):
            if reading.on:
                began = now_ns()
                main.spin(costs[name])
                reading.cost_ns += now_ns() - began
        count[0] += 1
        if count[0] == config.get("cold_at"):
            main.spin(15_000)
        probe.emit(1, (count[0], start, end, dear.on + 0, cheap.on + 0, part.on + 0))
    probe.observe(main.Loop, "step", None, leave)
    probe.observe(main.Loop, "part", None, lambda *given: main.spin(costs["part"]), reading=part)
    return []
"""


def attach(target, monkeypatch, essential=5, dear=0, cheap=0, part=0, **config):
    costs = {"essential": essential, "dear": dear, "cheap": cheap, "part": part}
    session = target.attach(monkeypatch, READER, costs=costs, **config)
    # Ten times what is usual: these tests run beside others, which take the processor from a callback at
    # times.
    session.ring.set_header(ring.H_BUDGET_PPM, 30_000)
    return session


def test_dearest_reading_goes_first_and_is_named(start, python, monkeypatch) -> None:
    target = start(SCRIPT, python)
    session = attach(target, monkeypatch, dear=500, cheap=2)
    assert target.ask("go(400, 3000)") == 400
    health = session.health()
    assert health["readings_off"] == ["dear"] and session.live
    assert "no longer read: dear" in health["message"]
    flags = [record.words[3:6] for record in session.read() if record.kind == ring.KIND_STEP]
    assert flags[-1] == (0, 1, 1)
    assert health["budget_share"] < 0.05


def test_optional_hook_is_taken_away(start, python, monkeypatch) -> None:
    target = start(SCRIPT, python)
    before = target.ask("Loop.part.__code__.co_filename")
    session = attach(target, monkeypatch, part=500)
    target.ask("go(300, 3000)")
    assert session.health()["readings_off"] == ["part"] and session.live
    assert target.ask("Loop.part.__code__.co_filename") == before


def test_one_cold_step_disarms_nothing(start, monkeypatch) -> None:
    target = start(SCRIPT)
    session = attach(target, monkeypatch, dear=1, cold_at=140)
    target.ask("go(500, 2000)")
    assert session.health()["readings_off"] == [] and session.live


def test_very_short_steps_are_watched_all_the_same(start, monkeypatch) -> None:
    """8 us a step of 100 us is 8 %, and below the floor."""
    target = start(SCRIPT)
    session = attach(target, monkeypatch, essential=3, dear=2)
    target.ask("go(1500, 100)")
    health = session.health()
    assert health["readings_off"] == [] and session.live
    assert health["budget_share"] > 0.03


def test_essential_hooks_go_last_above_the_hard_limit(start, python, monkeypatch) -> None:
    target = start(SCRIPT, python)
    before = target.ask("[repr(v) for v in vars(Loop).values() if callable(v)]")
    session = attach(target, monkeypatch, essential=600, dear=100)
    target.ask("go(1500, 1500)")
    assert session.over_budget and not session.live
    assert "nothing left to drop" in session.ring.message()
    assert session.ring.readings_off()[0] == "dear"
    assert target.ask("[repr(v) for v in vars(Loop).values() if callable(v)]") == before
    assert target.ask("go(5, 10)") == 5


def test_above_the_budget_and_below_the_hard_limit_is_said(start, monkeypatch) -> None:
    target = start(SCRIPT)
    session = attach(target, monkeypatch, essential=60)
    session.ring.set_header(ring.H_BUDGET_PPM, 3_000)
    target.ask("go(400, 3000)")
    assert session.live and "nothing optional is left" in session.ring.message()


def test_value_that_sleeps_costs_two_calls_not_the_engine(start, python, monkeypatch) -> None:
    reader = """
def reader(probe, config):
    main = sys.modules["__main__"]
    slow = probe.reading("slow")
    def leave(state, args, result, start, end):
        if slow.on:
            began = now_ns()
            main.Sleepy().value
            slow.cost_ns += now_ns() - began
        probe.emit(1, (1, start, end, NULL if not slow.on else 1))
    probe.observe(main.Loop, "step", None, leave)
    return []
"""
    sleepy = """
reads = []
class Sleepy:
    @property
    def value(self):
        reads.append(1); time.sleep(0.15)
"""
    target = start(SCRIPT + sleepy, python)
    session = target.attach(monkeypatch, reader)
    assert target.ask("[go(20, 10), len(reads)]") == [20, 2]
    assert session.live and session.health()["readings_off"] == ["slow"]
    assert session.health()["errors"] == 1
    assert [r.words[3] for r in session.read()][-1] == -(2**63)


def test_a_process_without_steps_has_a_budget_of_the_time_that_passes(start, monkeypatch) -> None:
    reader = READER.replace("probe.emit(1, (count[0], start, end,", "probe.emit(9, (count[0], start, end,")
    target = start(SCRIPT)
    costs = {"essential": 1, "dear": 500, "cheap": 0, "part": 0}
    session = target.attach(monkeypatch, reader, costs=costs)
    session.ring.set_header(ring.H_BUDGET_PPM, 30_000)
    target.ask("go(400, 1000)")
    assert session.health()["readings_off"] == ["dear"] and session.live


class Account:
    """A probe as its budget sees it: one hook that took ``cost_ns`` in every window."""

    def __init__(self, cost_ns: int) -> None:
        self.words = [0] * 512
        self.words[ring.H_BUDGET_PPM] = 3_000
        self.removed: list[int] = []
        self.said: list[str] = []
        self.cost_ns = cost_ns
        self.hooks: list[object] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def remove(self, state: int) -> None:
        self.removed.append(state)


@pytest.fixture
def windows_by_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps of these tests take no time."""
    monkeypatch.setattr(budget, "WINDOW_NS", 0)


def windows(account: Account, count: int, on_processor: float) -> budget.Budget:
    """So many windows of steps of 2 ms, each with the probe's cost in it."""
    judged = budget.Budget(account)
    judged.close_window = lambda: account.cost_ns  # type: ignore[method-assign]
    judged.share_on_processor = lambda: on_processor  # type: ignore[method-assign]
    for number in range(count * budget.WINDOW_STEPS):
        judged.busy(number * 2_000_000, (number + 1) * 2_000_000)
    return judged


DEAR_NS = 200_000 * budget.WINDOW_STEPS  # 10 % of steps of 2 ms


def test_time_that_others_took_is_not_the_probes(windows_by_count: None) -> None:
    account = Account(DEAR_NS)
    windows(account, 20, on_processor=0.15)
    assert account.removed == [] and account.said == []


def test_hard_limit_needs_some_windows_in_a_row(windows_by_count: None) -> None:
    account = Account(DEAR_NS)
    windows(account, budget.HARD_WINDOWS - 1, on_processor=1.0)
    assert account.removed == []
    account = Account(DEAR_NS)
    windows(account, budget.HARD_WINDOWS + 2, on_processor=1.0)
    assert account.removed


def test_share_on_processor_is_read_from_the_thread_itself() -> None:
    judged = budget.Budget(Account(0))
    assert judged.share_on_processor() == 1.0  # nothing to compare with yet
    until = time.perf_counter() + 0.05
    while time.perf_counter() < until:
        pass
    assert 0.0 < judged.share_on_processor() <= 1.0


def test_one_window_is_judged_by_one_of_several_threads(windows_by_count: None) -> None:
    """A thread that comes in while another judges must not judge a window that has no steps yet."""
    account = Account(budget.FLOOR_NS * budget.WINDOW_STEPS * 3 // 4)
    judged = budget.Budget(account)
    at_once = []

    def others_come_in() -> int:
        at_once.append(judged.judging.locked())
        if len(at_once) % 2:
            others = threading.Thread(
                target=lambda: [judged.record() for _ in range(2 * budget.WINDOW_STEPS)]
            )
            others.start()
            others.join()
        return account.cost_ns

    judged.close_window = others_come_in  # type: ignore[method-assign]
    judged.share_on_processor = lambda: 1.0  # type: ignore[method-assign]
    for _ in range(20 * budget.WINDOW_STEPS):
        judged.record()
    assert len(at_once) >= 20 and account.removed == [] and account.said == []


def test_windows_below_the_floor_are_none_above_the_hard_limit(windows_by_count: None) -> None:
    """Steps of 0.1 ms, 10 % of which is 10 us: nothing. Two dear windows after it are not four."""
    account = Account(10_000 * budget.WINDOW_STEPS)
    judged = budget.Budget(account)
    judged.close_window = lambda: account.cost_ns  # type: ignore[method-assign]
    judged.share_on_processor = lambda: 1.0  # type: ignore[method-assign]
    for number in range(22 * budget.WINDOW_STEPS):
        if number == 20 * budget.WINDOW_STEPS:
            account.cost_ns = 2 * budget.FLOOR_NS * budget.WINDOW_STEPS
        judged.busy(number * 100_000, (number + 1) * 100_000)
    assert account.removed == []
