"""The late capture against a stand-in for PyTorch: what comes back, what is refused, what is left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from latencyprism.errors import TargetRefused
from latencyprism.xpu.kernels import capture_kernels

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs uid 0 to attach"),
]


@contextmanager
def target(mode: str) -> Iterator[int]:
    script = Path(__file__).with_name("xpu_fake_torch.py")
    with subprocess.Popen([sys.executable, str(script), mode], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "ready\n"
        try:
            yield process.pid
            if mode != "ends":
                assert process.poll() is None, "the target must outlive it"
        finally:
            process.kill()


def leftovers() -> list[str]:
    return [name for name in os.listdir("/dev/shm") if name.startswith("lprism-") and name.endswith(".out")]


def test_events_come_back_on_the_monotonic_clock_and_nothing_is_left() -> None:
    with target("cuda") as pid:
        threads = len(os.listdir(f"/proc/{pid}/task"))
        before_ns = time.monotonic_ns()
        capture = capture_kernels(pid, 0.05)
        after_ns = time.monotonic_ns()
        assert len(capture.events) == 1000 and capture.left_out == 0
        first = capture.events[0]
        assert (first.name, first.device_kind, first.lane) == ("kernel_0", "CUDA", 7)
        assert before_ns < first.start_ns < first.end_ns == first.start_ns + 500 < after_ns
        moments = capture.moments
        assert 0.05e9 <= moments["stopping"] - moments["started"] < 5e9
        assert capture.framework == "torch 9.9"
        until = time.monotonic() + 5
        while len(os.listdir(f"/proc/{pid}/task")) > threads and time.monotonic() < until:
            time.sleep(0.05)
        assert len(os.listdir(f"/proc/{pid}/task")) == threads
        again = capture_kernels(pid, 0.02, most_events=150)
        assert len(again.events) == 150 and again.left_out == 850
    assert not leftovers()


@pytest.mark.parametrize(
    ("mode", "why"),
    [
        ("none", "no PyTorch is loaded"),
        ("cpu", "no accelerator at work"),
        ("busy", "a profiler is already at work"),
        ("raises", "ValueError"),
        ("ends", "it ended"),
    ],
)
def test_what_cannot_be_captured_is_refused_with_the_reason(mode: str, why: str) -> None:
    with target(mode) as pid, pytest.raises(TargetRefused) as refused:
        capture_kernels(pid, 0.3)
    assert why in refused.value.why and "secret" not in str(refused.value)
    assert not leftovers()


def test_a_slow_profiler_is_given_up_in_time() -> None:
    with target("slow") as pid:
        begun = time.monotonic()
        with pytest.raises(TargetRefused, match="did not come to an end in time"):
            capture_kernels(pid, 0.05, timeout_s=0.5)
        assert time.monotonic() - begun < 6.0


def test_windows_are_bounded() -> None:
    with pytest.raises(ValueError, match="up to 1"):
        capture_kernels(os.getpid(), 5.0)
