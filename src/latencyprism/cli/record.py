"""Record an engine for a few seconds with the deeper probes, without waiting for an alert.

Writes one capture file that Perfetto opens (https://ui.perfetto.dev, nothing is uploaded) and that
`latencyprism explain` reads. With --recover: what a watcher that was killed had on tape.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from latencyprism.cli.options import add_duration, add_pid
from latencyprism.cli.results import say
from latencyprism.engines.unknown import discover_any
from latencyprism.errors import BadInput, PrismError
from latencyprism.recorder import write_capture
from latencyprism.recorder.tape import tape_folder
from latencyprism.recorder.tape_reading import HeldTape, tapes_in
from latencyprism.sentinel.finish import finish
from latencyprism.sentinel.incident_capture import IncidentCapture
from latencyprism.sentinel.recovery import recovered
from latencyprism.sentinel.replica_watch import ReplicaWatch
from latencyprism.sentinel.targets import attach

NAME = "record"
HELP = "record an engine for some seconds into a capture"
PERIOD_S = 0.05


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_pid(parser, what="any process of the engine")
    add_duration(parser, 5.0, "how long (default 5s)")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="default: PID.pftrace here")
    parser.add_argument(
        "--recover", action="store_true",
        help="no recording: write what a killed watcher had recorded (of PID, or the newest)",
    )  # fmt: skip
    parser.add_argument("--no-deep", action="store_true", help="step records and host counters alone")
    parser.add_argument(
        "--kernels", action="store_true",
        help="also kernels of a device, for a few steps, by PyTorch's profiler: may hold the engine up",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(args: argparse.Namespace) -> int:
    if args.recover:
        return _recover(args)
    if args.pid is None:
        raise BadInput("nothing to record", "no process was named", "name one with -p, or --recover")
    if args.kernels and args.no_deep:
        raise BadInput("--kernels does not go with --no-deep", remedy="leave out one or the other")
    path: Path = args.output or Path(f"{args.pid}.pftrace")
    _check_new(path)
    if args.duration > 120:
        raise BadInput("that is too long", "a recording is kept in memory; 120s at most")
    replica = discover_any(args.pid)[0]
    watch = ReplicaWatch(attach(replica, say), horizon_s=args.duration + 30)
    if args.kernels:
        watch.record_kernels()
    try:
        result = _record(watch, path, args.duration, deep=not args.no_deep)
        lost = watch.attachment.source.lost
    finally:
        watch.close()
    if result.get("error"):
        raise PrismError("the recording is lost", str(result["error"]))
    report = {
        "capture": str(path),
        "bytes": result.get("bytes"),
        "steps": result.get("steps", watch.counts.steps),
        "requests": result.get("requests"),
        "operators": result.get("operators"),
        "lost": lost,
    }
    if args.json:
        print(json.dumps(report))
    else:
        print(f"{path}: {report['steps']} steps, {report['lost']} records lost", file=sys.stdout)
        print(f"open it at https://ui.perfetto.dev, or: latencyprism explain {path}")
    return 0


def _check_new(path: Path) -> None:
    if path.exists():
        raise BadInput(f"{path} is there already", "it is not overwritten", "name another file with -o")
    if not path.absolute().parent.is_dir():
        raise BadInput(f"cannot write {path}", "its folder does not exist", "make it first")


def _recover(args: argparse.Namespace) -> int:
    found = [file for file in tapes_in(tape_folder()) if args.pid in (None, file.pid)]
    dead = [file for file in found if not file.live]
    if not dead:
        why = "its watcher still runs" if found else "no watcher that was killed left a tape"
        remedy = "ask that watcher for a capture: kill -USR1" if found else ""
        raise BadInput("nothing to recover", why, remedy)
    path: Path = args.output or Path(f"recovered-{dead[0].pid}.pftrace")
    _check_new(path)
    held = HeldTape.take(dead[0].path)
    if held is None:
        raise PrismError("nothing to recover", "somebody else recovers it just now")
    written = False
    try:
        capture = finish(recovered(dead[0].path))
        size = write_capture(path, capture)
        written = True
    finally:
        held.close(remove=written)
    report = {"capture": str(path), "bytes": size, "steps": len(capture.steps), "engine": dead[0].engine,
              "pid": dead[0].pid, "tapes_left": len(dead) - 1}  # fmt: skip
    if args.json:
        print(json.dumps(report))
    else:
        print(
            f"{path}: {report['steps']} steps of {dead[0].engine} {dead[0].pid}, until its watcher was killed"
        )
        if len(dead) > 1:
            print(f"{len(dead) - 1} more: run it again, with another -o")
    return 0


def _record(watch: ReplicaWatch, path: Path, seconds: float, *, deep: bool) -> dict[str, object]:
    """Watches for ``seconds``; then nothing more is read while the file is written."""
    if deep and watch.operators is not None:
        watch.operators.wait_ready()
    capture = IncidentCapture(watch, None, path, after_s=seconds, deep=deep, kernels=True)
    end = time.monotonic() + seconds
    next_slow = 0.0
    while time.monotonic() < end:
        watch.settle()
        time.sleep(PERIOD_S)
        watch.poll()
        now = time.monotonic()
        if now >= next_slow:
            next_slow = now + 0.2
            watch.sample_host(time.monotonic_ns())
            watch.attachment.source.renew()
            capture.step(time.monotonic_ns())
    capture.abandon()
    return capture.result or {}
