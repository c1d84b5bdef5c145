"""Watch engines that serve: one JSON line on standard output for each alert, words on standard error.

Attaches to the engine a PID belongs to, or to all engines of the machine, without a restart; detaches when
the duration is over or on Ctrl-C. A capture with the seconds around each incident is written into a folder
(captures, or the one given with -o), and a verdict line follows when it is done.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from latencyprism.cli import watch_memory, watch_slo, watch_triggers
from latencyprism.cli.options import add_duration, add_pid, share_ppm
from latencyprism.errors import BadInput
from latencyprism.sentinel.attendant import Attendant
from latencyprism.sentinel.sinks import JsonLines, Webhook
from latencyprism.sentinel.steplog import StepLog
from latencyprism.sentinel.watcher import Watcher, WatchOptions

NAME = "watch"
HELP = "alert when a batch takes longer than its workload explains"


class Topic(Protocol):
    """A module with options of its own that wires something into the watch."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def attendants(self, args: argparse.Namespace) -> list[Attendant]: ...


TOPICS: tuple[Topic, ...] = (watch_slo, watch_triggers, watch_memory)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_pid(parser)
    add_duration(parser, None, "stop after this long (default: when told to)")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="DIR",
        help="captures of incidents go into DIR (default: captures)",
    )
    parser.add_argument("--no-capture", action="store_true", help="alerts alone, nothing on disk")
    parser.add_argument(
        "--steps", type=Path, metavar="FILE", help="log every step as CSV into a new FILE, for replay"
    )
    parser.add_argument(
        "--webhook", metavar="URL", help="post alerts to URL (Alertmanager webhook, version 4)"
    )
    parser.add_argument(
        "--no-realtime",
        action="store_true",
        help="ordinary priority; alerts may be late",
    )
    parser.add_argument(
        "--budget", type=share_ppm, metavar="PERCENT",
        help="what probes may cost, of the step time, before they read less (default: 0.3, with --slo 1)",
    )  # fmt: skip
    parser.add_argument("--no-deep", action="store_true", help="no deeper probes after an alert")
    parser.add_argument(
        "--kernels", action="store_true",
        help="captures of pages, and those asked for, also have kernels of a device, for a few steps, by "
        "PyTorch's profiler, at most every 5 minutes: may hold the engine up",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="JSON lines alone; standard error is for errors")
    parser.add_argument(
        "--fail-on-alert", action="store_true", help="exit 4 if a page-level alert was raised"
    )
    for topic in TOPICS:
        topic.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    if args.kernels and (args.no_deep or args.no_capture):
        other = "--no-deep" if args.no_deep else "--no-capture"
        raise BadInput(f"--kernels does not go with {other}", remedy="leave out one or the other")
    out = JsonLines(sys.stdout)
    captures = None if args.no_capture else _folder(args.output or Path("captures"))
    webhook = Webhook(args.webhook) if args.webhook else None
    steps = StepLog(args.steps) if args.steps else None

    def say(text: str) -> None:
        if not args.json:
            print(text, file=sys.stderr, flush=True)

    options = WatchOptions(
        pid=args.pid,
        duration_s=args.duration,
        captures=captures,
        steps=steps,
        deep=not args.no_deep,
        kernels=args.kernels,
        realtime=not args.no_realtime,
        budget_ppm=args.budget,
    )
    attendants = [attendant for topic in TOPICS for attendant in topic.attendants(args)]
    watcher = Watcher(options, out, webhook=webhook, say=say, attendants=attendants)
    try:
        watcher.attach_all()
        summary = watcher.run()
    finally:
        if steps is not None:
            steps.close()
        if captures is not None:
            with suppress(OSError):  # it holds captures, or another watch removed it
                captures.rmdir()
    out.event("ended", **watcher.describe())
    alerts = f"alerts: {summary.page} page, {summary.evidence} evidence"
    say(f"{summary.steps} steps seen, {alerts}; {summary.lost} records lost")
    raised = summary.page + summary.evidence
    if webhook is not None and webhook.sent < raised:
        error = f"; last error: {webhook.last_error}" if webhook.last_error else ""
        say(f"webhook: {webhook.sent} of {raised} alerts delivered{error}")
    return 4 if args.fail_on_alert and summary.page else 0


def _folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise BadInput(f"cannot use {path}", "it is no folder", "name a folder with -o") from None
    except OSError as error:
        remedy = "name another folder with -o, or --no-capture"
        raise BadInput(f"cannot write captures into {path}", error.strerror or str(error), remedy) from None
    return path
