from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sentinel_stepping import Stepping, alert_of, watch_of_this_process

from latencyprism.attach.process import read_process
from latencyprism.cli import record
from latencyprism.cli.main import main
from latencyprism.engines.discovery import Member, Replica
from latencyprism.recorder import Capture, read_capture, write_raw
from latencyprism.recorder.leftovers import leftovers
from latencyprism.recorder.tape_reading import HeldTape, TapeFile, read_tape, tapes_in
from latencyprism.records import Step
from latencyprism.sentinel import flight_tape, recovery
from latencyprism.sentinel.incident_capture import IncidentCapture
from latencyprism.sentinel.recovery import Recovery, recovered, sweep
from latencyprism.sentinel.replica_watch import ReplicaWatch
from latencyprism.sentinel.targets import Attachment

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Tapes of these tests lie apart from those of others."""
    folder = tmp_path / "tapes"
    folder.mkdir(mode=0o700)
    monkeypatch.setattr(flight_tape, "tape_folder", lambda: folder)
    monkeypatch.setattr(recovery, "tape_folder", lambda: folder)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), *sys.path]))
    yield folder


def killed_watch(
    tapes: Path, captures: Path, until: str, wait_s: float, before_s: float = 0.6, after_s: float = 0.6
) -> float:
    """A watcher that is killed ``wait_s`` after it said ``until``; when that was (CLOCK_MONOTONIC)."""
    code = (
        "import sys, pathlib, sentinel_stepping as s; from latencyprism.sentinel import flight_tape;"
        f"flight_tape.tape_folder = lambda: pathlib.Path({str(tapes)!r});"
        f"s.main(pathlib.Path({str(captures)!r}), {before_s}, {after_s})"
    )
    watcher = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert watcher.stdout is not None
    while (line := watcher.stdout.readline().strip()) != until:
        assert line, "the watcher ended by itself"
    time.sleep(wait_s)
    killed_at = time.monotonic()
    os.kill(watcher.pid, signal.SIGKILL)
    watcher.communicate()
    return killed_at


def gone_on(attendant: Recovery, seconds: float = 60.0) -> list[dict[str, object]]:
    """Ticks until it has nothing more to do; the events it emitted."""
    events: list[dict[str, object]] = []
    attendant.emit = lambda kind, **values: events.append({"event": kind, **values})
    until = time.monotonic() + seconds
    attendant.tick(time.monotonic_ns())
    while attendant._jobs and time.monotonic() < until:
        time.sleep(0.05)
        attendant.tick(time.monotonic_ns())
    return events


def attached(captures: Path | None) -> Recovery:
    attendant = Recovery(captures)
    watch = watch_of_this_process()
    attendant.attached(watch)
    watch.close()
    return attendant


@pytest.mark.parametrize(
    ("until", "wait_s"), [("watching", 0.5), ("capturing", 0.0), ("capturing", 0.4), ("writing", 0.0)]
)
def test_whatever_the_moment_of_the_kill_the_next_watch_makes_a_capture_of_what_was_seen(
    own_folder: Path, tmp_path: Path, until: str, wait_s: float
) -> None:
    captures = tmp_path / "captures"
    captures.mkdir()
    killed_at = killed_watch(own_folder, captures, until, wait_s)
    (event,) = gone_on(attached(captures))
    assert event["event"] == "salvaged" and event["engine"] == "vllm"
    back = read_capture(str(event["path"]))
    numbers = [step.step for step in back.steps]
    assert numbers == list(range(1, numbers[-1] + 1)), "from the first step on, without a hole"
    assert 0 <= killed_at - back.steps[-1].end_ns / 1e9 < 0.35
    assert back.counters and back.meta["recovered"]["until_ns"] == back.steps[-1].end_ns
    assert bool(back.alerts) == (until != "watching") == (back.meta.get("onset_ns") is not None)
    assert tapes_in(own_folder) == [], "it was made into a capture once"
    assert any("killed" in text for text in back.meta["not_available"])


def test_a_capture_that_was_being_written_is_written_without_its_watcher(
    own_folder: Path, tmp_path: Path
) -> None:
    captures = tmp_path / "captures"
    captures.mkdir()
    killed_watch(own_folder, captures, "writing", 0.0)
    until = time.monotonic() + 60
    while not (captures / "5e8b3c1d.pftrace").exists() and time.monotonic() < until:
        time.sleep(0.1)
    back = read_capture(captures / "5e8b3c1d.pftrace")
    assert back.alerts[0].id == "5e8b3c1d" and back.steps and not back.notices


def test_an_ordinary_end_leaves_no_tape_and_a_running_watch_keeps_its_own(
    own_folder: Path, tmp_path: Path
) -> None:
    watch = watch_of_this_process()
    (file,) = tapes_in(own_folder)
    assert file.live and file.pid == os.getpid() and file.engine_runs
    time.sleep(0.05)
    watch.poll()
    assert [step.step for step in read_tape(file.path).steps][:2] == [1, 2]
    attendant = Recovery(tmp_path)
    attendant.attached(watch)
    assert gone_on(attendant) == [] and file.path.exists()
    watch.close()
    assert tapes_in(own_folder) == []


def test_a_tape_of_an_engine_that_runs_on_waits_for_its_own_watch(own_folder: Path, tmp_path: Path) -> None:
    engine = subprocess.Popen(["sleep", "60"])
    try:
        start = Path(f"/proc/{engine.pid}/stat").read_text().rpartition(")")[2].split()[19]
        stranger = own_folder / f"vllm-{engine.pid}-{start}-00000001.tape"
        other = own_folder / "transformers-4194000-7-00000002.tape"
        for path in (stranger, other):
            path.write_bytes(b"")
        assert gone_on(attached(tmp_path)) == []
        assert stranger.exists() and other.exists()
    finally:
        engine.kill()
        engine.wait()
    gone_on(attached(tmp_path))
    assert not stranger.exists(), "of an engine that has ended since, and empty"
    assert other.exists()


def test_without_a_folder_for_captures_tapes_are_kept_and_told(own_folder: Path, tmp_path: Path) -> None:
    killed_watch(own_folder, tmp_path, "watching", 0.1)
    told: list[str] = []
    attendant = attached(None)
    attendant.say = told.append
    assert gone_on(attendant) == []
    assert len(tapes_in(own_folder)) == 1 and "record --recover" in told[0]


def test_a_folder_that_cannot_be_written_keeps_the_tape(own_folder: Path, tmp_path: Path) -> None:
    killed_watch(own_folder, tmp_path, "watching", 0.1)
    (event,) = gone_on(attached(tmp_path / "none" / "such"))
    assert "No such file" in str(event["error"]) and len(tapes_in(own_folder)) == 1


def test_stale_tapes_are_swept_and_live_ones_are_not(own_folder: Path) -> None:
    watch = watch_of_this_process()
    (live,) = tapes_in(own_folder)
    dead = own_folder / "vllm-1-1-00000001.tape"
    fresh = own_folder / "vllm-1-1-00000002.tape"
    for path in (dead, fresh):
        path.write_bytes(b"")
    for path in (dead, live.path):
        os.utime(path, (1, 1))
    assert sweep(tapes_in(own_folder)) == 1
    assert not dead.exists() and fresh.exists() and live.path.exists()
    watch.close()


def test_a_link_or_a_foreign_name_is_no_tape(own_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    (own_folder / "vllm-1-1-0000000a.tape").symlink_to(tmp_path / "secret")
    (own_folder / "vllm.tape").write_text("x")
    assert tapes_in(own_folder) == []
    assert HeldTape.take(own_folder / "vllm-1-1-0000000a.tape") is None


def test_an_empty_tape_is_refused_in_words(own_folder: Path) -> None:
    watch = watch_of_this_process()
    with pytest.raises(Exception, match="nothing to recover"):
        recovered(tapes_in(own_folder)[0].path)
    watch.close()


def test_raw_files_that_nobody_works_on_become_captures(own_folder: Path, tmp_path: Path) -> None:
    steps = [Step("vllm", 0, 0, n, n * 1000, n * 1000 + 900) for n in range(2500)]
    raw = tmp_path / ".a.pftrace.abcdefgh.raw"
    write_raw(raw, Capture(steps=steps))
    half = tmp_path / "..b.pftrace.abcdefgh.raw.4194000-0123abcd.part"
    half.write_bytes(raw.read_bytes()[:-40])
    useless = tmp_path / ".c.pftrace.4194000-0123abcd.part"
    empty = tmp_path / ".d.pftrace.abcdefgh.raw"
    mine = tmp_path / f".e.pftrace.{os.getpid()}-0123abcd.part"
    for path in (useless, empty):
        path.write_bytes(b"x" if path is useless else b"")
    mine.write_bytes(b"x")
    assert leftovers(tmp_path) == [], "they may be somebody's still"
    for path in (raw, half, useless, empty, mine):
        os.utime(path, (1, 1))
    found = {left.out.name: left.raw for left in leftovers(tmp_path)}
    assert found == {"a.pftrace": raw, "b.pftrace": half}
    assert not useless.exists() and not empty.exists()
    gone_on(attached(tmp_path))
    assert read_capture(tmp_path / "a.pftrace").steps == steps
    cut = read_capture(tmp_path / "b.pftrace")
    assert cut.steps == steps[:2000] and "2000 of 2500 steps" in str(cut.meta["recovered"])
    assert not raw.exists() and not half.exists()


def test_who_a_tape_belongs_to_is_read_from_its_name() -> None:
    own = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
    assert TapeFile(Path("x"), "vllm", os.getpid(), int(own)).engine_runs
    assert not TapeFile(Path("x"), "vllm", os.getpid(), int(own) + 1).engine_runs


def test_recover_writes_it_at_once_and_only_once(
    own_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(record, "tape_folder", lambda: own_folder)
    out = tmp_path / "back.pftrace"
    assert main(["record", "--recover", "-o", str(out)]) == 2
    assert "no watcher that was killed" in capsys.readouterr().err
    killed_watch(own_folder, tmp_path, "capturing", 0.2)
    assert main(["record", "--recover", "-o", str(tmp_path / "none" / "x")]) == 2
    assert len(tapes_in(own_folder)) == 1
    assert main(["record", "--recover", "-o", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    back = read_capture(out)
    assert told["steps"] == len(back.steps) > 30 and back.verdict is not None
    assert tapes_in(own_folder) == []
    watch = watch_of_this_process()
    assert main(["record", "--recover", "-p", str(os.getpid())]) == 2
    assert "still runs" in capsys.readouterr().err
    watch.close()
    assert main(["record"]) == 2
    assert "no process was named" in capsys.readouterr().err


def test_an_engine_that_ends_in_the_middle_of_a_deep_look_leaves_a_capture_that_opens(tmp_path: Path) -> None:
    engine = subprocess.Popen([sys.executable, "-c", "while True: sum(range(9999))"])
    try:
        replica = Replica("vllm", 0, (Member(read_process(engine.pid), "engine"),), "0.0")
        watch = ReplicaWatch(Attachment(replica, Stepping(), [], None))
        time.sleep(0.3)
        watch.poll()
        capture = IncidentCapture(watch, None, tmp_path / "a.pftrace", after_s=30.0, deep=True)
        capture.step(time.monotonic_ns())
        time.sleep(0.3)
    finally:
        engine.kill()
        engine.wait()
    watch.poll()
    watch.sample_host(time.monotonic_ns())
    capture.step(time.monotonic_ns())
    capture.abandon()
    watch.close()
    assert capture.result is not None and not capture.result.get("error"), capture.result
    back = read_capture(tmp_path / "a.pftrace")
    assert len(back.steps) > 40 and not back.notices
    assert back.meta["deep_probe"]["disarmed_ns"] - back.meta["deep_probe"]["armed_ns"] < 20_000_000_000


def test_a_capture_begins_with_the_earliest_of_its_alerts_not_with_the_last_stall_in_it(
    tmp_path: Path,
) -> None:
    watch = watch_of_this_process()
    time.sleep(0.2)
    watch.poll()
    assert watch.last_step is not None
    alert = alert_of(watch.last_step)
    watch.onset_ns = begun_ns = watch.last_step.start_ns
    capture = IncidentCapture(watch, alert, tmp_path / "a.pftrace", after_s=30.0, deep=False)
    time.sleep(0.1)
    watch.poll()
    watch.onset_ns = watch.last_step.start_ns
    capture.add_alert(alert_of(watch.last_step, "6f9c4d2e"))
    capture.abandon()
    watch.close()
    meta = read_capture(tmp_path / "a.pftrace").meta
    assert watch.onset_ns > begun_ns == meta["onset_ns"] >= meta["begun_ns"]


def test_a_missed_objective_begins_now_where_no_step_was_late() -> None:
    watch = watch_of_this_process()
    time.sleep(0.1)
    watch.poll()
    assert watch.last_step is not None
    watch.onset_ns = 5
    alert = alert_of(watch.last_step)
    assert watch.onset_of(alert) == 5
    alert.kind = "slo"
    assert watch.onset_of(alert) == watch.last_step.end_ns
    watch.detector.incident_open = True
    assert watch.onset_of(alert) == 5
    watch.close()


def test_a_captures_steps_reach_to_its_end_though_the_watch_holds_them_for_half_a_second(
    tmp_path: Path,
) -> None:
    watch = watch_of_this_process()
    watch.hand_on(time.monotonic_ns())
    time.sleep(0.25)
    watch.look()
    assert watch.hand_on(time.monotonic_ns())[0].steps == []
    capture = IncidentCapture(watch, None, tmp_path / "a.pftrace", after_s=0.2, deep=False)
    until = time.monotonic() + 20.0
    while capture.result is None and time.monotonic() < until:
        time.sleep(0.01)
        watch.look()
        watch.hand_on(time.monotonic_ns())
        capture.step(time.monotonic_ns())
    watch.close()
    assert capture.result is not None and not capture.result.get("error"), capture.result
    steps = read_capture(tmp_path / "a.pftrace").steps
    assert capture.until_ns - steps[-1].end_ns < 60_000_000
