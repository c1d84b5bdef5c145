"""A verdict while it happens, and the same one again from the capture, bit for bit."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from diagnose_scenes import FAULTS, ROLES, window

from latencyprism.cli.main import main
from latencyprism.recorder.capture import Capture, write_raw
from latencyprism.records import Request
from latencyprism.sentinel import early_verdict
from latencyprism.sentinel.captures import Captures
from latencyprism.sentinel.early_verdict import EarlyVerdict
from latencyprism.sentinel.finish import finish

FINISH = "latencyprism.sentinel.finish:finish"


def capture(cause="cpu.quota", strength=1.0, onset_s=1030.0):
    before = window(seconds=25, seed=3)
    after = window(FAULTS[cause](strength), seconds=5, seed=4, start_s=onset_s)
    number = before.steps[-1].step + 1
    late = [step._replace(step=number + place) for place, step in enumerate(after.steps)]
    return Capture(
        meta={
            "roles": {str(pid): role for pid, role in ROLES.items()},
            "onset_ns": int(onset_s * 1e9),
            "not_available": ["something that is not there"],
        },
        steps=[*before.steps, *late],
        spans=[*before.spans, *after.spans],
        counters=[*before.counters, *after.counters],
        requests=[Request("vllm", 0, 7, int(1001e9) + n * 10**9, queue_ns=1000 * n) for n in range(30)],
    )


def write(folder, whole, *options):
    """As the watch does: packed here, written by a process of its own."""
    raw, path = folder / "capture.raw", folder / "capture.pftrace"
    write_raw(str(raw), whole)
    command = [sys.executable, "-m", "latencyprism.recorder.write", str(raw), str(path), *options]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return path


def wait(early, seconds=30.0):
    until = time.monotonic() + seconds
    while not early.over and time.monotonic() < until:
        early.poll()
        time.sleep(0.01)
    assert early.over
    return early.verdict


def test_an_early_verdict_is_what_the_records_say_so_far():
    told = wait(EarlyVerdict(capture))
    assert told == json.loads(json.dumps(finish(capture()).verdict.to_dict()))
    assert told["cause"] == "cpu.quota"
    assert "something that is not there" in told["not_looked_at"]
    assert told["remedy"]


@pytest.mark.parametrize("cause", [cause for cause in FAULTS if not cause.startswith("workload.")])
def test_steps_that_were_late_before_the_alert_says_so_are_no_reference(cause):
    """Three of five seconds of the fault before the onset: what it did would pass for usual."""
    one = capture(cause)
    begun_ns = one.meta["onset_ns"]
    known = finish(one).verdict
    before = [(step.end_ns - step.start_ns) / 1e6 for step in one.steps if step.start_ns < begun_ns]
    one.expected_ms = [sum(before) / len(before)] * len(one.steps)
    one.meta |= {"onset_ns": begun_ns + 3 * 10**9, "alert_ns": one.steps[-1].end_ns}
    assert finish(one).verdict.cause == known.cause
    assert abs(one.meta["begun_ns"] - begun_ns) < 600_000_000


def test_what_a_file_says_of_the_beginning_is_not_believed():
    one, other = capture(), capture()
    other.meta["begun_ns"] = "soon"
    assert finish(other).verdict.to_dict() == finish(one).verdict.to_dict()


def test_an_early_verdict_that_fails_says_nothing():
    def broken():
        raise ValueError("no records")

    assert wait(EarlyVerdict(broken)) is None


def test_an_early_verdict_is_ended_when_it_is_no_longer_wanted():
    def endless():
        time.sleep(60)
        return capture()

    early = EarlyVerdict(endless)
    begun = time.monotonic()
    early.close()
    early.close()
    assert early.over and early.verdict is None
    assert time.monotonic() - begun < 5
    while early_verdict._ending and time.monotonic() - begun < 5:
        early_verdict.reap()
        time.sleep(0.01)
    assert early_verdict._ending == []


def test_nobody_waits_for_an_early_verdict_that_is_slow_to_die(monkeypatch):
    """Beside an engine that spins on every core a killed process may not run for seconds."""
    alive, real = [True], os.waitpid

    def waitpid(pid, options):
        assert options == os.WNOHANG  # anything else would wait
        return (0, 0) if alive else real(pid, options)

    early = EarlyVerdict(lambda: time.sleep(60))
    monkeypatch.setattr(early_verdict.os, "waitpid", waitpid)
    early.close()
    early_verdict.reap()
    assert early.over and early_verdict._ending == [early._pid]
    alive.clear()
    until = time.monotonic() + 10
    while early_verdict._ending and time.monotonic() < until:
        early_verdict.reap()
        time.sleep(0.01)
    assert early_verdict._ending == [] and not os.path.exists(f"/proc/{early._pid}")


class Lines:
    def __init__(self):
        self.events = []

    def event(self, name, **fields):
        self.events.append({"event": name, **fields})


def test_early_and_final_verdicts_are_told_apart():
    out = Lines()
    captures = Captures(None, ("page",), out, lambda text: None, lambda capture: None, deep=False)
    one = SimpleNamespace(
        alert=SimpleNamespace(id="a1"), path=Path("x.pftrace"), early=[], verdict=None, result=None,
        begun_ns=time.monotonic_ns(), watch=None,
    )  # fmt: skip
    looks = [
        lambda: one.early.append({"cause": "unknown", "probability": 0.5}),
        lambda: None,
        lambda: one.early.append({"cause": "cpu.quota", "probability": 0.8}),
        lambda: setattr(one, "verdict", {"cause": "cpu.quota", "probability": 0.9}),
        lambda: setattr(one, "result", {"path": "x.pftrace"}),
    ]
    one.step = lambda now_ns: looks.pop(0)()
    captures.under_way.append(one)
    for _ in range(5):
        captures.advance()
    verdicts = [event for event in out.events if event["event"] == "verdict"]
    assert [(v["final"], v["verdict"]["cause"]) for v in verdicts] == [
        (False, "unknown"), (False, "cpu.quota"), (True, "cpu.quota"),
    ]  # fmt: skip
    assert all(v["alert"] == "a1" and 0 <= v["after_s"] < 60 for v in verdicts)
    assert out.events[-1]["event"] == "capture"


@pytest.mark.parametrize("cause", ["cpu.quota", "peer.stalled"])
def test_explain_comes_to_the_same_verdict_again(tmp_path, capsys, cause):
    path = write(tmp_path, capture(cause), "--finish", FINISH)
    assert main(["explain", str(path), "--again", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["same"] is True
    assert told["verdict"]["cause"] == cause
    assert main(["explain", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == told["verdict"]


def test_explain_again_says_where_it_differs(tmp_path, capsys):
    changed = finish(capture())
    changed.verdict.probability -= 1e-9
    path = write(tmp_path, changed)
    assert main(["explain", str(path), "--again"]) == 1
    assert "NOT the same" in capsys.readouterr().out


def test_explain_again_needs_an_onset(tmp_path, capsys):
    whole = capture()
    del whole.meta["onset_ns"]
    path = write(tmp_path, whole)
    assert main(["explain", str(path), "--again"]) == 2
    assert "nothing to diagnose" in capsys.readouterr().err
