"""A process with a stand-in for PyTorch: ``xpu_fake_torch.py MODE``."""

from __future__ import annotations

import sys
import time
import types

MODE = sys.argv[1]


class Event:
    def __init__(self, index: int) -> None:
        self.index = index

    def name(self) -> str:
        return f"kernel_{self.index}"

    def device_type(self) -> str:
        return "DeviceType.CUDA"

    def device_index(self) -> int:
        return 0

    def device_resource_id(self) -> int:
        return 7

    def start_ns(self) -> int:
        return started_ns + self.index * 1000

    def duration_ns(self) -> int:
        return 500

    def correlation_id(self) -> int:
        return self.index


started_ns = 0


class Profile:
    def __init__(self, activities: list[str]) -> None:
        self.activities = activities

    def prepare_trace(self) -> None:
        if MODE == "raises":
            raise ValueError("a secret prompt")
        time.sleep(2.0 if MODE == "slow" else 0.0)

    def start_trace(self) -> None:
        global started_ns
        started_ns = time.time_ns()

    def stop_trace(self) -> None:
        events = [Event(index) for index in range(1000)]
        self.profiler = types.SimpleNamespace(kineto_results=types.SimpleNamespace(events=lambda: events))


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if MODE != "none":
    torch = types.ModuleType("torch")
    torch.__version__ = "9.9"
    torch.cuda = types.SimpleNamespace(
        is_available=lambda: MODE != "cpu", is_initialized=lambda: MODE != "cpu"
    )
    kinds = types.SimpleNamespace(CUDA="CUDA", CPU="CPU")
    torch.profiler = types.SimpleNamespace(ProfilerActivity=kinds, profile=Profile)
    autograd = types.SimpleNamespace(_profiler_enabled=lambda: MODE == "busy")
    torch._C = types.SimpleNamespace(_autograd=autograd)
    sys.modules["torch"] = torch
say("ready")
until = time.monotonic() + 60
while time.monotonic() < until:
    time.sleep(0.005)
    if MODE == "ends" and "_latencyprism_capture" in sys.modules:
        break
