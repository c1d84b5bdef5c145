from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from recorder_samples import incident, verdict

from latencyprism.errors import BadInput
from latencyprism.recorder import Capture, read_capture, write_raw
from latencyprism.recorder.deferred import CaptureJob
from latencyprism.recorder.write import find_finish, finished

FINISHERS = """
import time
from recorder_samples import verdict
def diagnose(capture):
    capture.verdict = verdict()
    return capture
def fail(capture):
    raise RuntimeError("no diagnosis today")
def sleep(capture):
    time.sleep(60)
"""


@pytest.fixture()
def finishers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "finishers_for_test.py").write_text(FINISHERS)
    here = Path(__file__).parent
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "lib"), str(here), *sys.path]))


def undiagnosed(steps: int = 60) -> Capture:
    capture = incident(steps)
    capture.verdict = None
    return capture


def only_file(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_file())


def test_a_job_writes_the_capture_with_its_verdict_and_leaves_nothing_else(
    tmp_path: Path, finishers: None
) -> None:
    out = tmp_path / "a.pftrace"
    job = CaptureJob(out, undiagnosed, finish="finishers_for_test:diagnose")
    assert job.wait(30) is not None and job.result is not None
    assert job.result["path"] == str(out) and job.result["steps"] == 60
    assert job.result["bytes"] == out.stat().st_size
    assert job.verdict == job.result["verdict"] == verdict().to_dict()
    expected = undiagnosed()
    expected.verdict = verdict()
    assert read_capture(out) == expected
    assert only_file(tmp_path) == ["a.pftrace"]
    assert job.pid is None and job.poll() == job.result


def test_the_copy_steps_aside_before_it_packs(tmp_path: Path) -> None:
    def make() -> Capture:
        capture = undiagnosed()
        capture.meta["nice"] = os.getpriority(os.PRIO_PROCESS, 0)
        return capture

    before = os.getpriority(os.PRIO_PROCESS, 0)
    assert CaptureJob(tmp_path / "a.pftrace", make).wait(30) is not None
    assert read_capture(tmp_path / "a.pftrace").meta["nice"] == max(before, 10)
    assert os.getpriority(os.PRIO_PROCESS, 0) == before


def test_polling_alone_brings_it_to_its_end(tmp_path: Path) -> None:
    job = CaptureJob(tmp_path / "a.pftrace", lambda: undiagnosed(2500))
    until = time.monotonic() + 60
    longest = 0.0
    while time.monotonic() < until:
        began = time.thread_time()
        result = job.poll()
        longest = max(longest, time.thread_time() - began)
        if result is not None:
            break
        time.sleep(0.05)
    job.close()
    assert job.result is not None and job.result["path"], job.result
    assert longest < 0.25, "a watcher is never held up for long"


@pytest.mark.parametrize(
    ("function", "why"), [("fail", "no diagnosis today"), ("sleep", "took longer than 1")]
)
def test_a_diagnosis_that_fails_does_not_cost_the_capture(
    tmp_path: Path, finishers: None, function: str, why: str
) -> None:
    job = CaptureJob(tmp_path / "a.pftrace", undiagnosed, f"finishers_for_test:{function}", finish_seconds=1)
    result = job.wait(30)
    assert result is not None and why in result["finish_error"]
    assert read_capture(tmp_path / "a.pftrace") == undiagnosed()


def test_captures_are_written_one_after_the_other_and_verdicts_do_not_wait(
    tmp_path: Path, finishers: None
) -> None:
    turn = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(turn, fcntl.LOCK_EX)
    jobs = [CaptureJob(tmp_path / f"{n}.pftrace", undiagnosed, "finishers_for_test:diagnose") for n in "ab"]
    until = time.monotonic() + 30
    while any(job.verdict is None for job in jobs) and time.monotonic() < until:
        assert all(job.poll() is None for job in jobs)
        time.sleep(0.02)
    time.sleep(0.5)
    assert all(job.verdict is not None and job.poll() is None for job in jobs)
    os.close(turn)
    assert all(job.wait(30) is not None and job.result["bytes"] for job in jobs)  # type: ignore[index]
    assert only_file(tmp_path) == ["a.pftrace", "b.pftrace"]


def test_a_job_closed_half_way_leaves_no_file_and_no_process(tmp_path: Path, finishers: None) -> None:
    waiting = CaptureJob(tmp_path / "a.pftrace", undiagnosed)
    waiting.close()
    job = CaptureJob(tmp_path / "b.pftrace", undiagnosed, "finishers_for_test:sleep")
    pid = job.pid
    assert pid is not None
    job.close()
    assert job.result is not None and "ended with" in job.result["error"]
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert only_file(tmp_path) == []


def test_a_killed_writer_is_told_of_and_cleaned_up(tmp_path: Path, finishers: None) -> None:
    job = CaptureJob(tmp_path / "a.pftrace", undiagnosed, "finishers_for_test:sleep")
    assert job.pid is not None
    os.kill(job.pid, signal.SIGKILL)
    result = job.wait(10)
    assert result is not None and result["path"] is None and "-9" in result["error"]
    assert only_file(tmp_path) == []


def test_a_disk_that_refuses_is_a_result_not_an_exception(tmp_path: Path) -> None:
    job = CaptureJob(tmp_path / "none" / "a.pftrace", undiagnosed)
    assert job.poll() is not None and "No such file" in job.poll()["error"]  # type: ignore[index]
    job.close()
    missing = CaptureJob(tmp_path / "a.pftrace", undiagnosed, "no.such.module:diagnose").wait(30)
    assert missing is not None and "no.such.module" in missing["error"]


def test_the_writer_speaks_json_and_exits_with_a_code(tmp_path: Path) -> None:
    raw, out = tmp_path / "raw", tmp_path / "out"
    write_raw(raw, undiagnosed())
    command = [sys.executable, "-m", "latencyprism.recorder.write"]
    done = subprocess.run([*command, raw, out], capture_output=True, text=True)
    assert done.returncode == 0 and json.loads(done.stdout)["event"] == "capture"
    assert not raw.exists() and out.exists()
    failed = subprocess.run([*command, raw, out], capture_output=True, text=True)
    assert failed.returncode == 2 and "No such file" in json.loads(failed.stdout)["error"]


def test_a_capture_is_finished_even_when_nobody_listens_any_more(tmp_path: Path, finishers: None) -> None:
    raw, out = tmp_path / "raw", tmp_path / "out"
    write_raw(raw, undiagnosed())
    heard, said = os.pipe()
    os.close(heard)
    command = [sys.executable, "-m", "latencyprism.recorder.write", raw, out]
    done = subprocess.run([*command, "--finish", "finishers_for_test:diagnose"], stdout=said)
    os.close(said)
    assert done.returncode == 0
    assert read_capture(out).verdict == verdict()


def test_what_finishes_must_be_named_rightly() -> None:
    for name in ("", "json", "json:", ":loads", "json:nothing", "json:__name__", "no_such_module:f"):
        with pytest.raises(BadInput):
            find_finish(name)
    assert find_finish("json:loads") is json.loads
    assert finished(undiagnosed(), lambda capture: None, 5)[1] == "it returned no capture"  # type: ignore[arg-type, return-value]


LOWERED = """
import pathlib
from latencyprism.recorder.idle import stand_back, step_aside
group = pathlib.Path("/proc/self/autogroup")
before = group.read_text()
step_aside(), stand_back()
print(before.split()[-1] == group.read_text().split()[-1])
"""


@pytest.mark.parametrize("own_session", [False, True])
def test_only_a_session_of_its_own_is_lowered(own_session: bool) -> None:
    if not Path("/proc/self/autogroup").exists():
        pytest.skip("this kernel does not group by session")
    done = subprocess.run(
        [sys.executable, "-c", LOWERED],
        capture_output=True, text=True, timeout=60, check=True, start_new_session=own_session,
    )  # fmt: skip
    assert done.stdout.strip() == str(not own_session)
