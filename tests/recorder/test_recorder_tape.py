from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recorder_samples import incident
from test_recorder_capture import counters, requests, spans, steps

from latencyprism.errors import BadInput, PrismError
from latencyprism.recorder import FlightRecorder, tape
from latencyprism.recorder.tape import HEADER_BYTES, SEGMENT_BYTES, Tape, tape_folder
from latencyprism.recorder.tape_reading import HeldTape, read_tape, tapes_in
from latencyprism.records import Counter, Request, Span, Step

FOREVER_NS = 2**63
SMALL = (2 << 20,)


@pytest.fixture()
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "tapes"
    made.mkdir(mode=0o700)
    return made


def record(written: Tape, capture: object) -> None:
    written.write_meta(capture.meta)  # type: ignore[attr-defined]
    for step, expected in zip(capture.steps, capture.expected_ms):  # type: ignore[attr-defined]
        written.add_step(step, expected)
    for span in capture.spans:  # type: ignore[attr-defined]
        written.add_span(span)
    for counter in capture.counters:  # type: ignore[attr-defined]
        written.add_counter(counter)


def test_what_was_written_reads_back_exactly_while_it_is_being_written_and_after(folder: Path) -> None:
    made = incident(300)
    written = Tape(folder, "vllm-812-99")
    try:
        record(written, made)
        written.add_request(Request("vllm", 0, -5, 1, finish_reason="stop", route="/v1/responses"))
        written.add_alert(made.alerts[0], made.steps[150].start_ns, made.steps[156].end_ns)
        back = read_tape(written.path, FOREVER_NS)
        assert (back.steps, back.spans, back.counters) == (made.steps, made.spans, made.counters)
        assert back.expected_ms == made.expected_ms and back.meta == made.meta
        assert back.requests == [Request("vllm", 0, -5, 1, finish_reason="stop", route="/v1/responses")]
        assert back.alerts[0] == (made.alerts[0], made.steps[150].start_ns, made.steps[156].end_ns)
        capture = back.capture()
        assert capture.meta["onset_ns"] == made.steps[150].start_ns and not back.notices
        assert written.path.stat().st_mode & 0o777 == 0o600
    finally:
        written.close()
    assert list(folder.iterdir()) == []


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    some_steps=st.lists(steps(), max_size=3), some_spans=st.lists(spans, max_size=3),
    some_counters=st.lists(counters, max_size=3), some_requests=st.lists(requests(), max_size=3),
)  # fmt: skip
def test_any_records_read_back(
    folder: Path, some_steps: list[Step], some_spans: list[Span], some_counters: list[Counter],
    some_requests: list[Request],
) -> None:  # fmt: skip
    written = Tape(folder, "x-1-1", SMALL)
    try:
        for step in some_steps:
            written.add_step(step)
        for span in some_spans:
            written.add_span(span)
        for counter in some_counters:
            written.add_counter(counter)
        for request in some_requests:
            written.add_request(request)
        back = read_tape(written.path, 1 << 70)
    finally:
        written.close()
    assert (back.steps, back.spans, back.counters) == (some_steps, some_spans, some_counters)
    assert repr(back.spans) == repr(some_spans) and back.requests == some_requests


def test_the_newest_are_kept_within_the_bytes_and_a_flood_of_one_kind_costs_no_other(folder: Path) -> None:
    made = incident(2000)
    written = Tape(folder, "x-1-1", SMALL)
    try:
        for step in made.steps[:100]:
            written.add_step(step)
        for number in range(60_000):
            written.add_span(Span(("p 1", "t 2"), f"call {number % 50}", number, number + 1))
        back = read_tape(written.path, FOREVER_NS)
        assert back.steps == made.steps[:100]
        numbers = [span.start_ns for span in back.spans]
        assert numbers == list(range(numbers[0], 60_000)) and 1000 < len(numbers) < 60_000
        assert back.spans[-1].name == "call 49"
        for step in made.steps[100:]:
            written.add_step(step)
        assert read_tape(written.path, FOREVER_NS).steps[-500:] == made.steps[-500:]
        assert written.path.stat().st_size == written.size <= SMALL[0] + HEADER_BYTES
    finally:
        written.close()


def test_what_is_older_than_the_horizon_is_left_out(folder: Path) -> None:
    made = incident(600)
    written = Tape(folder, "x-1-1", SMALL)
    try:
        record(written, made)
        back = read_tape(written.path, 2_000_000_000)
    finally:
        written.close()
    last_ns = made.steps[-1].end_ns
    assert back.steps == [step for step in made.steps if step.end_ns >= last_ns - 2_000_000_000]
    assert len(back.expected_ms) == len(back.steps)


WRITER = """
import sys, time
from pathlib import Path
from latencyprism.recorder.tape import Tape
from latencyprism.records import Counter, Span, Step
written = Tape(Path(sys.argv[1]), "vllm-1-1", (2 << 20,))
print("begun", flush=True)
number = 0
while True:
    number += 1
    written.add_step(Step("vllm", 0, 0, number, number * 1000, number * 1000 + 900), float(number))
    written.add_span(Span(("p 1", f"t {number % 7}"), "call", number * 1000, number * 1000 + 5, number))
    written.add_counter(Counter(("m",), f"c{number % 300}", number * 1000, number / 2))
    if number % 50 == 0:
        written.write_meta({"number": number})
"""


@pytest.mark.parametrize("after_s", [0.0, 0.003, 0.02, 0.1, 0.35, 0.9])
def test_a_writer_killed_at_any_moment_leaves_a_tape_without_a_hole(folder: Path, after_s: float) -> None:
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(folder)], stdout=subprocess.PIPE)
    assert writer.stdout is not None and writer.stdout.readline() == b"begun\n"
    (file,) = tapes_in(folder)
    assert file.live and HeldTape.take(file.path) is None
    time.sleep(after_s)
    os.kill(writer.pid, signal.SIGKILL)
    writer.communicate()
    assert not file.live
    back = read_tape(file.path, FOREVER_NS)
    numbers = [step.step for step in back.steps]
    assert not back.notices
    if numbers:
        assert numbers == list(range(numbers[0], numbers[-1] + 1))
        assert back.expected_ms == [float(number) for number in numbers]
        assert back.spans[-1].step in (numbers[-1], numbers[-1] - 1)
        assert numbers[-1] - back.meta.get("number", 0) <= 100
    held = HeldTape.take(file.path)
    assert held is not None and HeldTape.take(file.path) is None
    held.close(remove=True)
    assert tapes_in(folder) == []


def test_a_reader_beside_the_writer_never_sees_half_a_record(folder: Path) -> None:
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(folder)], stdout=subprocess.PIPE)
    try:
        assert writer.stdout is not None and writer.stdout.readline() == b"begun\n"
        (file,) = tapes_in(folder)
        for _ in range(15):
            back = read_tape(file.path, FOREVER_NS)
            assert all(step.end_ns - step.start_ns == 900 for step in back.steps)
            assert all(span.start_ns == (span.step or 0) * 1000 for span in back.spans)
            assert all(counter.name == f"c{counter.time_ns // 1000 % 300}" for counter in back.counters)
            time.sleep(0.01)
    finally:
        writer.kill()
        writer.communicate()


def test_a_damaged_tape_gives_what_is_whole_and_says_what_is_not(folder: Path, tmp_path: Path) -> None:
    written = Tape(folder, "x-1-1", SMALL)
    try:
        record(written, incident(600))
        whole = bytearray(written.path.read_bytes())
    finally:
        written.close()
    broken = tmp_path / "broken"
    # A byte of a record in the second segment of steps.
    whole[HEADER_BYTES + SEGMENT_BYTES + 700] ^= 0xFF
    broken.write_bytes(whole)
    back = read_tape(broken, FOREVER_NS)
    assert 300 < len(back.steps) < 600 and any("damaged" in notice for notice in back.notices)
    for place in range(0, len(whole), len(whole) // 150):
        whole[place] ^= 0x55
        broken.write_bytes(whole)
        try:
            read_tape(broken, FOREVER_NS)
        except BadInput as error:
            assert str(error)
        whole[place] ^= 0x55
    for length in (0, 10, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + 100, len(whole) // 2):
        broken.write_bytes(whole[:length])
        try:
            assert len(read_tape(broken, FOREVER_NS).steps) < 600
        except BadInput:
            assert length < HEADER_BYTES


def test_what_is_no_tape_is_refused_in_words(tmp_path: Path) -> None:
    foreign, link = tmp_path / "foreign", tmp_path / "link"
    foreign.write_bytes(os.urandom(HEADER_BYTES))
    link.symlink_to(foreign)
    for path in (foreign, link, tmp_path, tmp_path / "none"):
        with pytest.raises(BadInput, match="cannot read the tape"):
            read_tape(path)
    later = bytearray(HEADER_BYTES)
    tape.HEAD.pack_into(later, 0, tape.MAGIC, 9, SEGMENT_BYTES, 5, 0)
    foreign.write_bytes(later)
    with pytest.raises(BadInput, match="format 9"):
        read_tape(foreign)


def test_records_that_do_not_fit_are_counted_and_harm_nothing(folder: Path) -> None:
    written = Tape(folder, "x-1-1", SMALL)
    try:
        written.add_step(Step("v", 0, 0, 2**70, 1, 2))
        written.add_span(Span(("p",), "x" * 70_000, 1, 2))
        written.add_span(Span(("p",), "call", 1, 2, None, (("k", "v" * 70_000),)))
        written.add_counter(Counter(("m",), "c", 2**66, 1.0))
        written.write_meta({"long": "x" * 100_000})
        written.add_step(Step("v", 0, 0, 7, 1, 2))
        assert written.refused == 5
        back = read_tape(written.path, FOREVER_NS)
        assert [step.step for step in back.steps] == [7] and back.meta == {} and not back.notices
    finally:
        written.close()


@pytest.mark.root
def test_without_room_a_smaller_tape_is_made_or_none_and_it_is_said(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(small)], check=False)
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        written = Tape(small, "x-1-1", (8 << 20, 2 << 20))
        assert written.size < 3 << 20
        with pytest.raises(PrismError, match="No space left"):
            Tape(small, "x-1-1", (8 << 20, 4 << 20))
        written.close()
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_the_folder_is_this_users_alone() -> None:
    folder = tape_folder()
    seen = folder.lstat()
    assert seen.st_uid == os.geteuid() and seen.st_mode & 0o777 == 0o700


def test_a_flight_recorder_hands_everything_to_its_tape(folder: Path) -> None:
    made = incident(50)
    recorder = FlightRecorder()
    recorder.tape = Tape(folder, "x-1-1", SMALL)
    try:
        expected = {step.step: ms for step, ms in zip(made.steps, made.expected_ms or []) if ms is not None}
        recorder.add(made.window, expected)
        back = read_tape(recorder.tape.path, FOREVER_NS)
    finally:
        recorder.tape.close()
    assert (back.steps, back.spans, back.counters) == (made.steps, made.spans, made.counters)
    assert back.expected_ms == made.expected_ms


def test_a_copy_of_a_dead_watcher_does_not_keep_its_tape(tmp_path: Path) -> None:
    """As one that packs a capture at low priority, long after the watcher itself was killed."""
    told_fd, tell_fd = os.pipe()
    watcher = os.fork()
    if watcher == 0:
        tape = Tape(tmp_path, "vllm-1-1")
        copy = os.fork()
        if copy == 0:
            os.closerange(3, tell_fd)
            os.closerange(tell_fd + 1, 1 << 16)
            os.write(tell_fd, f"{os.getpid()}\n".encode())
            time.sleep(60)
            os._exit(0)
        time.sleep(60)
        os._exit(int(tape.refused))
    copy = int(os.read(told_fd, 20))
    (path,) = tmp_path.glob("*.tape")
    assert HeldTape.take(path) is None
    os.kill(watcher, signal.SIGKILL)
    os.waitpid(watcher, 0)
    held = HeldTape.take(path)
    os.kill(copy, signal.SIGKILL)
    os.close(told_fd)
    os.close(tell_fd)
    assert held is not None
    held.close()
