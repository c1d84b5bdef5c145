from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import recorder_trace_processor
from hypothesis import HealthCheck, given, settings
from recorder_samples import REALTIME_NS, START_NS, incident, requests_of
from test_recorder_capture import captures

from latencyprism.cli.main import main
from latencyprism.errors import BadInput
from latencyprism.recorder import Capture, read_capture, write_capture
from latencyprism.recorder.columns import COLUMNS, tables_of
from latencyprism.recorder.export import FORMATS, export
from latencyprism.recorder.export_events import SPEEDSCOPE_SCHEMA
from latencyprism.records import STEP_COLUMNS, Span, Step
from latencyprism.records.operators import OPERATOR_DTYPE, Operators

NOT_HERE = recorder_trace_processor.missing()


def whole() -> Capture:
    """With requests and operators, too."""
    capture = incident(60)
    capture.requests = requests_of(capture.steps)
    rows = [
        (s.start_ns + 1000 * n, s.start_ns + 1000 * n + 900, s.step, n % 2)
        for s in capture.steps
        for n in (1, 2)
    ]
    rows.insert(0, (capture.steps[0].start_ns + 500, capture.steps[0].start_ns + 5000, 0, 2))
    operators = Operators(
        ("Worker 815", "ops"), ["aten::mm", "aten::add", "aten::linear"], np.array(rows, OPERATOR_DTYPE)
    )
    capture.operators = [operators]
    return capture


def exported(capture: Capture, kind: str, tmp_path: Path) -> Path:
    out = tmp_path / f"out.{kind}"
    export(capture, "a.pftrace", kind, out)
    return out


@pytest.mark.skipif(bool(NOT_HERE), reason=NOT_HERE)
def test_chrome_json_and_the_capture_hold_the_same_slices_counters_and_flows(tmp_path: Path) -> None:
    capture = whole()
    write_capture(tmp_path / "a.pftrace", capture)
    chrome = exported(capture, "chrome", tmp_path).rename(tmp_path / "chrome.json")
    found = []
    for trace in (tmp_path / "a.pftrace", chrome):
        with recorder_trace_processor.opened(trace) as processor:
            slices = processor.query(
                "select name, ts, dur, depth from slice where dur > 0 order by ts, dur, name, depth"
            )
            readings = processor.query(
                "select count(*) as n, sum(value) as total from counter"
                " join counter_track t on track_id = t.id"
                " where t.name like '%running%' or t.name like '%step time%'"
            )
            flows = processor.query(
                "select count(*) as n from flow join slice s on flow.slice_out = s.id"
                " where s.name like 'request%'"
            )
            found.append(
                (
                    [(row.name, row.ts, row.dur, row.depth) for row in slices],
                    [(row.n, round(row.total, 3)) for row in readings],
                    [row.n for row in flows],
                )
            )
    assert len(found[0][0]) > 60 * 8 and found[0][2] == [4]
    assert found[0][1:] == found[1][1:]
    assert [(name, depth) for name, _, _, depth in found[0][0]] == [(n, d) for n, _, _, d in found[1][0]]
    # Microseconds with a fraction, as a double: the nanosecond may be rounded.
    assert all(abs(a[1] - b[1]) <= 1 and abs(a[2] - b[2]) <= 2 for a, b in zip(found[0][0], found[1][0]))


def test_speedscope_follows_its_schema(tmp_path: Path) -> None:
    told = json.loads(exported(whole(), "speedscope", tmp_path).read_text())
    assert told["$schema"] == SPEEDSCOPE_SCHEMA and set(told["shared"]) == {"frames"}
    frames = told["shared"]["frames"]
    assert all(set(frame) == {"name"} for frame in frames)
    names = {profile["name"] for profile in told["profiles"]}
    assert {"vllm replica 0 rank 0 / steps", "Worker 815 / MainThread 815", "Worker 815 / ops"} <= names
    for profile in told["profiles"]:
        assert profile["type"] == "evented" and profile["unit"] == "nanoseconds"
        at, stack = profile["startValue"], []
        for event in profile["events"]:
            assert set(event) == {"type", "frame", "at"} and at <= event["at"] <= profile["endValue"]
            at = event["at"]
            if event["type"] == "O":
                stack.append(event["frame"])
            else:
                assert event["type"] == "C" and stack.pop() == event["frame"]
            assert event["frame"] < len(frames)
        assert not stack


def test_folded_stacks_add_up_to_the_time_of_their_slices(tmp_path: Path) -> None:
    capture = whole()
    spent: dict[str, int] = {}
    for line in exported(capture, "folded", tmp_path).read_text().splitlines():
        stack, _, number = line.rpartition(" ")
        spent[stack] = int(number)
    worker = "Worker 815;MainThread 815;execute_model"
    total = sum(s.end_ns - s.start_ns for s in capture.spans if s.name == "execute_model")
    assert sum(number for stack, number in spent.items() if stack.startswith(worker)) == total
    attention = sum(s.end_ns - s.start_ns for s in capture.spans if s.name == "attention")
    assert spent[f"{worker};forward;attention"] == attention
    assert spent["Worker 815;ops;aten::linear"] == 4500 - 2 * 900
    assert spent["Worker 815;ops;aten::linear;aten::add"] == 900
    assert not any("request" not in stack and "decode and output" in stack for stack in spent)


def test_names_cannot_break_a_folded_line(tmp_path: Path) -> None:
    capture = Capture(spans=[Span(("p;1", "t\n2"), "a;b\nc", 0, 5)])
    assert exported(capture, "folded", tmp_path).read_text() == "p_1;t_2;a_b_c 5\n"


def test_otlp_has_a_trace_for_each_request_linked_to_its_steps(tmp_path: Path) -> None:
    capture = whole()
    told = json.loads(exported(capture, "otlp", tmp_path).read_text())
    (resource,) = told["resourceSpans"]
    (scope,) = resource["scopeSpans"]
    spans = scope["spans"]
    assert scope["scope"]["name"] == "latencyprism"
    assert len({span["spanId"] for span in spans}) == len(spans)
    for span in spans:
        assert len(span["traceId"]) == 32 and len(span["spanId"]) == 16
        assert int(span["traceId"], 16) and int(span["startTimeUnixNano"]) <= int(span["endTimeUnixNano"])
    steps = {span["spanId"]: span for span in spans if span["name"].endswith(" step")}
    assert len(steps) == 60 and len({span["traceId"] for span in steps.values()}) == 1
    assert (
        int(min(s["startTimeUnixNano"] for s in steps.values()))
        == REALTIME_NS + capture.steps[0].start_ns - START_NS
    )
    (event,) = [event for span in steps.values() for event in span.get("events", [])]
    assert event["name"] == "shift alert"
    roots = [span for span in spans if span["name"] == "request"]
    assert len(roots) == 4 and len({span["traceId"] for span in roots}) == 4
    for root, request in zip(roots, [r for r in capture.requests if r.arrival_ns is not None]):
        attributes = {a["key"]: next(iter(a["value"].values())) for a in root["attributes"]}
        assert attributes["gen_ai.usage.input_tokens"] == "100"
        assert attributes["latencyprism.request"] == f"{request.request:016x}"
        linked = [steps[link["spanId"]] for link in root["links"]]
        numbers = [
            next(int(a["value"]["intValue"]) for a in span["attributes"] if a["key"] == "latencyprism.step")
            for span in linked
        ]
        assert numbers == [request.first_step, request.first_token_step, request.last_step]
        children = [span for span in spans if span.get("parentSpanId") == root["spanId"]]
        assert [child["name"] for child in children] == ["queue", "prefill", "decode and output"]
        assert children[0]["startTimeUnixNano"] == root["startTimeUnixNano"]
        assert children[-1]["endTimeUnixNano"] == root["endTimeUnixNano"]


def test_without_a_wall_clock_there_is_no_otlp(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="wall time"):
        exported(Capture(), "otlp", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_tables_keep_null_apart_from_zero(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    capture = whole()
    capture.steps[3] = capture.steps[3]._replace(waiting=None, kv_usage=None, phase=None, preempted=0)
    folder = exported(capture, "parquet", tmp_path)
    steps = parquet.read_table(folder / "steps.parquet").to_pydict()
    assert list(steps) == ["capture", *STEP_COLUMNS, "expected_ms"]
    assert (steps["waiting"][3], steps["kv_usage"][3], steps["phase"][3], steps["preempted"][3]) == (
        None,
    ) * 3 + (0,)
    assert [Step(*row) for row in zip(*(steps[name] for name in STEP_COLUMNS))] == capture.steps
    assert steps["expected_ms"] == capture.expected_ms and set(steps["capture"]) == {"a.pftrace"}
    requests = parquet.read_table(folder / "requests.parquet").to_pydict()
    assert requests["request"][:2] == ["fffffffffffffff7", "000000000000004d"]
    assert parquet.read_table(folder / "operators.parquet").num_rows == 121
    assert sorted(p.stem for p in folder.iterdir()) == sorted(COLUMNS)
    folder = exported(capture, "csv", tmp_path)
    with (folder / "steps.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows[3]["waiting"] == "" and rows[3]["preempted"] == "0" and len(rows) == 60
    with pytest.raises(BadInput, match="not empty"):
        exported(capture, "csv", tmp_path)


def test_tables_of_several_captures_say_where_a_row_is_from() -> None:
    tables = {t.name: t for t in tables_of([("a", incident(4)), ("b", incident(6))])}
    assert tables["steps"].values[0] == ["a"] * 4 + ["b"] * 6 and len(tables["captures"]) == 2
    assert len(tables["operators"]) == 0 and "request_key" not in str(tables["captures"].values)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(capture=captures)
def test_any_capture_can_be_exported(tmp_path: Path, capture: Capture) -> None:
    capture.meta["clock"] = {"monotonic_ns": 5, "realtime_ns": 10}
    for kind in ("chrome", "speedscope", "otlp"):
        json.loads(exported(capture, kind, tmp_path).read_text(), parse_constant=_no_constant)
    exported(capture, "folded", tmp_path)


def _no_constant(name: str) -> Any:
    raise AssertionError(f"{name} is no JSON")


def test_the_verb_writes_every_format_and_refuses_in_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    capture = whole()
    write_capture(tmp_path / "a.pftrace", capture)
    for kind in FORMATS:
        assert main(["explain", "a.pftrace", "--format", kind, "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["format"] == kind and told["bytes"] > 100 and Path(told["output"]).exists()
        assert main(["explain", "a.pftrace", "--format", kind]) == 2
        assert "is there already" in capsys.readouterr().err
    assert read_capture(tmp_path / "a.copy.pftrace").steps == capture.steps
    assert main(["explain", "a.pftrace", "-o", "x"]) == 2
    assert main(["explain", "a.pftrace", "--format", "chrome", "-o", str(tmp_path / "none" / "x")]) == 1
    assert "No such file" in capsys.readouterr().err
    whole_file = (tmp_path / "a.pftrace").read_bytes()
    (tmp_path / "cut.pftrace").write_bytes(whole_file[: len(whole_file) // 3])
    assert main(["explain", "cut.pftrace", "--format", "folded"]) == 0
    assert "NOTE:" in capsys.readouterr().out
