"""``python -m latencyprism.recorder.write RAW OUT``: turn a raw capture into one that Perfetto opens.

Runs apart from the watcher: diagnosis at nice 10, so that a verdict comes soon, everything else when nobody
else wants the CPU, and one file of a folder after the other. ``--finish module:function`` names a function
that gets the Capture and returns it with, for instance, a verdict; if it fails or takes longer than
``--finish-seconds``, the capture is written without. RAW is removed when OUT is there. Prints a JSON line
with the event ``verdict`` when there is one, and at the end one with the event ``capture``; exit 0 when OUT
was written.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from latencyprism.errors import BadInput, PrismError
from latencyprism.recorder.capture import Capture, read_capture, write_capture
from latencyprism.recorder.collectives import add_collectives
from latencyprism.recorder.idle import stand_back, step_aside
from latencyprism.records.operators import Operators
from latencyprism.timeline.collective_feed import several_ranks
from latencyprism.timeline.operators import calls_of, thinned

Finish = Callable[[Capture], Capture]


def find_finish(name: str) -> Finish:
    """The function that ``module:function`` names."""
    module_name, colon, function_name = name.partition(":")
    if not colon or not module_name or not function_name:
        raise BadInput(f"cannot finish with {name!r}", "it is not module:function")
    try:
        found = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise BadInput(f"cannot finish with {name!r}", str(error)) from None
    if not callable(found):
        raise BadInput(f"cannot finish with {name!r}", "it is not a function")
    function: Finish = found
    return function


class _TookTooLong(BaseException):
    """Not an Exception, so that nothing on the way catches it."""


def _give_up(signum: int, frame: object) -> None:
    raise _TookTooLong


def finished(capture: Capture, finish: Finish, seconds: float) -> tuple[Capture, str | None]:
    """``capture`` as ``finish`` returned it, or as it was and why."""
    signal.signal(signal.SIGALRM, _give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        result = finish(capture)
    except _TookTooLong:
        return capture, f"took longer than {seconds:g} s"
    except Exception as error:  # noqa: BLE001 - whatever diagnosis does, the capture is kept
        return capture, f"{type(error).__name__}: {error}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    if not isinstance(result, Capture):
        return capture, "it returned no capture"
    return result, None


@contextlib.contextmanager
def _in_turn(folder: Path) -> Iterator[None]:
    """One file of a folder at a time: some that wait for an idle processor are as many more that the kernel
    has to place, and an engine's own threads then share a core for longer."""
    fd = -1
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(fd, fcntl.LOCK_EX)
    except OSError:
        pass  # a file system without locks: then at once
    try:
        yield
    finally:
        if fd >= 0:
            os.close(fd)


def _calls(capture: Capture) -> list[list[Operators]]:
    """By process."""
    return [calls_of(seen, process) for process, seen in capture.operator_records]


def _add_collectives(capture: Capture, calls: list[list[Operators]]) -> None:
    try:
        add_collectives(capture, [one for own in calls for one in own])
    except Exception as error:  # noqa: BLE001 - whatever it is, the capture is kept
        missing = [*capture.meta.get("not_available", ()), f"collectives: {type(error).__name__}: {error}"]
        capture.meta["not_available"] = missing


def convert(raw: str, out: str, finish: str | None, finish_seconds: float) -> dict[str, Any]:
    """Do the work; returns what the JSON line says."""
    began = time.monotonic()
    capture = read_capture(raw)
    capture.notices.clear()
    problem: str | None = None
    calls: list[list[Operators]] | None = None
    if several_ranks(process for process, _ in capture.operator_records):
        calls = _calls(capture)  # before the verdict, which says whom the others wait for
        _add_collectives(capture, calls)
    if finish:
        capture, problem = finished(capture, find_finish(finish), finish_seconds)
    verdict = capture.verdict.to_dict() if capture.verdict else None
    if verdict:
        _say({"event": "verdict", "verdict": verdict})
    with _in_turn(Path(out).parent):
        refused = stand_back()
        for own in _calls(capture) if calls is None else calls:
            capture.operators += thinned(own, capture.steps)
        size = write_capture(out, capture)
    Path(raw).unlink(missing_ok=True)
    return {
        "event": "capture",
        "path": out,
        "bytes": size,
        "steps": len(capture.steps),
        "spans": len(capture.spans),
        "counters": len(capture.counters),
        "requests": len(capture.requests),
        "operators": sum(len(calls.rows) for calls in capture.operators),
        "seconds": round(time.monotonic() - began, 3),
        "verdict": verdict,
        "finish_error": problem,
        "not_lowered": refused,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m latencyprism.recorder.write", description=__doc__)
    parser.add_argument("raw")
    parser.add_argument("out")
    parser.add_argument("--finish", metavar="MODULE:FUNCTION")
    parser.add_argument("--finish-seconds", type=float, default=60.0)
    parser.add_argument(
        "--limit-seconds", type=float, default=300.0, help="of CPU time, after which the process ends"
    )
    arguments = parser.parse_args(argv)
    told: dict[str, Any]
    # The watcher that would end this may be gone; what waits for an idle CPU is no harm, what burns one is.
    signal.setitimer(signal.ITIMER_PROF, arguments.limit_seconds)
    step_aside()
    try:
        told = convert(arguments.raw, arguments.out, arguments.finish, arguments.finish_seconds)
        code = 0
    except PrismError as error:
        told = {"event": "capture", "path": None, "error": str(error)}
        code = error.exit_code
    _say(told)
    return code


def _say(told: dict[str, Any]) -> None:
    # If the watcher is gone, perhaps killed, its last capture is written all the same.
    with contextlib.suppress(BrokenPipeError):
        os.write(sys.stdout.fileno(), json.dumps(told).encode() + b"\n")


if __name__ == "__main__":
    sys.exit(main())
