"""The watch, check and record of a Python engine that no pack knows, as a person would call them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from latencyprism.attach.process import read_process
from latencyprism.detect import Detector
from latencyprism.engines.discovery import Member, Replica
from latencyprism.engines.unknown import GENERIC, no_pack_fits, successors
from latencyprism.records import Step
from latencyprism.sentinel.targets import attach
from latencyprism.timeline.generic_source import GenericSource


def latencyprism(*arguments: object) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "latencyprism", *map(str, arguments)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.root
def test_watch_searches_says_so_and_watches(engine: int, tmp_path: Path) -> None:
    steps = tmp_path / "steps.csv"
    lines = latencyprism("watch", "-p", engine, "-d", "3s", "--no-capture", "--steps", steps, "--json")
    attached, ended = lines[0], lines[-1]
    assert attached["event"] == "attached" and attached["engine"] == GENERIC
    assert "generic mode" in attached["warning"] and "confidence" in attached["warning"]
    assert "run_step" in attached["warning"] or "turn" in attached["warning"]
    assert ended["event"] == "ended" and ended["steps"] > 20 and ended["lost"] == 0
    rows = steps.read_text().splitlines()
    assert len(rows) == ended["steps"] + 1 and rows[1].startswith("python,0,0,0,")


@pytest.mark.root
def test_check_says_that_it_would_search(engine: int) -> None:
    (report,) = latencyprism("check", "-p", engine, "--json")
    told = report["engines"][0]
    assert told["engine"] == GENERIC and "search" in told["warning"]
    assert list(told["processes"]) == [str(engine)]


@pytest.mark.root
def test_a_version_outside_all_ranges_is_watched_the_generic_way(engine: int) -> None:
    replica = Replica("vllm", 0, (Member(read_process(engine), "engine+worker"),), "99.1")
    attachment = attach(replica)
    try:
        assert isinstance(attachment.source, GenericSource)
        assert attachment.warning is not None and "generic mode" in attachment.warning
        time.sleep(0.5)
        window = attachment.source.poll()
        assert window.steps and all(step.engine == "vllm" for step in window.steps)
    finally:
        attachment.close()


def test_which_engines_are_unknown(engine: int) -> None:
    member = (Member(read_process(engine), "engine"),)
    assert no_pack_fits(Replica(GENERIC, 0, member))
    assert no_pack_fits(Replica("vllm", 0, member, "99.1"))
    assert not no_pack_fits(Replica("vllm", 0, member, "0.32.0+cpu"))
    assert not no_pack_fits(Replica("vllm", 0, member, None))
    assert not no_pack_fits(Replica("llama.cpp", 0, member))


def test_one_started_again_is_its_successor(engine: int, start_engine: Callable[[], int]) -> None:
    old = Replica(GENERIC, 0, (Member(read_process(engine), "engine"),))
    assert engine not in [replica.engine_pid for replica in successors([old])]
    again = start_engine()
    assert [replica.engine_pid for replica in successors([old])] == [again]
    assert successors([]) == []


def test_gaps_of_an_engine_that_tells_no_work_are_no_stalls() -> None:
    detector = Detector()
    at, fired = 0, []
    for number in range(600):
        at += 4_000_000_000 if number % 97 == 96 else 50_000
        step = Step(GENERIC, 0, 0, number, at, at + 10_000_000 + number % 7 * 20_000, gap_ns=50_000)
        if number % 97 == 96:
            step = step._replace(gap_ns=4_000_000_000)
        firing = detector.observe(step)
        if firing is not None:
            fired.append(firing)
        at = step.end_ns
    assert not fired and detector.last is not None
    slow = Step(GENERIC, 0, 0, 600, at, at + 90_000_000, gap_ns=50_000)
    firing = detector.observe(slow)
    assert firing is not None and firing.kind == "stall" and firing.level == "page"
