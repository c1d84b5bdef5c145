"""Captures of real engines, recorded once: what we and Perfetto's own trace processor read of them."""

from __future__ import annotations

import itertools
import json
import re
import zlib
from collections import Counter as Tally
from pathlib import Path
from typing import Any

import pytest
import recorder_trace_processor

from latencyprism.cli.main import main
from latencyprism.errors import BadInput
from latencyprism.recorder import Capture, read_capture
from latencyprism.recorder.flows import request_flow

FOLDER = Path(__file__).with_name("golden")
EXPECTED: dict[str, dict[str, Any]] = json.loads((FOLDER / "expected.json").read_text())
NOT_HERE = recorder_trace_processor.missing()
ENGINES = sorted(EXPECTED)
PLAIN = re.compile(
    r"other\d+$|python|pt_|vllm|VLLM|llama|transformers|ZMQbg|gloo_|kworker|ksoftirqd|rcu_|migration|swapper"
)
"""Names of processes that any installation has; whoever else was there is called otherN."""

pytestmark = pytest.mark.parametrize("engine", ENGINES)


def golden(engine: str) -> Path:
    return FOLDER / f"{engine}.pftrace"


def numbers(capture: Capture) -> dict[str, Any]:
    """What a golden capture is held to."""
    steps = capture.steps
    return {
        "steps": len(steps),
        "first_step": steps[0].step,
        "last_step": steps[-1].step,
        "prefill_tokens": sum(step.prefill_tokens or 0 for step in steps),
        "decode_tokens": sum(step.decode_tokens or 0 for step in steps),
        "phases": dict(sorted(Tally(str(step.phase) for step in steps).items())),
        "requests": len(capture.requests),
        "output_tokens": sum(request.output_tokens or 0 for request in capture.requests),
        "spans": len(capture.spans),
        "counters": len(capture.counters),
        "operators": sum(len(calls.rows) for calls in capture.operators),
        "alerts": [[alert.kind, alert.level, alert.step] for alert in capture.alerts],
        "cause": capture.verdict.cause if capture.verdict else None,
    }


def test_it_reads_back_with_the_numbers_that_were_recorded(engine: str) -> None:
    capture = read_capture(golden(engine))
    assert capture.notices == []
    assert numbers(capture) == EXPECTED[engine]
    assert {step.engine for step in capture.steps} == {engine} and capture.meta["engine"] == engine
    assert golden(engine).stat().st_size <= 300_000


def test_steps_are_in_order_and_do_not_overlap_those_of_their_rank(engine: str) -> None:
    capture = read_capture(golden(engine))
    steps = capture.steps
    assert [step.step for step in steps] == list(range(steps[0].step, steps[0].step + len(steps)))
    assert all(a.end_ns <= b.end_ns and a.start_ns < b.start_ns for a, b in itertools.pairwise(steps))
    (stopped,) = [step for step in steps if step.start_ns == capture.meta["onset_ns"]]
    assert stopped.start_ns < capture.meta["stopped_ns"] < stopped.end_ns
    assert stopped.duration_ms >= 390, "the process was stopped for 400 ms"
    assert stopped.start_ns - steps[0].start_ns > 9e8 and steps[-1].end_ns - stopped.end_ns > 9e8


def test_the_cause_is_named_again_and_to_the_last_bit_the_same_each_time(
    engine: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The verdict in the file was made with the signatures of its day; those of today must name no other
    cause, and whether it is the very same is what `--again` says."""
    stored = read_capture(golden(engine)).verdict
    code = main(["explain", str(golden(engine)), "--again", "--json"])
    told = capsys.readouterr().out
    again = json.loads(told)
    assert stored is not None and again["verdict"]["cause"] == stored.cause == EXPECTED[engine]["cause"]
    assert again["same"] is (json.dumps(again["verdict"]) == json.dumps(stored.to_dict()))
    assert code == (0 if again["same"] else 1)
    assert main(["explain", str(golden(engine)), "--again", "--json"]) == code
    assert capsys.readouterr().out == told
    assert main(["explain", str(golden(engine))]) == 0
    assert stored.cause in capsys.readouterr().out


def test_nothing_of_the_machine_or_of_a_prompt_is_in_it(engine: str) -> None:
    """Every word of the file, blocks unpacked."""
    capture = read_capture(golden(engine))
    told = [json.dumps(capture.meta), json.dumps([alert.text for alert in capture.alerts])]
    told += [json.dumps(capture.verdict.to_dict() if capture.verdict else None)]
    told += [" ".join((*span.track, span.name, json.dumps(span.details))) for span in capture.spans]
    told += [" ".join((*c.track, c.name, c.unit)) for c in capture.counters]
    told += [" ".join((*calls.track, *calls.names)) for calls in capture.operators]
    found = sorted({word for text in told for word in re.findall(r"(?<![\w.:%(])/[a-z]+/[\w./-]+", text)})
    assert found == []
    assert capture.meta["host"] == "(host)" and capture.meta["versions"]["kernel"] == "(kernel)"
    assert set(capture.meta["request_key"] or "0") == {"0"}
    assert not {"command", "cmdline", "environ"} & set(capture.meta)
    others = {found[1] for text in told for found in re.finditer(r"\(after \d+ ([^)]*)\)", text)}
    others |= {c.track[1] for c in capture.counters if c.track[0].startswith("neighbour ")}
    assert {name for name in others if not PLAIN.match(name)} == set()
    assert {c.track[2] for c in capture.counters if c.track[0].startswith("neighbour ")} <= {"(group)"}
    raw = golden(engine).read_bytes()
    assert b"/root/" not in raw and b"/home/" not in raw and b"/tmp/" not in raw


def test_cut_off_anywhere_it_opens_with_a_notice_or_says_why_not(
    engine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, data = read_capture(golden(engine)), golden(engine).read_bytes()
    cut, opened = tmp_path / "cut.pftrace", 0
    for place in range(1, 40):
        cut.write_bytes(data[: len(data) * place // 40 - zlib.crc32(bytes([place])) % 50])
        try:
            rest = read_capture(cut)
        except BadInput as refused:
            assert refused.why and place < 4, place
            continue
        opened += 1
        assert rest.notices, place
        assert rest.steps == whole.steps[: len(rest.steps)]
        assert rest.requests == whole.requests[: len(rest.requests)]
        assert rest.counters == whole.counters[: len(rest.counters)]
    assert opened >= 36
    assert main(["explain", str(cut)]) == 0
    assert "cut off" in capsys.readouterr().out


@pytest.mark.skipif(bool(NOT_HERE), reason=NOT_HERE)
def test_the_trace_processor_finds_the_same_steps_flows_and_counters(engine: str) -> None:
    capture = read_capture(golden(engine))
    with recorder_trace_processor.opened(golden(engine)) as processor:
        faults = processor.query(
            "select name from stats where value != 0 and severity in ('error', 'data_loss')"
        )
        assert [row.name for row in faults] == []
        _same_steps(processor, capture)
        _same_requests(processor, capture)
        _same_counters(processor, capture)
        _same_spans(processor, capture)


def _same_steps(processor: Any, capture: Capture) -> None:
    rows = processor.query(
        """
        select slice.ts as ts, slice.dur as dur, extract_arg(arg_set_id, 'debug.step') as step,
          extract_arg(arg_set_id, 'debug.phase') as phase,
          extract_arg(arg_set_id, 'debug.prefill_tokens') as prefill,
          extract_arg(arg_set_id, 'debug.decode_tokens') as decode
        from slice join track on slice.track_id = track.id
        where track.name = 'steps' and slice.name not like '% not recorded' order by ts
        """
    )
    assert [(r.ts, r.dur, r.step, r.phase, r.prefill, r.decode) for r in rows] == [
        (s.start_ns, s.duration_ns, s.step, s.phase, s.prefill_tokens, s.decode_tokens) for s in capture.steps
    ]


def _same_requests(processor: Any, capture: Capture) -> None:
    rows = processor.query(
        """
        select a.name as source, extract_arg(b.arg_set_id, 'debug.step') as step
        from flow join slice a on flow.slice_out = a.id join slice b on flow.slice_in = b.id
        where a.name like 'request %'
        """
    )
    held = {step.step for step in capture.steps}
    first = {
        f"request {request.request & (2**64 - 1):016x}": request.first_step
        for request in capture.requests
        if request.arrival_ns is not None and request.first_step in held
    }
    found = [(row.source, row.step) for row in rows]
    assert dict(item for item in found if item[0] in first) == first
    assert len({request_flow(request) for request in capture.requests}) == len(capture.requests)


def _same_counters(processor: Any, capture: Capture) -> None:
    rows = processor.query(
        "select name, unit, count(*) as n from counter join counter_track on track_id = counter_track.id"
        " group by 1, 2"
    )
    found = {row.name: (row.unit, row.n) for row in rows}
    assert found["step time"] == ("ms", len(capture.steps))
    readings = Tally(counter.name for counter in capture.counters)
    units = {counter.name: counter.unit for counter in capture.counters}
    assert len(readings) > 5
    for name, count in readings.items():
        assert found[name][1] == count, name
        assert units[name].startswith(found[name][0] or "") or found[name][0] in ("bytes", "ns"), name


def _same_spans(processor: Any, capture: Capture) -> None:
    """By name; those that steps and requests are drawn with, too, are counted there."""
    recorded = Tally(span.name for span in capture.spans)
    for calls in capture.operators:
        recorded.update(calls.names[place] for place in calls.rows["name"])
    rows = processor.query(
        """
        select slice.name as name, count(*) as n from slice join track on slice.track_id = track.id
        where coalesce(track.name, '') not in ('steps', 'phases', 'requests', 'alerts') group by 1
        """
    )
    drawn = {row.name: row.n for row in rows}
    assert {name: drawn.get(name) for name in recorded} == dict(recorded)
