from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recorder"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "sentinel"))

from recorder_samples import incident, requests_of
from sentinel_stepping import watch_of_this_process

from latencyprism.cli import query
from latencyprism.cli.main import main
from latencyprism.recorder import write_capture
from latencyprism.sentinel import flight_tape


@pytest.fixture(scope="module")
def capture_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    capture = incident(300)
    capture.requests = requests_of(capture.steps)
    path = tmp_path_factory.mktemp("captures") / "a.pftrace"
    write_capture(path, capture)
    return path


@pytest.fixture()
def ask(capture_file: Path, capfd: pytest.CaptureFixture[str]) -> Any:
    pytest.importorskip("chdb", reason="the extra store is not installed")

    def asked(sql: str, *more: str) -> Any:
        code = main(["query", sql, str(capture_file), *(more or ("--json",))])
        out, err = capfd.readouterr()
        return (code, err) if code else out if more else json.loads(out)["data"]

    return asked


def test_columns_and_nulls_are_those_of_the_records(ask: Any) -> None:
    capture = incident(300)
    (row,) = ask("select count() as n, sum(end_ns - start_ns) as ns, count(draft_tokens) as drafts,"
                 " countIf(waiting > 0) as waited, sum(prefill_tokens) as tokens from steps")  # fmt: skip
    assert row == {
        "n": 300, "ns": sum(s.end_ns - s.start_ns for s in capture.steps), "drafts": 0,
        "waited": sum((s.waiting or 0) > 0 for s in capture.steps),
        "tokens": sum(s.prefill_tokens or 0 for s in capture.steps),
    }  # fmt: skip
    (row,) = ask("select * from steps where step = 7")
    assert row["draft_tokens"] is None and row["phase"] == "mixed" and row["capture"] == "a.pftrace"
    assert row["start_ns"] == capture.steps[7].start_ns and row["kv_usage"] == capture.steps[7].kv_usage


def test_tables_can_be_joined(ask: Any) -> None:
    rows = ask("select a.id as id, s.expected_ms as expected_ms, v.cause as cause"
               " from alerts a join steps s on s.step = a.step cross join verdicts v")  # fmt: skip
    assert rows[0]["id"] == "9f2c41d0" and rows[0]["cause"] == "cpu.neighbour" and rows[0]["expected_ms"]
    rows = ask("with slow as (select request from requests order by ttft_ns desc limit 3) select count() as n"
               " from requests where request in (select request from slow)")  # fmt: skip
    assert rows == [{"n": 3}]
    rows = ask("select name, count() as n from spans group by name order by name")
    assert rows == [{"name": name, "n": 300} for name in ("attention", "execute_model", "forward")]
    assert ask("select JSONExtractFloat(terms, 'base') as base from alerts") == [{"base": 8}]
    assert ask("select count() as n from operators") == [{"n": 0}]
    (row,) = ask(
        "select engine, realtime_ns - monotonic_ns as ahead, position(meta, 'request_key') as k from captures"
    )
    assert row["engine"] == "vllm" and row["ahead"] > 0 and row["k"] == 0


def test_every_format_is_written(ask: Any, tmp_path: Path) -> None:
    assert (
        ask("select step, phase from steps limit 2", "--format", "csv")
        == '"step","phase"\n0,"decode"\n1,"decode"\n'
    )
    assert ask("select 1 as one", "--format", "jsonl") == '{"one":1}\n'
    assert "│ 299 │" in ask("select max(step) as m from steps", "--format", "table")
    out = tmp_path / "x.parquet"
    assert ask("select step from steps", "--format", "parquet", "-o", str(out)) == ""
    assert out.read_bytes()[:4] == b"PAR1"


def test_what_is_not_allowed_is_refused_in_a_sentence(ask: Any) -> None:
    code, err = ask("select * from file('/etc/passwd', 'LineAsString')")
    assert code == 2 and "table function file is not allowed" in err and "root:" not in err


def test_what_is_wrong_is_said_in_a_sentence(ask: Any) -> None:
    for sql, said in (
        ("select nosuch from steps", "nosuch"), ("select * from nosuch", "nosuch"),
        ("selec 1", "Syntax error"),
        ("", "no SQL"), ("select '", "Syntax error"), ("select 1\0", "no text"), ("(" * 5000, ""),
        ("select throwIf(1)", ""), ("select " + "1+" * 60_000 + "1", "longer than"),
    ):  # fmt: skip
        code, err = ask(sql)
        assert code == 2 and said in err and len(err) < 1200 and "Traceback" not in err, sql[:50]


def test_a_query_that_takes_too_long_or_too_much_is_given_up(ask: Any) -> None:
    code, err = ask("select count() from numbers(100000000000) where number % 7 = 8", "--limit", "1s")
    assert code == 2 and "imeout" in err
    code, err = ask("select groupArray(number) from numbers(2000000000)")
    assert code == 2 and "emory" in err


def test_a_damaged_capture_is_read_as_far_as_it_is_whole(
    capture_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("chdb")
    cut = tmp_path / "cut.pftrace"
    cut.write_bytes(capture_file.read_bytes()[:20_000])
    assert main(["query", "select count() from steps", str(cut), "--format", "csv"]) == 0
    out, err = capfd.readouterr()
    assert int(out.splitlines()[1]) <= 300 and "note: cut.pftrace:" in err
    (tmp_path / "foreign").write_text("{}")
    assert main(["query", "select 1", str(tmp_path / "foreign")]) == 2


def test_a_running_watch_can_be_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("chdb")
    monkeypatch.setattr(flight_tape, "tape_folder", lambda: tmp_path)
    monkeypatch.setattr(query, "tape_folder", lambda: tmp_path)
    assert main(["query", "select 1"]) == 1
    assert "no watch of yours runs" in capfd.readouterr().err
    watch = watch_of_this_process()
    try:
        time.sleep(0.2)
        watch.poll()
        wanted = "select capture, min(step) as a, max(step) as b, count() as n from steps group by 1"
        assert main(["query", wanted, "--json"]) == 0
        (row,) = json.loads(capfd.readouterr().out)["data"]
        assert (
            row["capture"] == f"live:{watch.replica.engine_pid}"
            and row["a"] == 1
            and row["b"] == row["n"] > 10
        )
        assert main(["query", "select 1", "-p", "1"]) == 1
        assert "no watch of process 1 runs" in capfd.readouterr().err
    finally:
        watch.close()


def test_tables_are_listed_without_chdb_and_the_lack_of_it_is_said(
    capture_file: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "chdb"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "chdb.session", None)
    assert main(["query", "--tables", "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert {"name": "kv_usage", "type": "Float64"} in told["steps"]
    assert main(["query", "select 1", str(capture_file)]) == 1
    assert "latencyprism[store]" in capfd.readouterr().err
