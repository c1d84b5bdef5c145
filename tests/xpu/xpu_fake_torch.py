"""A stand-in for PyTorch with an accelerator: ``xpu_fake_torch.py MODE`` is a process that has it.

``install(MODE)`` puts it into another program. In the mode ``engine`` the device runs, from the start of a
recording to its end, a kernel of 60 us each 100 us on stream 7, launched by the main thread 20 us before,
each tenth an all-reduce; and a copy each millisecond on stream 9.
"""

from __future__ import annotations

import os
import sys
import time
import types

MODE = sys.argv[1] if __name__ == "__main__" else "none"
PERIOD_NS, KERNEL_NS, LAUNCH_NS = 100_000, 60_000, 10_000
PLAIN = "void at::native::vectorized_elementwise_kernel<4, float>(int, float)"
ALL_REDUCE = "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)"


class Event:
    def __init__(self, name: str, kind: str, lane: int, start_ns: int, length_ns: int, number: int) -> None:
        self.told = name, kind, lane, start_ns, length_ns, number

    def name(self) -> str:
        return self.told[0]

    def device_type(self) -> str:
        return f"DeviceType.{self.told[1]}"

    def device_index(self) -> int:
        return 0 if self.told[1] == "CUDA" else os.getpid()

    def device_resource_id(self) -> int:
        return self.told[2]

    def start_ns(self) -> int:
        return self.told[3]

    def duration_ns(self) -> int:
        return self.told[4]

    def correlation_id(self) -> int:
        return self.told[5]


def thousand(start_ns: int) -> list[Event]:
    return [Event(f"kernel_{n}", "CUDA", 7, start_ns + n * 1000, 500, n) for n in range(1000)]


def busy(start_ns: int, end_ns: int) -> list[Event]:
    made = []
    for number, at in enumerate(range(start_ns, end_ns, PERIOD_NS), start=1):
        call_ns = at - 2 * LAUNCH_NS
        made.append(Event("cudaLaunchKernel", "CPU", os.getpid(), call_ns, LAUNCH_NS, number))
        made.append(Event(ALL_REDUCE if number % 10 == 0 else PLAIN, "CUDA", 7, at, KERNEL_NS, number))
        if number % 10 == 0:
            made.append(Event("Memcpy HtoD (Pageable -> Device)", "CUDA", 9, at, PERIOD_NS, 0))
    made.append(Event("cudaStreamIsCapturing", "CPU", os.getpid(), start_ns, LAUNCH_NS, 1 << 20))
    return made


class Profile:
    started_ns = 0

    def __init__(self, activities: list[str]) -> None:
        if activities != ["CUDA"]:
            raise RuntimeError("to stop a recording of operators can end this process")

    def prepare_trace(self) -> None:
        if MODE == "raises":
            raise ValueError("a secret prompt")
        time.sleep(2.0 if MODE == "slow" else 0.0)

    def start_trace(self) -> None:
        self.started_ns = time.time_ns()

    def stop_trace(self) -> None:
        events = busy(self.started_ns, time.time_ns()) if MODE == "engine" else thousand(self.started_ns)
        self.profiler = types.SimpleNamespace(kineto_results=types.SimpleNamespace(events=lambda: events))


def install(mode: str) -> None:
    global MODE
    MODE = mode
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


def main() -> None:
    if MODE != "none":
        install(MODE)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    until = time.monotonic() + 60
    while time.monotonic() < until:
        time.sleep(0.005)
        if MODE == "ends" and "_latencyprism_capture" in sys.modules:
            break


if __name__ == "__main__":
    main()
