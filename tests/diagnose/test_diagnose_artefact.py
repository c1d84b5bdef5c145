"""The import of folders of tables: the recorded pairs where they are at hand, synthetic ones always."""

import gzip
import json
import math
import os
from pathlib import Path

import pytest
from artefact_tables import COUNTERS, PERF, perf_rows, write_folder, write_table

from latencyprism.bench import artefact as bench
from latencyprism.bench import paper_score
from latencyprism.cli.main import main
from latencyprism.diagnose.artefact import judge, read_folder
from latencyprism.diagnose.artefact.fit import Move, catalogue, probabilities
from latencyprism.errors import BadInput

DATA = Path(os.environ.get("LATENCYPRISM_DATA", Path(__file__).parents[3] / "shared" / "data"))
PAIRS = DATA / "deepdive" / "SGLang"
recorded = pytest.mark.skipif(not PAIRS.is_dir(), reason="the recorded pairs are not on this machine")

FAULTS = {name: dict(signature.moves) for name, signature in catalogue().causes.items()}


def at(strength, moves):
    return {name: math.log1p(strength * (math.exp(move) - 1)) for name, move in moves.items()}


@pytest.mark.parametrize("cause", FAULTS)
@pytest.mark.parametrize("strength", [0.25, 1.0])
def test_a_fault_is_named(tmp_path, cause, strength):
    moves = at(strength, FAULTS[cause])
    if cause == "cpu.frequency":
        moves["cpu_frequency"] = math.log1p(strength * (math.exp(-1.36) - 1))
    verdict = judge(read_folder(write_folder(tmp_path / "pair", moves)))
    assert verdict.cause == cause
    assert verdict.cycles == 8
    assert math.isclose(sum(entry.probability for entry in verdict.ranking), 1.0)
    assert verdict.ranking[0].cause == cause
    own = catalogue().causes[cause].moves
    assert verdict.evidence[0].signal in own


def test_healthy_against_healthy_is_none(tmp_path):
    verdict = judge(read_folder(write_folder(tmp_path / "pair", {})))
    assert verdict.cause == "none"
    assert {entry.signal for entry in verdict.evidence} == {"cycle_ms"}


def test_what_is_in_no_signature_is_unknown(tmp_path):
    verdict = judge(read_folder(write_folder(tmp_path / "pair", {"gemm": 0.7, "write": -0.5})))
    assert verdict.cause == "unknown"


@pytest.mark.parametrize(
    "without",
    [("normal_counters",), ("abnormal_perf",), ("normal_perf", "abnormal_perf"), ("abnormal_counters",)],
)
def test_a_missing_table_is_said_and_done_without(tmp_path, without):
    folder = write_folder(tmp_path / "pair", FAULTS["cpu.frequency"], without=without, packed=False)
    verdict = judge(read_folder(folder))
    assert verdict.cause == "cpu.frequency"
    for name in without:
        assert any(entry.startswith(name) for entry in verdict.not_looked_at)


def test_one_period_alone_is_unknown(tmp_path):
    folder = write_folder(tmp_path / "pair", {}, without=("normal_perf", "normal_counters"))
    verdict = judge(read_folder(folder))
    assert (verdict.cause, verdict.probability) == ("unknown", 1.0)


def test_cycles_of_other_functions_are_not_compared(tmp_path):
    verdict = judge(read_folder(write_folder(tmp_path / "pair", FAULTS["xpu.clock"], anchor="layer")))
    assert verdict.cause == "xpu.clock"
    assert "different functions" in verdict.evidence[-1].text


def test_a_fault_that_latency_does_not_show_is_said_to_be_hidden(tmp_path):
    verdict = judge(read_folder(write_folder(tmp_path / "pair", FAULTS["xpu.clock"])))
    assert "latency does not suffer yet" in verdict.evidence[-1].text


# What other runs of other engines were measured to do (log ratios); the signatures are of SGLang alone.
VLLM = {
    "cpu.neighbour": {
        "oncpu": 0.89, "runq": 1.10, "write": 0.61, "h2d": 0.03, "host_cpu": 2.26, "cpu_frequency": -0.13,
        "sm_frequency": 0.0, "pcie_bytes": 0.1, "gemm": 0.0, "kernel": 0.01,
    },
    "cpu.frequency": {
        "oncpu": 1.22, "runq": 1.38, "write": 1.29, "h2d": 0.05, "host_cpu": 0.2, "cpu_frequency": -1.36,
        "sm_frequency": 0.0, "pcie_bytes": -0.7, "gemm": 0.0, "kernel": 0.02,
    },
    "xpu.clock": {
        "oncpu": 0.02, "runq": -0.01, "write": 0.02, "gemm": 1.23, "kernel": 1.22, "d2d": 0.95, "h2d": 0.36,
        "d2h": 0.37, "host_cpu": -0.02, "cpu_frequency": 0.0, "sm_frequency": 0.0, "pcie_bytes": -0.8,
    },
}  # fmt: skip


@pytest.mark.parametrize("cause", VLLM)
@pytest.mark.parametrize("strength", [0.25, 1.0])
def test_signatures_hold_for_another_engine(cause, strength):
    table = catalogue()
    found = {n: Move(m, table.floor[n]) for n, m in at(strength, VLLM[cause]).items()}
    chances = probabilities(found, table)
    assert max(chances, key=chances.get) == cause


# -- hostile tables ------------------------------------------------------------------------------


def test_what_is_no_folder_of_tables_is_refused(tmp_path):
    with pytest.raises(BadInput, match="not a folder"):
        read_folder(tmp_path / "absent")
    with pytest.raises(BadInput, match="holds no tables"):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"a,b\n1,2\n",
        b"\x00\x01\x02\xff" * 100,
        b"",
        b"counter_name,timestamp,value\n" + b"x,now,much\n" * 10,
        b"counter_name,timestamp,value\n" + b"x," + b"9" * 300_000 + b",1\n",
    ],
)
def test_a_table_that_is_none_is_refused(tmp_path, content):
    folder = write_folder(tmp_path / "pair", {})
    (folder / "normal_counters.csv").write_bytes(content)
    with pytest.raises(BadInput, match=r"normal_counters\.csv"):
        read_folder(folder)


def test_a_table_cut_off_in_the_middle_is_refused(tmp_path):
    folder = write_folder(tmp_path / "pair", {})
    path = folder / "abnormal_perf.csv.gz"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(BadInput, match="cannot be read"):
        read_folder(folder)


def test_a_table_without_bounds_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("latencyprism.diagnose.artefact.tables._MOST_BYTES", 4096)
    with pytest.raises(BadInput, match="too large"):
        read_folder(write_folder(tmp_path / "pair", {}))


def test_single_bad_rows_are_left_out_and_counted(tmp_path):
    folder = write_folder(tmp_path / "pair", FAULTS["xpu.link"])
    rows = list(perf_rows(FAULTS["xpu.link"], seed=2))
    for number, bad in enumerate(("nan", "-1", "inf", "", "1e400", "x" * 10_000)):
        rows[number * 7]["duration"] = bad
    write_table(folder / "abnormal_perf.csv.gz", PERF, rows)
    verdict = judge(read_folder(folder))
    assert verdict.cause == "xpu.link"
    assert any(entry.startswith("6 of 160 rows of abnormal_perf") for entry in verdict.not_looked_at)


def test_an_empty_table_is_said(tmp_path):
    folder = write_folder(tmp_path / "pair", FAULTS["xpu.clock"])
    write_table(folder / "abnormal_counters.csv.gz", COUNTERS, [])
    verdict = judge(read_folder(folder))
    assert verdict.cause == "xpu.clock"
    assert "abnormal_counters.csv.gz (it is empty)" in verdict.not_looked_at


# -- the command -----------------------------------------------------------------------------------


def test_explain_prints_a_verdict(tmp_path, capsys):
    folder = write_folder(tmp_path / "pair", FAULTS["xpu.pcie"])
    assert main(["explain", str(folder), "--format", "latencyprism-artefact", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["cause"] == "xpu.pcie"
    assert {"probability", "ranking", "evidence", "cycles", "seconds", "not_looked_at"} <= set(told)
    assert main(["explain", str(folder), "--format", "latencyprism-artefact"]) == 0
    assert "xpu.pcie" in capsys.readouterr().out


def test_explain_refuses_without_a_traceback(tmp_path, capsys):
    assert main(["explain", str(tmp_path), "--format", "latencyprism-artefact"]) == 2
    told = capsys.readouterr().err
    assert "holds no tables" in told and "Traceback" not in told
    write_folder(tmp_path / "pair", {})
    assert main(["explain", str(tmp_path / "pair"), "--format", "latencyprism-artefact", "--step", "3"]) == 2


# -- recorded pairs ----------------------------------------------------------------------------------


@recorded
@pytest.mark.parametrize("name", bench.CAUSE_OF)
def test_a_recorded_pair_is_named(name):
    verdict = judge(read_folder(PAIRS / name))
    assert verdict.cause == bench.CAUSE_OF[name]
    assert verdict.probability > 0.9


@recorded
def test_few_cycles_at_a_quarter_of_the_strength(monkeypatch):
    monkeypatch.setattr(bench, "CYCLES", (5,))
    monkeypatch.setattr(bench, "STRENGTHS", (0.1, 0.25))
    result = bench.run(PAIRS, 8, 1, lambda text: None)
    assert result["right"] == result["of"] == 5
    assert [row["top1"] >= 0.95 for row in result["draws"]] == [True, True]
    assert result["healthy"]["compared"] == 8 and result["healthy"]["cause_named"] == 0


@recorded
def test_the_papers_score_on_the_recorded_pairs():
    first = {}
    for name in bench.CAUSE_OF:
        folder = read_folder(PAIRS / name, rows=True)
        first[name] = paper_score.kinds(folder.rows)[0]
    # The link's score stands out, whatever the fault on a machine with two devices.
    assert first["gpu_memory_squeeze_out_PCIe"] == "xpu.link"
    assert first["gpu_instability"] == "xpu.clock"


def test_a_gzip_bomb_ends(tmp_path):
    folder = write_folder(tmp_path / "pair", {})
    with gzip.open(folder / "normal_counters.csv.gz", "wb") as file:
        file.write(b"counter_name,timestamp,value\n" + b"0" * (1 << 20))
    with pytest.raises(BadInput):
        read_folder(folder)
