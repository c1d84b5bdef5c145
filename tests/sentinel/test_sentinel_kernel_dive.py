"""Kernels in a capture: a window in a process with a stand-in for PyTorch, refusals, and whose turn it is."""

from __future__ import annotations

import json
import mmap
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from latencyprism.errors import TargetRefused
from latencyprism.recorder import Capture, read_capture
from latencyprism.records import Span, Step
from latencyprism.records.device_spans import is_kernel, is_launch
from latencyprism.sentinel import kernel_dive
from latencyprism.sentinel.habit import Habit
from latencyprism.sentinel.kernel_dive import KernelDives, Turn
from latencyprism.sentinel.replica_watch import KERNELS_EXCUSE, ReplicaWatch
from latencyprism.xpu.symbols import accelerators_of

MS, S = 1_000_000, 1_000_000_000
ENGINE = str(files("latencyprism.lab").joinpath("inside", "made_up_engine.py"))
SCRIPT = str(Path(__file__).with_name("sentinel_gpu_engine.py"))
Start = Callable[..., int]

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs uid 0 to attach")


@pytest.fixture
def library(tmp_path: Path) -> str:
    """A file that is called as the CUDA runtime is, with nothing in it that is worth a probe."""
    found = next(
        line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libc.so" in line
    )
    copied = tmp_path / "libcudart.so.13"
    copied.write_bytes(Path(found).read_bytes())
    return str(copied)


@pytest.fixture
def start(tmp_path: Path, library: str) -> Iterator[Start]:
    """Starts a made-up engine with a stand-in for PyTorch; ends all that were started."""
    started = []

    def begin(mode: str, *, mapped: bool = True) -> int:
        environment = {**os.environ, **({"ENGINE_LIBRARY": library} if mapped else {})}
        process = subprocess.Popen(
            [sys.executable, SCRIPT, mode, ENGINE, "thread", str(tmp_path / "steps")],
            stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        started.append(process)
        assert process.stdout is not None and process.stdout.readline().strip() == "ready"
        return process.pid

    yield begin
    for process in started:
        assert process.poll() is None, "a target must outlive what is done to it"
        process.kill()
        process.communicate()


def dives_of(*pids: int, step_ns: int | None = 10 * MS, apart_s: float = 0.0) -> KernelDives:
    return KernelDives(dict.fromkeys(pids, "Worker"), lambda: step_ns, Turn(apart_s))


def dive(dives: KernelDives, *, seconds: float = 20.0) -> kernel_dive.KernelDive:
    """To its end, or for so long."""
    begun = dives.begin(time.monotonic_ns() + int(seconds * 1e9), after_s=0.05)
    begun._thread.join(seconds)
    begun.finish()
    return begun


# -- what is seen -----------------------------------------------------------------------------------


@pytest.mark.root
@needs_root
def test_a_window_of_five_steps_is_seen_of_each_worker_one_after_the_other(start: Start) -> None:
    pids = [start("engine"), start("engine")]
    dives = dives_of(*pids)
    begun = dive(dives)
    assert begun.missing == []
    told = begun.told()
    assert told.missing == [] and [each["process"] for each in told.meta] == [f"Worker {pid}" for pid in pids]
    first, second = told.meta
    assert first["framework"] == "torch 9.9" and 50 <= first["window_ms"] < 1000
    assert first["moments"]["done"] < second["moments"]["preparing"], "never two at once"
    assert [each["name"].partition("(")[0] for each in first["longest"]] == [
        "void at::native::vectorized_elementwise_kernel<4, float>",
        "ncclDevKernel_AllReduce_Sum_bf16_RING_LL",
    ]  # fmt: skip
    assert first["collectives"][0]["name"] == "all_reduce"
    assert first["collectives"][0]["calls"] == first["count"] // 10
    kernels = [span for span in told.spans if is_kernel(span)]
    assert {span.track for span in kernels} == {(f"GPU 0 (Worker {pid})", "stream 7") for pid in pids}
    assert sum(each["count"] for each in told.meta) == len(kernels)
    calls = [span for span in told.spans if is_launch(span)]
    assert len(calls) == len(kernels) and {span.name for span in calls} == {"cudaLaunchKernel"}
    (window, _) = told.windows
    assert window.start_ns == first["moments"]["started"] and window.end_ns == first["moments"]["stopping"]
    busy = window.busy[f"GPU 0 (Worker {pids[0]})"]
    assert busy.within_ns(window.start_ns, window.start_ns + 10 * MS) == pytest.approx(6 * MS, rel=0.05)


@pytest.mark.root
@needs_root
@pytest.mark.parametrize(
    ("mode", "mapped", "why"),
    [
        ("cpu", True, "no accelerator at work"),
        ("none", True, "no PyTorch is loaded"),
        ("busy", True, "a profiler is already at work"),
        ("engine", False, "no accelerator's runtime"),
    ],
)
def test_what_cannot_be_seen_is_told_with_the_reason(
    start: Start, mode: str, mapped: bool, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = start(mode, mapped=mapped)
    if not mapped:
        monkeypatch.setattr(kernel_dive, "capture_kernels", lambda *_, **__: pytest.fail("it was entered"))
    begun = dive(dives_of(pid))
    (text,) = begun.missing
    assert text.startswith(f"kernels of Worker {pid}: ") and why in text
    assert begun.told() == kernel_dive.Told()


@pytest.mark.root
@needs_root
def test_one_that_does_not_come_to_its_end_holds_up_nobody(start: Start) -> None:
    pid = start("slow")
    dives = dives_of(pid)
    begun = dives.begin(time.monotonic_ns() + 10 * S, after_s=0.0)
    until = time.monotonic() + 10
    while not dives._stretches and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.7)
    at = time.monotonic()
    begun.finish()
    begun.finish()
    assert time.monotonic() - at < 1.0
    begun._thread.join(10)
    assert any("was not waited for to the end (last: preparing)" in text for text in begun.missing)
    assert begun.told().spans == []
    assert dives.turn.take() == "", "its turn is over"


def test_a_capture_that_ends_before_has_none() -> None:
    dives = dives_of(os.getpid())
    begun = dives.begin(time.monotonic_ns() + S, after_s=5.0)
    begun.finish()
    assert begun.missing == ["kernels: the capture was over before they were recorded"]
    late = dive(dives_of(os.getpid(), step_ns=S), seconds=0.3)
    assert late.missing == [
        f"kernels of Worker {os.getpid()}: the capture was over before they were recorded"
    ]


def test_a_process_that_is_gone_is_told() -> None:
    begun = dive(dives_of(1 << 22))
    assert len(begun.missing) == 1 and begun.missing[0].startswith(f"kernels of Worker {1 << 22}: ")


class Windows:
    """In place of ``capture_kernels``: how many are open at once."""

    def __init__(self) -> None:
        self.open = self.most = 0
        self.lengths: list[float] = []

    def __call__(self, pid: int, window_s: float, **_: Any) -> Any:
        self.open += 1
        self.most = max(self.most, self.open)
        self.lengths.append(window_s)
        time.sleep(0.2)
        self.open -= 1
        raise TargetRefused("no", "a stand-in refuses")


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> Windows:
    made = Windows()
    monkeypatch.setattr(kernel_dive, "capture_kernels", made)
    monkeypatch.setattr(kernel_dive, "accelerators_of", lambda pid: frozenset({"nvidia"}))
    return made


def test_never_two_at_once_and_then_five_minutes_none(windows: Windows) -> None:
    turn = Turn(300.0)
    one, other = (KernelDives({pid: "engine"}, lambda: 1 * MS, turn) for pid in (1, 2))
    until_ns = time.monotonic_ns() + 10 * S
    dives = [one.begin(until_ns, after_s=0.0), other.begin(until_ns, after_s=0.1)]
    for begun in dives:
        begun._thread.join(10)
    assert dives[1].missing == ["kernels: another capture records them"]
    again = dive(other)
    assert again.missing == ["kernels: they were recorded less than 5 minutes ago"]
    assert windows.most == 1 and len(windows.lengths) == 1


def test_what_was_refused_before_anything_was_begun_costs_no_turn(
    windows: Windows, monkeypatch: pytest.MonkeyPatch
) -> None:
    dives = dives_of(7, apart_s=300.0)
    monkeypatch.setattr(kernel_dive, "accelerators_of", lambda pid: frozenset())
    assert "no accelerator's runtime" in dive(dives).missing[0]
    monkeypatch.setattr(kernel_dive, "accelerators_of", lambda pid: frozenset({"amd"}))
    assert "a stand-in refuses" in dive(dives).missing[0]
    assert "less than 5 minutes" in dive(dives).missing[0]


@pytest.mark.parametrize(
    ("step_ns", "window_s"), [(None, 0.1), (1 * MS, 0.02), (20 * MS, 0.1), (900 * MS, 0.25)]
)
def test_a_window_is_five_usual_steps_within_its_bounds(
    windows: Windows, step_ns: int | None, window_s: float
) -> None:
    dive(dives_of(7, step_ns=step_ns))
    assert windows.lengths == [pytest.approx(window_s)]


def test_workers_alone_where_there_are_any() -> None:
    def processes(roles: dict[int, str]) -> dict[int, str]:
        return KernelDives(roles, lambda: None, Turn()).processes

    assert processes({1: "EngineCore", 2: "Worker", 3: "Worker"}) == {2: "Worker 2", 3: "Worker 3"}
    assert processes({1: "engine+worker"}) == {1: "engine+worker 1"}


# -- how long a step usually takes, and steps beside a profiler --------------------------------------


def test_the_habit_knows_the_length_of_a_step_from_the_first_on() -> None:
    habit = Habit()
    assert habit.step_ns is None
    for number, (length, gap) in enumerate([(10, 1), (12, None), (90, 1), (10, 2)]):
        at = number * S
        habit.take(Step("vllm", 0, 0, number, at, at + length * MS, gap_ns=gap and gap * MS))
    assert habit.step_ns == 12 * MS


def test_steps_beside_the_profiler_are_no_news() -> None:
    watch = object.__new__(ReplicaWatch)
    watch._dives = deque(maxlen=4)
    watch.operators = None
    watch.kernels = dives = dives_of(1)
    stretch = kernel_dive._Stretch(1000)
    dives.at_work(stretch)

    def excuse(start_ns: int, end_ns: int) -> float:
        return watch._excuse(Step("vllm", 0, 0, 1, start_ns, end_ns))

    assert excuse(0, 1000) == 0.0 and excuse(0, 1001) == KERNELS_EXCUSE
    assert excuse(10**12, 10**12 + 1) == KERNELS_EXCUSE, "nobody knows yet when it ends"
    stretch.end_ns = 2000
    assert excuse(2001, 3000) == KERNELS_EXCUSE, "what it held up may take longer"
    assert excuse(2000 + kernel_dive.SETTLE_NS, 10**12) == 0.0


# -- the whole way ----------------------------------------------------------------------------------


def test_an_accelerator_is_known_by_the_names_of_mapped_files(library: str) -> None:
    before = accelerators_of(os.getpid())
    with (
        open(library, "rb") as file,
        mmap.mmap(file.fileno(), 4096, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_EXEC),
    ):
        assert accelerators_of(os.getpid()) == before | {"nvidia"}
    assert accelerators_of(os.getpid()) == before


def recorded(pid: int, path: Path, *more: str) -> Capture:
    command = [sys.executable, "-m", "latencyprism", "record", "-p", str(pid), "-o", str(path), "--json"]
    done = subprocess.run([*command, *more], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["capture"] == str(path)
    return read_capture(path)


@pytest.mark.root
@needs_root
def test_record_with_kernels(start: Start, tmp_path: Path) -> None:
    """Beside others that burn every core a step may be longer than five usual ones: then once more."""
    pid = start("engine")
    for attempt in range(4):
        time.sleep(0.3)
        capture = recorded(pid, tmp_path / f"{attempt}.pftrace", "-d", "4s", "--kernels")
        missing = [text for text in capture.meta["not_available"] if text.startswith("kernels")]
        assert missing == []
        if _judged(capture):
            return
    pytest.fail("no step lay in any window")


def _judged(capture: Capture) -> bool:
    """Is the window what it says? True if a step at least lay wholly in it."""
    (window,) = capture.meta["kernels"]
    begun_ns, ended_ns = window["moments"]["started"], window["moments"]["stopping"]
    after_s = (begun_ns - capture.meta["deep_probe"]["armed_ns"]) / 1e9
    assert 0.3 < after_s < 4.0 and window["window_ms"] <= 1000
    kernels = [span for span in capture.spans if is_kernel(span)]
    assert len(kernels) == window["count"] > 100
    inside = [s for s in capture.steps if begun_ns <= s.start_ns and s.end_ns <= ended_ns]
    for step in capture.steps:
        if step in inside:
            assert step.xpu_busy_ns is not None
            assert 0.4 < step.xpu_busy_ns / step.duration_ns < 0.75, "the device runs 60 of 100 us"
        else:
            assert step.xpu_busy_ns is None
    return bool(inside)


@pytest.mark.root
@needs_root
def test_watch_with_kernels_records_them_when_asked_and_not_again_so_soon(
    start: Start, tmp_path: Path
) -> None:
    pid = start("engine")
    command = [sys.executable, "-m", "latencyprism", "watch", "--json", "--no-state", "--kernels"]
    watch = subprocess.Popen(
        [*command, "-p", str(pid), "-o", str(tmp_path / "c")], stdout=subprocess.PIPE, text=True
    )
    written: list[str] = []
    asked: list[str] = []
    try:
        assert watch.stdout is not None
        for line in watch.stdout:
            told = json.loads(line)
            if told["event"] == "asked" and told["capture"]:
                asked.append(told["capture"])
            elif told["event"] == "capture":
                written.append(told["path"])
            if len(asked) == 2 and set(asked) <= set(written):
                break
            # One that the machine's own restlessness began would refuse ours: ask again.
            refused = told["event"] == "asked" and not told["capture"]
            if told["event"] == "attached" or refused or told.get("path") in asked:
                time.sleep(1.0)
                os.kill(watch.pid, signal.SIGUSR1)
    finally:
        watch.kill()
        watch.communicate()
    assert len(asked) == 2, "the watch ended before"
    told_of = [capture.meta for capture in map(read_capture, written) if capture.meta["kernels"]]
    assert len(told_of) == 1 and told_of[0]["kernels"][0]["count"] > 100
    last = read_capture(asked[1]).meta
    assert last["kernels"] is None
    assert "kernels: they were recorded less than 5 minutes ago" in last["not_available"]


@pytest.mark.root
@needs_root
def test_record_without_being_asked_enters_no_profiler(start: Start, tmp_path: Path) -> None:
    capture = recorded(start("engine"), tmp_path / "plain.pftrace", "-d", "1500ms")
    assert capture.meta["kernels"] is None and not any(map(is_kernel, capture.spans))
    assert not [text for text in capture.meta["not_available"] if "kernels" in text]
    assert all(step.xpu_busy_ns is None for step in capture.steps)


@pytest.mark.parametrize(
    "arguments",
    [
        ("record", "-p", "1", "--kernels", "--no-deep"),
        ("watch", "--kernels", "--no-deep"),
        ("watch", "--kernels", "--no-capture"),
    ],
)
def test_options_that_contradict_each_other_are_refused(arguments: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "latencyprism", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and "--kernels does not go with" in done.stderr


def test_what_was_told_badly_is_missing_and_the_rest_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = dives_of(1).begin(0, after_s=60.0)
    begun.finish()

    class Bad:
        @property
        def events(self) -> list[Span]:
            raise TargetRefused("cannot", "what it told is not of the expected form")

    begun._seen.append(("Worker 1", Bad()))  # type: ignore[arg-type]
    told = begun.told()
    assert told.spans == [] and told.missing == [
        "kernels of Worker 1: what it told is not of the expected form"
    ]
