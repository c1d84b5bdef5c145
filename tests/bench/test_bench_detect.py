"""The table of ``bench detect``: the re-created rivals are what they claim to be, all are judged alike."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from latencyprism.bench.boosted_trees import BoostedTrees
from latencyprism.bench.detect_recorded import Event, judged
from latencyprism.bench.footing import model_bytes
from latencyprism.bench.rivals import NAMES, rivals
from latencyprism.detect.graded import Fault, contaminate, grade, shifts, shuffled
from latencyprism.records.step import Step


def stream(jobs: int = 12, steps: int = 150, seed: int = 0) -> tuple[list[Step], list[str]]:
    """Jobs of one batch size each; a staircase, a price of context, 1 % of noise."""
    rng = random.Random(seed)
    found: list[Step] = []
    names: list[str] = []
    now = 10**9
    for job in range(jobs):
        batch = rng.choice((2, 4, 8, 12, 16, 24, 32))
        for at in range(steps):
            context = batch * (300 + at)
            ms = 20.0 + 0.2 * ((batch + 7) // 8 * 8) + context / 4e3
            took = int(ms * rng.gauss(1.0, 0.01) * 1e6)
            found.append(
                Step("e", 0, 0, len(found), now, now + took, None, batch, 0, batch, 0, batch, 0, context)
            )
            names.append(f"job{job}")
            now += took + 100_000
    return found, names


def test_boosted_trees_learn_a_staircase_and_steps_of_it_exactly() -> None:
    rng = np.random.default_rng(0)
    rows = rng.uniform(0.0, 10.0, (4000, 2))
    y = 30.0 + np.floor(rows[:, 0] / 2.5) * 10.0 + np.where(rows[:, 1] > 5.0, 7.0, 0.0)
    trees = BoostedTrees().fit(rows, y)
    test = rng.uniform(0.0, 10.0, (2000, 2))
    truth = 30.0 + np.floor(test[:, 0] / 2.5) * 10.0 + np.where(test[:, 1] > 5.0, 7.0, 0.0)
    assert np.mean(np.abs(trees.predict(test) - truth)) < 0.6
    assert np.allclose(BoostedTrees().fit(rows, np.full(4000, 3.0)).predict(test), 3.0)


def test_rivals_see_what_is_gross_and_the_raw_ones_take_a_heavier_batch_for_a_fault() -> None:
    steps, _ = stream()
    trained, clean = steps[:900], steps[900:]
    found = rivals(trained, clean)
    assert tuple(found) == NAMES
    slow = list(clean)
    for at in range(200, 300):
        slow[at] = slow[at]._replace(end_ns=slow[at].end_ns + (slow[at].end_ns - slow[at].start_ns))
    for name in NAMES:
        assert set(found[name](slow)) & set(range(200, 300)), name
    assert set(range(212, 300)) <= set(found["paper_fixed_window"](slow))
    assert rivals([], clean) == {}


def test_all_are_judged_on_the_same_faults() -> None:
    steps, jobs = stream()
    result = grade(
        steps,
        jobs,
        faults=[Fault("mult", 0.3), Fault("sporadic", 1.0)],
        splits=1,
        placements=1,
        rivals=rivals,
    )
    rows = result["faults"]
    assert isinstance(rows, dict)
    for fault in ("mult_0.3", "sporadic_1"):
        assert {"evidence", "page", *NAMES} == set(rows[fault])
        assert len({rows[fault][name]["events"] for name in rows[fault]}) == 1


def test_contamination_slows_the_share_that_was_asked_for() -> None:
    steps, _ = stream()
    spoiled = contaminate(steps, 0.2, 3)
    slow = [a for a, b in zip(steps, spoiled) if b.end_ns > a.end_ns]
    assert len(slow) == int(0.2 * len(steps))
    assert spoiled == contaminate(steps, 0.2, 3)


def test_shuffled_jobs_stay_whole_and_in_order_of_time() -> None:
    steps, jobs = stream(jobs=5, steps=20)
    mixed, begins = shuffled(steps, jobs, 1)
    assert sorted(step.step for step in mixed) == [step.step for step in steps]
    assert begins == [0, 20, 40, 60, 80]
    assert all(a.end_ns <= b.start_ns for a, b in pairwise(mixed))
    assert all(mixed[at].step % 20 == 0 for at in begins)


def test_shifts_of_known_workloads_alert_nobody() -> None:
    steps, jobs = stream(jobs=20)
    found = shifts(steps, jobs, streams=1)
    assert found == {"shifts": 8, "alerted": {"evidence": 0, "page": 0}}


def test_a_model_is_small() -> None:
    assert 10_000 < model_bytes(stream()[0]) < 200_000


@pytest.mark.parametrize("arguments", [(), ("--data", "/nonexistent"), ("--record", "--data", "x"),
                                       ("--data", "x", "--splits", "0")])  # fmt: skip
def test_bad_arguments_are_said(arguments: tuple[str, ...]) -> None:
    done = subprocess.run([sys.executable, "-m", "latencyprism", "bench", "detect", *arguments],
                          capture_output=True, text=True, timeout=60, check=False)  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_the_whole_table_from_a_file(tmp_path: Path) -> None:
    steps, jobs = stream(jobs=8, steps=120)
    header = ("job_name,start_ts,duration_us,batch_size,avg_input_length,max_input_length,avg_output_length,"
              "max_output_length")  # fmt: skip
    lines = [header]
    for step, job in zip(steps, jobs):
        length = (step.context_tokens or 0) // (step.requests or 1)
        lines.append(f"{job},{step.start_ns // 1000},{step.duration_ns // 1000},{step.requests},300,300,"
                     f"{length - 300},{length - 300}")  # fmt: skip
    file = tmp_path / "steps.csv"
    file.write_text("\n".join(lines) + "\n")
    order = [sys.executable, "-m", "latencyprism", "bench", "detect", "--data", str(file), "--splits", "1",
             "--placements", "1", "--json"]  # fmt: skip
    done = subprocess.run(order, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert {"fault_free", "faults", "cold", "contaminated", "workload_shifts", "model_bytes"} <= set(result)
    assert set(result["contaminated"]["f1_lost"]) == {"mult_0.05", "mult_0.1"}


def test_a_recording_is_judged_by_the_times_at_which_the_injectors_were_at_work() -> None:
    rng, steps, now = random.Random(3), [], 10**9
    stops, slow = (1500, 1600, 1700), range(1900, 2000)
    for number in range(2100):
        prefill = 200 if number % 25 == 0 else 0
        ms = (20.0 + (30.0 if prefill else 0.0)) * rng.gauss(1.0, 0.02)
        ms = ms + 50.0 if number in stops else ms * 1.8 if number in slow else ms
        end = now + int(ms * 1e6)
        phase, chunks = ("mixed", 1) if prefill else ("decode", 0)
        steps.append(
            Step("e", 0, 0, number, now, end, phase, 8, chunks, 7, prefill, 7, 0, 2000, prefill * 200)
        )
        now = end + 100_000
    events = [Event("stop", steps[at].start_ns + 1000, steps[at].end_ns - 1000) for at in stops]
    events.append(Event("neighbour_1", steps[1900].start_ns, steps[1999].end_ns))
    result = judged(steps, events, steps[1400].start_ns)
    ours = result["detectors"]["evidence"]
    assert ours["found"] == {"stop": "3 of 3", "neighbour_1": "1 of 1"}
    assert ours["false_episodes"] <= 2
    assert result["detectors"]["page"]["found"]["neighbour_1"] == "1 of 1"
    assert set(NAMES) < set(result["detectors"])
    assert result["error"]["decode_mean"] < 0.03 and result["error"]["mixed_to_decode"] < 2.0
    assert result["mixed_steps"] == 84
