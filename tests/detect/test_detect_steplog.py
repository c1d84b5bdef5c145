"""Step logs are hostile until parsed: every defect is named by row and column, or counted."""

from __future__ import annotations

import gzip
import itertools
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from latencyprism.detect.steplog import ARTEFACT_COLUMNS, StepLog
from latencyprism.errors import BadInput
from latencyprism.records.step import STEP_COLUMNS

HEADER = "start_ns,end_ns,requests,kv_usage"
GOOD = "1000,2000,4,0.5"


def read(path: Path, text: str | bytes, **options: object) -> StepLog:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return StepLog(path, **options)  # type: ignore[arg-type]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "steps.csv"


def test_columns_in_any_order_and_empty_means_not_observed(file: Path) -> None:
    steps = list(read(file, "end_ns,phase,start_ns,requests,gap_ns\n2000,decode,1000,,7\n3500,,2000,3.0,\n"))
    assert [(s.step, s.start_ns, s.end_ns, s.phase, s.requests, s.gap_ns) for s in steps] == [
        (0, 1000, 2000, "decode", None, 7),
        (1, 2000, 3500, None, 3, None),
    ]


def test_every_column_of_the_record_is_known(file: Path) -> None:
    row = dict.fromkeys(STEP_COLUMNS, "1") | {"engine": "vllm", "phase": "mixed", "end_ns": "9"}
    (step,) = read(file, ",".join(STEP_COLUMNS) + "\n" + ",".join(row[n] for n in STEP_COLUMNS) + "\n")
    assert step.engine == "vllm"
    assert step.attention_work == 1
    assert step.kv_usage == 1.0
    assert step.step == 0


@pytest.mark.parametrize("packed", [False, True])
def test_gzip_is_known_by_its_content(file: Path, packed: bool) -> None:
    text = f"{HEADER}\n{GOOD}\n".encode()
    assert len(list(read(file, gzip.compress(text) if packed else text))) == 1


@pytest.mark.parametrize(
    ("row", "column", "why"),
    [
        ("1000,,4,0.5", "end_ns", "no value"),
        ("1000,2000,nan,0.5", "requests", "no number"),
        ("1000,2000,4,NaN", "kv_usage", "no number"),
        ("1000,2000,4,inf", "kv_usage", "no number"),
        ("1000,2000,4,1e999", "kv_usage", "not finite"),
        ("1000,2000,-4,0.5", "requests", "negative"),
        ("1000,2000,4.5,0.5", "requests", "whole"),
        ("1000,2000,4_0,0.5", "requests", "no number"),
        ("1000,2000,٤,0.5", "requests", "no number"),
        ("1000,99999999999999999999,4,0.5", "end_ns", "too large"),
        ("5000,4000,4,0.5", "end_ns", "ends before it starts"),
        ("10,20,4,0.5", "start_ns", "order of time"),
        ("1000,2000,4", "kv_usage", "3 fields"),
        ("1000,2000,4,0.5,6", "kv_usage", "5 fields"),
        ("1000,2000,=cmd(),0.5", "requests", "no number"),
    ],
)
def test_a_bad_row_is_named_or_counted(file: Path, row: str, column: str, why: str) -> None:
    text = f"{HEADER}\n{GOOD}\n{row}\n3000,4000,4,0.5\n"
    with pytest.raises(BadInput) as error:
        list(read(file, text))
    assert "row 1" in str(error.value)
    assert column in str(error.value) or "fields" in why
    assert why in str(error.value)
    assert error.value.exit_code == 2
    log = read(file, text, skip_bad=True)
    assert [step.step for step in log] == [0, 2]
    assert log.skipped == 1


def test_unknown_columns(file: Path) -> None:
    text = f"{HEADER},colour\n{GOOD},red\n"
    with pytest.raises(BadInput, match="unknown column 'colour'"):
        list(read(file, text))
    log = read(file, text, skip_bad=True)
    assert len(list(log)) == 1
    assert log.unknown_columns == ["colour"]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "empty"),
        (b"\n", "empty"),
        (b"\x7fELF\x02\x01\x01\0\0\0", "binary"),
        (b"\xff\xfe\xfa\n", "binary"),
        (b"\x1f\x8b\x08junk that is no deflate stream", "unpacked"),
        (b"a" * 100_000, "longer"),
        (b"requests,kv_usage\n1,1\n", "'start_ns' is missing"),
        (b"start_ns,end_ns,end_ns\n1,2,3\n", "twice"),
    ],
)
@pytest.mark.parametrize("skip_bad", [False, True])
def test_what_is_no_step_log_is_refused(file: Path, content: bytes, why: str, skip_bad: bool) -> None:
    with pytest.raises(BadInput, match=why):
        list(read(file, content, skip_bad=skip_bad))


def test_truncated_gzip(file: Path) -> None:
    rows = "".join(f"{n * 1000},{n * 1000 + 900},4,0.{n}\n" for n in range(5000))
    packed = gzip.compress(f"{HEADER}\n{rows}".encode())
    with pytest.raises(BadInput, match=r"row \d+.*unpacked"):
        list(read(file, packed[: len(packed) // 2]))
    log = read(file, packed[: len(packed) // 2], skip_bad=True)
    assert 1000 < len(list(log)) < 5000
    assert log.skipped >= 1


def test_absent_files_and_folders(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.csv", tmp_path):
        with pytest.raises(BadInput, match="cannot read"):
            list(StepLog(path))


def test_the_right_format_is_suggested(file: Path) -> None:
    with pytest.raises(BadInput, match="--format latencyprism-artefact"):
        list(read(file, ",".join(ARTEFACT_COLUMNS) + "\nj,1,2,3,4,5,6,7\n"))


def test_artefact_columns(file: Path) -> None:
    text = ",".join(ARTEFACT_COLUMNS) + "\nj,1000.5,30000.25,8,100.0,128,20.5,40\n"
    log = read(file, text, format="latencyprism-artefact")
    (step,) = log
    assert (step.start_ns, step.duration_ns) == (1000500, 30000250)
    assert (step.requests, step.context_tokens, step.prefill_tokens) == (8, 964, None)
    assert log.stretches == ["j"]
    with pytest.raises(BadInput, match=r"row 0 .*column duration_us"):
        list(read(file, text.replace("30000.25", "-3"), format="latencyprism-artefact"))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    body=st.one_of(
        st.binary(max_size=400),
        st.text(max_size=400).map(str.encode),
        st.lists(st.lists(st.sampled_from(["1", "2e3", "-1", "", "nan", '"', "9" * 40, "x"]), max_size=5))
        .map(lambda rows: "\n".join(",".join(row) for row in rows).encode()),
    ),
    header=st.booleans(),
    packed=st.booleans(),
    skip_bad=st.booleans(),
)  # fmt: skip
def test_any_bytes_give_steps_or_bad_input(
    tmp_path: Path, body: bytes, header: bool, packed: bool, skip_bad: bool
) -> None:
    content = (HEADER.encode() + b"\n" if header else b"") + body
    log = read(tmp_path / "f", gzip.compress(content) if packed else content, skip_bad=skip_bad)
    try:
        steps = list(log)
    except BadInput:
        return
    assert all(step.end_ns >= step.start_ns >= 0 for step in steps)
    assert all(a.start_ns <= b.start_ns for a, b in itertools.pairwise(steps))
