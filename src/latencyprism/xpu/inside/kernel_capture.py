"""Runs inside the target: one bounded window of the framework's own profiler, told through a file.

``capture(config)`` comes back at once; the work is done by a thread of its own that never raises. Lines of
JSON in the file ``config["out"]``: states with both clocks, then events ``[name, device kind, device,
stream, start_ns, duration_ns, correlation]`` (CLOCK_REALTIME, as the profiler stamps them), then ``done``
or ``failed``. Written in slices with pauses, so that threads that wait for the interpreter lock get it.
"""

from __future__ import annotations

import _thread
import json
import os
import sys
import time
import types
from typing import Any

SLICE = 100
PAUSE_S = 0.002
KEY = "_latencyprism_capture"
OTHERS = ("torch_npu",)


class Teller:
    def __init__(self, path: str) -> None:
        self.fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC)

    def write(self, value: Any) -> None:
        os.write(self.fd, (json.dumps(value) + "\n").encode("ascii"))

    def state(self, name: str, **more: Any) -> None:
        more.update(state=name, monotonic_ns=time.monotonic_ns(), realtime_ns=time.time_ns())
        self.write(more)


def make_profiler(torch: Any) -> Any:
    """A profiler of the accelerator's activity alone; None where this process uses none.

    Never one of operators: to see those of other threads it would have to hook them all, and stopping that
    from here, while they run, has ended a target.
    """
    kinds = torch.profiler.ProfilerActivity
    for name in OTHERS:
        if name in sys.modules and hasattr(kinds, "PrivateUse1"):
            return torch.profiler.profile(activities=[kinds.PrivateUse1])
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.profiler.profile(activities=[kinds.CUDA])
    return None


def record(torch: Any, config: dict[str, Any], teller: Teller) -> None:
    if torch._C._autograd._profiler_enabled():
        teller.state("failed", why="a profiler is already at work in this process")
        return
    profiler = make_profiler(torch)
    if profiler is None:
        teller.state("failed", why="it has no accelerator at work")
        return
    teller.state("preparing", torch=str(torch.__version__))
    profiler.prepare_trace()
    if time.monotonic_ns() > config["deadline_ns"]:
        # What was prepared is only given back by a start and a stop.
        profiler.start_trace()
        profiler.stop_trace()
        teller.state("failed", why="preparing the profiler took too long")
        return
    teller.state("starting")
    profiler.start_trace()
    teller.state("started")
    time.sleep(config["window_s"])
    teller.state("stopping")
    profiler.stop_trace()
    teller.state("stopped")
    events = profiler.profiler.kineto_results.events()
    teller.state("read", events=len(events))
    write_events(events, config["most_events"], teller)
    teller.state("done", left_out=max(0, len(events) - config["most_events"]))


def write_events(events: Any, most: int, teller: Teller) -> None:
    for at in range(0, min(len(events), most), SLICE):
        rows = [
            [
                event.name()[:200],
                str(event.device_type()).rsplit(".", 1)[-1],
                event.device_index(),
                event.device_resource_id(),
                event.start_ns(),
                event.duration_ns(),
                event.correlation_id(),
            ]
            for event in events[at : min(at + SLICE, most)]
        ]
        teller.write(rows)
        time.sleep(PAUSE_S)


def work(config: dict[str, Any]) -> None:
    teller: Teller | None = None
    try:
        teller = Teller(config["out"])
        torch = sys.modules.get("torch")
        if torch is None or not hasattr(torch, "profiler"):
            teller.state("failed", why="no PyTorch is loaded in this process")
        else:
            record(torch, config, teller)
    except BaseException as error:  # noqa: BLE001  nothing may be raised into the target
        # Never the text of an error: it may quote what a user sent.
        if teller is not None:
            teller.state("failed", why=type(error).__name__)
    finally:
        sys.modules.pop(KEY, None)
        if teller is not None:
            os.close(teller.fd)


def capture(config: dict[str, Any]) -> None:
    if sys.modules.get(KEY) is None:
        sys.modules[KEY] = types.ModuleType(KEY)
        _thread.start_new_thread(work, (config,))
