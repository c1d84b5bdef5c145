"""``check -p``: conditions in words, what will be seen, and an exit code that takes both into account."""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time

import pytest

from latencyprism.attach.permissions import Condition
from latencyprism.attach.process import read_process
from latencyprism.bpf.features import conditions as kernel_conditions
from latencyprism.cli import check
from latencyprism.cli.check_seen import _FOR_SCHEDULING, NATIVE_NEEDS, seen_of
from latencyprism.engines.discovery import Member, Replica
from latencyprism.engines.packs import PYTHON_ENGINES, load_pack

SLEEPER = "import time\nprint('ready', flush=True)\nwhile True: time.sleep(0.05)\n"


def told(pid: int, as_json: bool = True) -> subprocess.CompletedProcess[str]:
    arguments = [
        sys.executable,
        "-m",
        "latencyprism",
        "check",
        "-p",
        str(pid),
        *(["--json"] if as_json else []),
    ]
    return subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)


def test_process_that_cannot_be_watched_has_all_its_conditions() -> None:
    process = subprocess.Popen([sys.executable, "-c", SLEEPER], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None and process.stdout.readline()
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.1)
        done = told(process.pid)
        assert (
            done.returncode == 3 and "stopped" in done.stderr and f"kill -CONT {process.pid}" in done.stderr
        )
        conditions = json.loads(done.stdout)["process"]["conditions"]
        bad = [one for one in conditions if not one["ok"]]
        assert [one["name"] for one in bad] == ["state", "python"] and all(one["remedy"] for one in bad)
        assert "NOT state" in told(process.pid, as_json=False).stdout
        assert read_process(process.pid).state == "T"
    finally:
        process.kill()
        process.communicate()


def _run_on(
    replica: Replica,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kernel: list[Condition],
) -> tuple[int, dict[str, object]]:
    monkeypatch.setattr(check, "discover_any", lambda pid: [replica])
    monkeypatch.setattr(check, "bpf_conditions", lambda: kernel)
    code = check.run(argparse.Namespace(pid=replica.members[0].pid, packs=False, json=True))
    return code, json.loads(capsys.readouterr().out)["engines"][0]


@pytest.mark.parametrize("name", sorted(NATIVE_NEEDS))
def test_llama_cpp_needs_the_kernel(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    process = subprocess.Popen(["sleep", "30"])
    try:
        time.sleep(0.1)
        replica = Replica("llama.cpp", 0, (Member(read_process(process.pid), "engine"),))
        good = [Condition(one, True, "") for one in (*NATIVE_NEEDS, *_FOR_SCHEDULING)]
        code, engine = _run_on(replica, monkeypatch, capsys, good)
        assert code == 0 and any("micro-batch" in thing for thing in engine["seen"])  # type: ignore[attr-defined]
        lacking = [
            Condition(one.name, one.name != name, "", "" if one.name != name else "a remedy") for one in good
        ]
        code, engine = _run_on(replica, monkeypatch, capsys, lacking)
        assert code == 3 and engine["seen"] == [] and "NOT" in engine["not_seen"][0]  # type: ignore[index]
        # What only captures need is told, and no reason to fail.
        without = [Condition(one.name, one.name not in _FOR_SCHEDULING, "") for one in good]
        code, engine = _run_on(replica, monkeypatch, capsys, without)
        assert code == 0 and any("scheduler events" in thing for thing in engine["not_seen"])  # type: ignore[attr-defined]
    finally:
        process.kill()
        process.wait()


def test_names_of_kernel_conditions_are_those_that_are_asked_for() -> None:
    names = {one.name for one in kernel_conditions()}
    assert names >= NATIVE_NEEDS and names.issuperset(_FOR_SCHEDULING)


@pytest.mark.parametrize("engine", PYTHON_ENGINES)
def test_what_is_seen_of_each_python_engine(engine: str) -> None:
    process = subprocess.Popen(["sleep", "30"])
    try:
        member = Member(read_process(process.pid), "engine")
        version = load_pack(engine).ranges[-1].since
        told = seen_of(Replica(engine, 0, (member,), version), True, [])
        assert any("every batch" in thing for thing in told["seen"])
        assert any("queue" in thing for thing in told["seen"]) is (engine != "tgi")
        assert any("queue" in thing for thing in told["not_seen"]) is (engine == "tgi")
        assert any("never read" in thing for thing in told["not_seen"])
        assert seen_of(Replica(engine, 0, (member,), version), False, [])["seen"] == []
    finally:
        process.kill()
        process.wait()
