"""The probe's text, run in a fresh interpreter on stand-ins for an engine's classes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from latencyprism.agent.assemble import assemble, bootstrap, pack
from latencyprism.engines.packs import load_pack
from latencyprism.records import ring
from latencyprism.records.step import NULL

STAND_INS = """
import sys, types, gc, json, os, time, mmap, threading, ctypes
class Obj:
    def __init__(self, **k): self.__dict__.update(k)
class Scheduler:
    def __init__(self):
        self.running, self.waiting = [Obj(request_id="b"), Obj(request_id="c")], []
        self.n, self.requests = 0, {}
    def schedule(self, throttle=False):
        self.n += 1
        if self.n == 5:
            self._preempt_request(Obj(request_id="r", num_computed_tokens=0))
        return Obj(num_scheduled_tokens={"a": 40, "b": 1, "c": 3, "d": 7}, total_num_scheduled_tokens=51,
            scheduled_new_reqs=[Obj(req_id="a", num_computed_tokens=16, prompt_token_ids=[0] * 56)],
            scheduled_cached_reqs=Obj(req_ids=["b", "c", "d"], resumed_req_ids={"d"},
                num_computed_tokens=[100, 200, 50], num_output_tokens=[5, 9, 4]),
            scheduled_spec_decode_tokens={"c": [1, 2]}, finished_req_ids=set())
    def _preempt_request(self, r): pass
    def get_grammar_bitmask(self, so): return None
    def update_from_output(self, so, out):
        if self.n == 7: raise KeyError("engine's own error")
        return {0: so}
class Worker:
    def execute_model(self, so): return None
    def sample_tokens(self, g): return "out"
m = types.ModuleType("vllm.v1.core.sched.scheduler"); m.Scheduler = Scheduler; sys.modules[m.__name__] = m
w = types.ModuleType("vllm.v1.worker.gpu_worker"); w.Worker = Worker; sys.modules[w.__name__] = w
def look():
    return (dict(vars(Scheduler)), dict(vars(Worker)), sorted(sys.modules), list(gc.callbacks),
            sorted(os.listdir("/proc/self/fd")),
            "lprism" in open("/proc/self/maps").read(), sorted(globals()))
def turn(s, wk):
    so = s.schedule()
    wk.execute_model(so)
    g = s.get_grammar_bitmask(so)
    wk.sample_tokens(g)
    out = Obj(sampled_token_ids=[[], [1], [1, 2], []], req_id_to_index={"a": 0, "b": 1, "c": 2, "d": 3})
    try:
        s.update_from_output(so, out)
    except KeyError:
        pass
s, wk = Scheduler(), Worker()
before = None
before = look()
"""


def run_target(
    tmp_path: Path, body: str, python: str = sys.executable, role: str = "engine+worker"
) -> tuple[ring.RingReader, dict[str, object]]:
    nonce = 77
    base = tmp_path / "lprism-x"
    ring.create_ring(str(base) + ".ring", 16, nonce)
    os.mkfifo(str(base) + ".wake")
    reader = ring.RingReader(str(base) + ".ring")
    reader.set_header(ring.H_LEASE_NS, time.monotonic_ns() + 60_000_000_000)
    config = {
        "ring": str(base) + ".ring",
        "fifo": str(base) + ".wake",
        "nonce": nonce,
        "role": role,
        "rank": 3,
        "hooks": load_pack("vllm").ranges[-1].hooks,
        "deep": [("vllm.v1.worker.gpu_worker", "Worker", "sample_tokens")],
    }
    (tmp_path / "probe.py").write_text(assemble("vllm", config))
    # The bootstrap's alphabet of paths is narrow on purpose.
    script = STAND_INS + f"BOOT = {bootstrap(str(tmp_path / 'probe.py'))!r}\n" + body
    done = subprocess.run([python, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return reader, json.loads(done.stdout) if done.stdout.strip() else {}


def test_step_is_composed_from_counts_and_everything_is_put_back(tmp_path: Path) -> None:
    reader, said = run_target(
        tmp_path,
        """
exec(BOOT, globals())
for _ in range(6): turn(s, wk)
sys.modules["_latencyprism_probe"].remove(2)
turn(s, wk)
names = {"before", "BOOT", "_", "names"}
b, a = before, look()
same = [b[i] == a[i] for i in range(6)]
print(json.dumps({"same": same, "new_names": sorted(set(a[6]) - set(b[6]) - names)}))
""",
    )
    assert said == {"same": [True] * 6, "new_names": []}
    records = list(reader.read())
    steps = [r.words for r in records if r.kind == ring.KIND_STEP]
    workers = [r.words for r in records if r.kind == ring.KIND_WORKER]
    assert len(steps) == 6 and len(workers) == 6
    step = dict(zip(ring.STEP_WIRE, steps[4]))
    assert [s[0] for s in steps] == list(range(6))
    assert (step["prefill_tokens"], step["decode_tokens"]) == (47, 4)
    assert (step["prefill_requests"], step["decode_requests"], step["requests"]) == (2, 2, 4)
    assert step["cached_tokens"] == 16 + 50
    assert step["context_tokens"] == 56 + 101 + 203 + 57
    assert step["attention_work"] == 40 * 56 + 7 * 57
    assert (step["draft_tokens"], step["accepted_tokens"], step["output_tokens"]) == (2, 1, 3)
    assert step["preempted"] == 1 and steps[3][ring.STEP_WIRE.index("preempted")] == 0
    assert step["running"] == 2 and step["kv_usage"] == NULL
    assert step["start_ns"] <= step["scheduled_at_ns"] <= step["end_ns"]
    assert step["schedule_ns"] + step["execute_ns"] + step["update_ns"] == step["end_ns"] - step["start_ns"]
    assert workers[0][0] == 3 and workers[0][5] == 51
    assert reader.header(ring.H_ERRORS) == 0 and reader.header(ring.H_STATE) == ring.STATE_DETACHED


STEADY = """
for name in "xyz":
    s.requests[name] = Obj(request_id=name, num_prompt_tokens=9, num_computed_tokens=9, _output_token_ids=[1])
s.running = list(s.requests.values())
HOSTILE = 0
class Total(int):
    def __index__(self): print("asked"); return 3
def schedule(self, throttle=False):
    self.n += 1
    for r in self.running: r.num_computed_tokens += 1
    computed = [r.num_computed_tokens - 1 for r in self.running]
    return Obj(num_scheduled_tokens=dict.fromkeys("xyz", 1),
        total_num_scheduled_tokens=Total(3) if HOSTILE else 3, scheduled_new_reqs=[],
        scheduled_cached_reqs=Obj(req_ids=list("xyz"), resumed_req_ids=set(), num_computed_tokens=computed,
            num_output_tokens=[1, 1, 1]),
        scheduled_spec_decode_tokens={}, finished_req_ids=set())
Scheduler.schedule = schedule
def go(times):
    for _ in range(times):
        so = s.schedule(); s.get_grammar_bitmask(so)
        s.update_from_output(so, Obj(sampled_token_ids=[[1], [1], [1]]))
exec(BOOT, globals())
"""


def steps_of(reader: ring.RingReader) -> list[dict[str, int]]:
    found = []
    for record in reader.read():
        if record.kind in (ring.KIND_STEP, ring.KIND_DECODE):
            words = record.words if record.kind == ring.KIND_STEP else ring.widened(record.words)
            found.append({**dict(zip(ring.STEP_WIRE, words)), "short": int(record.kind == ring.KIND_DECODE)})
    return found


def test_steps_in_which_all_decode_are_told_in_short_and_say_the_same(tmp_path: Path) -> None:
    reader, _ = run_target(tmp_path, STEADY + "s.n = 10\ngo(12)\n")
    steps = steps_of(reader)
    assert [step["step"] for step in steps] == list(range(12))
    assert [step["short"] for step in steps] == [0] + [1] * 11
    for number, step in enumerate(steps):
        assert step["context_tokens"] == 3 * (9 + number + 1)
        assert (
            step["decode_tokens"] == step["decode_requests"] == step["requests"] == step["output_tokens"] == 3
        )
        assert not any(
            step[name] for name in ("prefill_tokens", "prefill_requests", "draft_tokens", "finished")
        )
        assert step["accepted_tokens"] == step["sample_ns"] == NULL and step["preempted"] == 0
        parts = step["schedule_ns"] + step["execute_ns"] + step["update_ns"]
        assert parts == step["end_ns"] - step["start_ns"] and step["running"] == 3
    for before, step in pairwise(steps):
        assert step["gap_ns"] == step["start_ns"] - before["end_ns"] and step["self_ns"] > 0
        assert 0 < step["self_critical_ns"] < step["self_ns"] or step is steps[1]
    assert reader.header(ring.H_COST_STEPS) >= 8 and reader.header(ring.H_ERRORS) == 0


def test_the_budget_holds_for_short_records_too(tmp_path: Path) -> None:
    reader, said = run_target(
        tmp_path,
        STEADY
        + """
p = sys.modules["_latencyprism_probe"]
s.n = 10
go(10)
judging = type(p.budget).judge.__globals__
judging["FLOOR_NS"] = judging["WINDOW_NS"] = 0  # these steps are far too short for any probe
go(1500)
print(json.dumps({"gone": "_latencyprism_probe" not in sys.modules, "wrapped": hasattr(
    Scheduler.update_from_output, "__wrapped__")}))
""",
    )
    assert said == {"gone": True, "wrapped": False}
    assert reader.header(ring.H_STATE) == ring.STATE_OVER_BUDGET and "over budget" in reader.message()
    # Four windows in a row, seen to in every fourth step.
    assert 4 * 128 <= reader.records() <= 6 * 128 and reader.header(ring.H_ERRORS) == 0


def test_a_total_that_is_no_plain_integer_is_not_asked_to_be_one(tmp_path: Path) -> None:
    reader, _ = run_target(tmp_path, STEADY + "s.n, HOSTILE = 10, 1\ngo(6)\n")
    assert [step["context_tokens"] for step in steps_of(reader)] == [3 * (10 + n) for n in range(6)]


def test_child_forked_between_two_short_records_is_silent(tmp_path: Path) -> None:
    reader, _ = run_target(
        tmp_path,
        STEADY
        + """
s.n = 10
go(4)
if os.fork() == 0:
    go(3)
    os._exit("_latencyprism_probe" in sys.modules)
assert os.wait()[1] == 0
go(1)
""",
    )
    assert [step["step"] for step in steps_of(reader)] == [0, 1, 2, 3, 4] and reader.lost == 0


def test_a_worker_alone_writes_every_run_and_accounts_for_some_at_once(tmp_path: Path) -> None:
    reader, said = run_target(
        tmp_path,
        """
exec(BOOT, globals())
p = sys.modules["_latencyprism_probe"]
run = Obj(total_num_scheduled_tokens=5)
def go(times):
    for _ in range(times):
        wk.execute_model(run); wk.sample_tokens(None)
go(9)
counted = p.words[11]
p.words[4] = 1
go(5)
print(json.dumps({"counted": counted, "same": [x == y for x, y in zip(before[:6], look()[:6])]}))
""",
        role="worker",
    )
    runs = [record.words for record in reader.read() if record.kind == ring.KIND_WORKER]
    assert 10 <= len(runs) <= 13 and {words[5] for words in runs} == {5}
    assert 6 <= said["counted"] <= 9 and all(said["same"])  # type: ignore[arg-type, operator]
    assert reader.header(ring.H_STATE) == ring.STATE_EXPIRED and reader.header(ring.H_ERRORS) == 0


def test_engine_exception_passes_through_and_overwritten_records_are_counted(tmp_path: Path) -> None:
    reader, _ = run_target(tmp_path, "exec(BOOT, globals())\nfor _ in range(40): turn(s, wk)\n")
    kept = list(reader.read())
    # 40 turns, one of which raised in update: 39 steps and 40 worker records through 16 slots.
    assert reader.lost == 79 - 16 and len(kept) == 16
    assert reader.header(ring.H_ERRORS) == 0


def test_lease_ends_the_probe(tmp_path: Path) -> None:
    reader, said = run_target(
        tmp_path,
        """
exec(BOOT, globals())
p = sys.modules["_latencyprism_probe"]
turn(s, wk)
p.words[4] = 1
turn(s, wk)
turn(s, wk)
print(json.dumps({"same": [x == y for x, y in zip(before[:6], look()[:6])]}))
""",
    )
    assert all(said["same"])  # type: ignore[arg-type]
    assert reader.header(ring.H_STATE) == ring.STATE_EXPIRED


def test_second_watcher_is_told_and_same_command_twice_is_once(tmp_path: Path) -> None:
    reader, said = run_target(
        tmp_path,
        """
exec(BOOT, globals())
exec(BOOT, globals())
first = vars(Scheduler)["schedule"]
print(json.dumps({"depth": hasattr(first.__wrapped__, "__wrapped__")}))
""",
    )
    assert said == {"depth": False} and reader.header(ring.H_STATE) == ring.STATE_LIVE


def test_deep_spans_arm_and_disarm_by_the_ring(tmp_path: Path) -> None:
    reader, said = run_target(
        tmp_path,
        """
exec(BOOT, globals())
p = sys.modules["_latencyprism_probe"]
turn(s, wk)
p.words[14] = time.monotonic_ns() + 10**12
turn(s, wk)
turn(s, wk)
armed = p.words[15]
p.words[14] = 0
turn(s, wk); turn(s, wk)
print(json.dumps({"armed": armed, "after": p.words[15]}))
""",
    )
    assert said == {"armed": 1, "after": 0}
    assert sum(r.kind == ring.KIND_SPAN for r in reader.read()) >= 1


def test_forked_child_is_silent(tmp_path: Path) -> None:
    reader, _ = run_target(
        tmp_path,
        """
exec(BOOT, globals())
turn(s, wk)
if os.fork() == 0:
    for _ in range(5): turn(s, wk)
    os._exit(0)
os.wait()
turn(s, wk)
""",
    )
    assert [r.words[0] for r in reader.read() if r.kind == ring.KIND_STEP] == [0, 1]
    assert reader.lost == 0


def test_missing_engine_fails_with_words_and_leaves_nothing(tmp_path: Path) -> None:
    reader, said = run_target(
        tmp_path,
        """
del sys.modules["vllm.v1.core.sched.scheduler"], sys.modules["vllm.v1.worker.gpu_worker"]
before = look()
exec(BOOT, globals())
print(json.dumps({"same": [x == y for x, y in zip(before[:6], look()[:6])]}))
""",
    )
    assert all(said["same"])  # type: ignore[arg-type]
    assert reader.header(ring.H_STATE) == ring.STATE_FAILED
    assert "nothing to hook" in reader.message() and "Scheduler.schedule" in reader.message()


@pytest.mark.parametrize("version", ["3.10", "3.12", "3.13", "3.9"])
def test_probe_runs_on_other_interpreters(
    tmp_path: Path, version: str, python_of: Callable[[str], str]
) -> None:
    reader, _ = run_target(
        tmp_path, "exec(BOOT, globals())\nfor _ in range(3): turn(s, wk)\n", python_of(version)
    )
    assert sum(r.kind == ring.KIND_STEP for r in reader.read()) == 3
    assert reader.header(ring.H_ERRORS) == 0


@pytest.mark.parametrize("version", ["3.10", "3.11", "3.13", "3.9"])
def test_packed_text_runs_compiled_or_from_source(
    tmp_path: Path, version: str, python_of: Callable[[str], str]
) -> None:
    """An interpreter of this version loads what was compiled; any other compiles the source behind it."""
    text = "import sys\nprint(sys.version_info[:2], __name__, sys._getframe().f_code.co_filename)\n"
    packed, plain = tmp_path / "packed.py", tmp_path / "plain.py"
    packed.write_bytes(pack(text))
    plain.write_text(text)
    for path in packed, plain:
        script = bootstrap(str(path)) + "print([n for n in dir() if n[0] != '_'])"
        out = subprocess.run(
            [python_of(version), "-c", script], capture_output=True, text=True, check=True
        ).stdout
        assert out == f"({version.replace('.', ', ')}) _lp <latencyprism>\n[]\n"
