"""The diagnosis bench: scoring of recorded runs, resuming, the picture; the whole way on a real engine."""

import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from latencyprism.bench import confusion_picture, diagnose_score
from latencyprism.bench.diagnosed import HEALTHY, Plan, Run, read_lines, run, shifts_of
from latencyprism.cli.main import main
from latencyprism.diagnose.localiser import compared
from latencyprism.errors import BadInput

sys.path.insert(0, str(Path(__file__).parents[1] / "diagnose"))
from diagnose_scenes import FAULTS, ROLES, window
from diagnose_scenes import HEALTHY as QUIET


@pytest.fixture(scope="module")
def reference():
    return window(seconds=20)


def line(reference, truth, scene, run=0, strength=1.0, seed=5, **changes):
    found = compared(reference, window(scene, seconds=4, seed=seed, start_s=1100), roles=ROLES)
    slow = found.shifts["slow"].now - found.shifts["slow"].normal
    told = {
        "engine": "vllm", "truth": truth, "strength": strength, "run": run, "effective": True, "slow": slow,
        "looks": [[1.0, "unknown", 0.5], [3.0, truth, 0.9]], "shifts": shifts_of(found),
    }  # fmt: skip
    return json.loads(json.dumps({**told, **changes}))


@pytest.fixture(scope="module")
def lines(reference):
    causes = ("cpu.quota", "python.gc", "peer.stalled", "cpu.steal")
    found = [line(reference, cause, FAULTS[cause](1.0)) for cause in causes]
    found.append(line(reference, HEALTHY, QUIET, strength=0.0))
    found.append(line(reference, "cpu.quota", QUIET, run=1, effective=False))
    return found


def test_frozen_features_give_the_verdicts_that_they_gave(lines):
    result = diagnose_score.score(lines)
    assert (result["runs"], result["without_effect"], result["causes"]) == (6, 1, 4)
    assert result["strong"] == {"runs": 4, "top1": 1.0, "top3": 1.0}
    assert result["healthy"] == {"runs": 1, "cause_named": 0}
    assert result["confusion"]["cpu.quota"] == {"cpu.quota": 1}
    assert result["confusion"]["none"] == {"none": 1}
    assert result["first_right_s"] == {"runs": 4, "ever": 4, "at_seconds": {"3": 4}}
    assert sum(row["runs"] for row in result["calibration"]) == 5


def test_a_cause_that_is_in_no_catalogue_is_not_called_by_another_name(lines):
    unseen = diagnose_score.score(lines)["unseen"]
    assert unseen["runs"] == 4
    assert unseen["unknown_or_family"] >= 0.75


def test_two_causes_at_once(reference):
    both = window(FAULTS["cpu.quota"](1.0), seconds=4, seed=9, start_s=1100)
    collected = window(FAULTS["python.gc"](1.0), seconds=4, seed=9, start_s=1100)
    gc = {step.step: step.gc_ns for step in collected.steps}
    both.steps[:] = [
        s._replace(gc_ns=gc.get(s.step, 0), end_ns=s.end_ns + (gc.get(s.step) or 0)) for s in both.steps
    ]
    found = shifts_of(compared(reference, both, roles=ROLES))
    told = {"engine": "vllm", "truth": "cpu.quota+python.gc", "strength": 1.0, "run": 0, "effective": True,
            "slow": 2.0, "shifts": found}  # fmt: skip
    result = diagnose_score.score([told])
    assert result["pairs"] == {"runs": 1, "both_in_top3": 1.0, "one_in_top3": 1.0}
    assert result["confusion"] == {}


def test_runs_are_spread_and_those_done_are_not_repeated(tmp_path, lines):
    plan = Plan("vllm", ("cpu.quota", "python.gc"), (0.5, 1.0), 2, pairs=(("cpu.quota", "python.gc"),))
    wanted = plan.all_runs()
    assert len(wanted) == len(set(wanted)) == 2 * 2 * 3 + 2
    assert [one.key for one in wanted[:3]] == [
        (HEALTHY, 0.0, 0), ("cpu.quota", 1.0, 0), ("python.gc", 1.0, 0),
    ]  # fmt: skip
    assert Run(("cpu.quota", "python.gc"), 0.5, 1) in wanted
    out = tmp_path / "runs.jsonl"
    done = [{**lines[0], "truth": one.key[0], "strength": one.strength, "run": one.number} for one in wanted]
    out.write_text("".join(json.dumps(each) + "\n" for each in done))
    plan.out = out
    assert len(run(plan, lambda text: None)) == len(wanted)  # starts no engine


def test_a_line_cut_off_is_left_out_and_another_file_refused(tmp_path, lines):
    out = tmp_path / "runs.jsonl"
    text = json.dumps(lines[0])
    out.write_text(text + "\n" + text[:40])
    assert len(list(read_lines(out))) == 1
    out.write_text("{}\n" + text + "\n")
    with pytest.raises(BadInput, match="line 1"):
        list(read_lines(out))
    out.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInput):
        list(read_lines(out))


def test_the_picture_is_well_formed_and_names_everything():
    text = confusion_picture.svg({"cpu.quota": {"cpu.quota": 3, "<b>": 1}, "none": {"none": 2}}, "a & b")
    tree = ElementTree.fromstring(text)
    said = [each.text for each in tree.iter() if each.text and each.text.strip()]
    assert {"cpu.quota (4)", "none (2)", "<b>", "3", "1", "2"} <= set(said)


def test_the_command_scores_recorded_runs(tmp_path, lines, capsys):
    out, picture = tmp_path / "runs.jsonl", tmp_path / "matrix.svg"
    out.write_text("".join(json.dumps(each) + "\n" for each in lines))
    assert main(["bench", "diagnose", "--read", str(out), "-o", str(picture), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["strong"]["top1"] == 1.0
    reached = told["by_reached"]
    assert sum(row["runs"] for row in reached.values()) == sum(r["runs"] for r in told["by_cause"].values())
    longer = sum(0.35 <= line["slow"] < 0.75 for line in lines if line["truth"] != "none")
    assert reached["35 to 75 %"]["runs"] == longer
    assert "cpu.quota" in picture.read_text()
    assert main(["bench", "diagnose", "--read", str(out)]) == 0
    assert "healthy: a cause named in 0 of 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["--causes", "sunspots"],
        ["--strengths", "0"],
        ["--pairs", "cpu.quota"],
        ["--runs", "0"],
        ["--draws", "0"],
    ],
)
def test_bad_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as left:
        raise SystemExit(main(["bench", "diagnose", *arguments]))
    assert left.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.engine
@pytest.mark.root
def test_a_quota_and_a_healthy_run_on_a_real_engine(tmp_path):
    plan = Plan("transformers", ("cpu.quota",), (1.0,), 1, out=tmp_path / "runs.jsonl", seconds=60.0)
    found = run(plan, lambda text: None)
    if plan.skipped:
        pytest.skip(f"cannot be injected here: {plan.skipped}")
    assert {each["truth"] for each in found} == {HEALTHY, "cpu.quota"}
    assert list(read_lines(plan.out)) == json.loads(json.dumps(found))
    result = diagnose_score.score(found)
    assert result["healthy"]["cause_named"] == 0
    if result["without_effect"] == 0:
        assert "cpu.quota" in [name for name, _ in found[-1]["verdict"][:3]]
