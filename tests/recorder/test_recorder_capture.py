from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recorder_samples import alert, incident, verdict

from latencyprism.errors import BadInput, PrismError
from latencyprism.recorder import Capture, read_capture, write_capture, write_raw
from latencyprism.recorder.blocks import Block, write_block
from latencyprism.records import (
    FINISH_REASONS,
    PHASES,
    REQUEST_COLUMNS,
    ROUTES,
    STEP_COLUMNS,
    Counter,
    Request,
    Span,
    Step,
)

GOLDEN = Path(__file__).with_name("golden.pftrace")

int64 = st.integers(-(2**63) + 1, 2**63 - 1)
maybe = st.none() | int64
words = st.text(max_size=12)
tracks = st.lists(words, max_size=3).map(tuple)


@st.composite
def steps(draw: st.DrawFn) -> Step:
    engine = draw(st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=16))
    numbers = [draw(int64) for _ in range(5)]
    rest: dict[str, object] = {name: draw(maybe) for name in STEP_COLUMNS[7:]}
    rest["phase"] = draw(st.none() | st.sampled_from(PHASES))
    rest["kv_usage"] = draw(st.none() | st.floats(allow_nan=False))
    return Step(engine, *numbers, **rest)  # type: ignore[arg-type]


@st.composite
def requests(draw: st.DrawFn) -> Request:
    engine = draw(st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=16))
    rest: dict[str, object] = {name: draw(maybe) for name in REQUEST_COLUMNS[3:]}
    rest["finish_reason"] = draw(st.none() | st.sampled_from(FINISH_REASONS))
    rest["route"] = draw(st.none() | st.sampled_from(ROUTES))
    return Request(engine, draw(int64), draw(int64), **rest)  # type: ignore[arg-type]


detail = st.tuples(words, words | int64 | st.floats(allow_nan=False))
spans = st.builds(Span, tracks, words, int64, int64, maybe, st.lists(detail, max_size=3).map(tuple))
counters = st.builds(Counter, tracks, words, int64, st.floats(allow_nan=False), words)
captures = st.builds(
    Capture,
    meta=st.dictionaries(words, words | st.integers(-9, 9) | st.lists(words, max_size=2), max_size=3),
    steps=st.lists(steps(), max_size=4),
    spans=st.lists(spans, max_size=4),
    counters=st.lists(counters, max_size=4),
    requests=st.lists(requests(), max_size=4),
    alerts=st.lists(st.builds(lambda: alert(incident(4).steps[-1], 2)), max_size=1),
    verdict=st.none() | st.builds(verdict),
)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(capture=captures)
def test_any_capture_reads_back_exactly(tmp_path: Path, capture: Capture) -> None:
    path = tmp_path / "any.pftrace"
    for write in (write_capture, write_raw):
        assert write(path, capture) == path.stat().st_size
        back = read_capture(path)
        assert back == capture
        # 1, 1.0 and True are equal: what was an integer must have stayed one.
        assert repr(back.spans) == repr(capture.spans)


def test_a_large_capture_reads_back_with_its_expectations(tmp_path: Path) -> None:
    capture = incident(2500)
    assert capture.expected_ms is not None
    capture.expected_ms[1700] = None
    write_capture(tmp_path / "a.pftrace", capture)
    assert read_capture(tmp_path / "a.pftrace") == capture


def test_the_committed_capture_still_reads() -> None:
    assert GOLDEN.stat().st_size < 50_000
    back = read_capture(GOLDEN)
    assert back == incident(30, 15)
    assert back.notices == []


def test_a_file_cut_off_at_any_byte_shows_what_is_whole_and_never_breaks(tmp_path: Path) -> None:
    capture = incident(4)
    whole_path, cut_path = tmp_path / "whole", tmp_path / "cut"
    write_capture(whole_path, capture)
    whole = whole_path.read_bytes()
    counts = []
    for length in range(len(whole)):
        cut_path.write_bytes(whole[:length])
        try:
            read = read_capture(cut_path)
        except BadInput as error:
            assert str(error)
            continue
        assert read.notices
        counts.append(len(read.steps))
    assert counts == sorted(counts)
    assert 0 in counts and counts[-1] == len(capture.steps)


def test_a_flipped_byte_is_noticed_or_harmless(tmp_path: Path) -> None:
    capture = incident(3)
    path = tmp_path / "flipped"
    write_capture(path, capture)
    whole = bytearray(path.read_bytes())
    for place in range(0, len(whole), 3):
        whole[place] ^= 0x55
        path.write_bytes(whole)
        whole[place] ^= 0x55
        try:
            read = read_capture(path)
        except BadInput:
            continue
        # Outside our blocks a flip changes only what Perfetto draws; in them it must not pass unseen.
        assert read.notices or (read.steps, read.spans, read.counters) == (
            capture.steps, capture.spans, capture.counters,
        )  # fmt: skip


def test_a_damaged_block_leaves_the_rest_and_the_expectations_aligned(tmp_path: Path) -> None:
    capture = incident(2500)
    path = tmp_path / "holed"
    write_capture(path, capture)
    data = bytearray(path.read_bytes())
    second = [i for i in range(len(data)) if data.startswith(b"\x0a\x05steps", i)][1]
    data[second + 200] ^= 0xFF
    path.write_bytes(data)
    read = read_capture(path)
    assert [s.step for s in read.steps] == [*range(1000), *range(2000, 2500)]
    assert read.expected_ms is not None and capture.expected_ms is not None
    assert read.expected_ms[1000] == capture.expected_ms[2000]
    assert any("checksum" in notice for notice in read.notices)
    assert any("1500 of 2500 steps" in notice for notice in read.notices)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "empty"),
        (b"{}", "not a LatencyPrism capture"),
        (os.urandom(64), "not a LatencyPrism capture"),
        (b"\x0a\x02\x50\x01", "not a LatencyPrism capture"),
        (write_block(Block("capture", {"format": 2, "meta": {}})), "format 2 and this version reads up to 1"),
        (write_block(Block("capture", {"format": "1"})), "names no format"),
    ],
)
def test_what_is_no_capture_is_refused_in_words(tmp_path: Path, content: bytes, why: str) -> None:
    path = tmp_path / "foreign"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=why):
        read_capture(path)


def test_blocks_of_hostile_content_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "hostile"
    columns = [["step", "<i8"], ["start_ns", "<i8"], ["end_ns", "<i8"]]
    path.write_bytes(
        b"".join(
            write_block(block)
            for block in (
                Block("capture", {"format": 1, "meta": [], "counts": {"steps": "many"}}),
                Block("steps", {"first": 0, "rows": 1, "columns": columns}, b"short"),
                Block("steps", {"first": -1, "rows": 0, "columns": columns}),
                Block("steps", {"first": 0, "rows": 1, "columns": [["engine", "|O8"]]}, bytes(8)),
                Block("spans", {"rows": 1, "columns": [["track", "<u4"], ["name", "<u4"]]}, bytes(8)),
                Block("words", {"first": 1 << 40}, b"[]"),
                Block("words", {"first": 0}, b"[" * 100_000),
                Block("alerts", {}, b'[{"id": 7}]'),
                Block("verdict", {}, b'{"cause": []}'),
                Block("expected", {}, b"123"),
                Block("requests", {"first": 0, "rows": 1, "columns": [["replica", "<i8"]]}, bytes(8)),
                Block("weather", {}, b""),
            )
        )
    )
    read = read_capture(path)
    assert read.steps == [] and read.alerts == [] and read.verdict is None
    assert len(read.notices) == 12


def test_new_columns_are_ignored_and_missing_ones_are_not_seen(tmp_path: Path) -> None:
    import numpy as np

    layout = [("replica", "<i8"), ("rank", "<i8"), ("step", "<i8"), ("start_ns", "<i8"), ("end_ns", "<i8"),
              ("requests", "<i8"), ("mood", "<f8")]  # fmt: skip
    rows = np.array([(0, 0, 5, 10, 20, 3, 0.5)], dtype=layout)
    header = {"first": 0, "rows": 1, "columns": [list(column) for column in layout]}
    path = tmp_path / "older"
    path.write_bytes(
        write_block(Block("capture", {"format": 1, "meta": {}, "counts": {"steps": 1}}))
        + write_block(Block("steps", header, rows.tobytes()))
        + write_block(Block("end", {}))
    )
    read = read_capture(path)
    assert read.steps == [Step("", 0, 0, 5, 10, 20, requests=3)]


def test_a_full_disk_is_an_error_in_words_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(PrismError, match="No space left"):
        write_capture("/dev/full", incident(10))
    if os.geteuid() != 0:
        pytest.skip("a small file system can be mounted by root alone")
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(small)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        (small / "a.pftrace").write_bytes(b"old")
        with pytest.raises(PrismError, match="No space left"):
            write_capture(small / "a.pftrace", incident(600))
        assert (small / "a.pftrace").read_bytes() == b"old"
        assert list(small.iterdir()) == [small / "a.pftrace"]
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_places_that_cannot_be_written_are_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="folder"):
        write_capture(tmp_path, incident(2))
    with pytest.raises(PrismError, match="No such file"):
        write_capture(tmp_path / "none" / "a", incident(2))
    with pytest.raises(PrismError):
        write_capture("/proc/self/a.pftrace", incident(2))
    with pytest.raises(BadInput):
        write_capture("a\0b", incident(2))


def test_places_that_cannot_be_read_are_refused_in_words(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path, Path("/dev/null")):
        with pytest.raises(BadInput):
            read_capture(path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BadInput, match="not a regular file"):
        read_capture(tmp_path / "pipe")


def test_a_link_is_followed_and_the_file_behind_it_replaced(tmp_path: Path) -> None:
    target, link = tmp_path / "real", tmp_path / "link"
    target.write_bytes(b"old")
    link.symlink_to(target)
    write_capture(link, incident(2))
    assert link.is_symlink() and len(read_capture(target).steps) == 2
