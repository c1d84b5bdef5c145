"""Options of ``watch`` that say who else may ask for a capture; and what a killed watch left behind."""

from __future__ import annotations

import argparse
from pathlib import Path

from latencyprism.cli.options import duration_s
from latencyprism.errors import BadInput
from latencyprism.sentinel.attendant import Attendant
from latencyprism.sentinel.recovery import Recovery
from latencyprism.sentinel.trigger_watch import TriggerOptions, TriggerWatch

LEAST_EVERY_S = 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--listen", type=_port, metavar="PORT",
        help="capture when asked by HTTP on 127.0.0.1: POST /capture, or Alertmanager to /alertmanager",
    )  # fmt: skip
    parser.add_argument(
        "--capture-on-file", type=Path, action="append", metavar="PATH",
        help="capture when PATH appears or is written anew; repeat",
    )  # fmt: skip
    parser.add_argument(
        "--capture-every", type=duration_s, metavar="TIME", help="capture this often, from 1m on"
    )


def attendants(args: argparse.Namespace) -> list[Attendant]:
    asked = args.listen is not None or args.capture_on_file or args.capture_every is not None
    if args.no_capture:
        if asked:
            raise BadInput("nothing can be captured with --no-capture", remedy="leave out one or the other")
        return [Recovery(None)]
    if args.capture_every is not None and args.capture_every < LEAST_EVERY_S:
        raise BadInput("--capture-every is too often", "a capture takes seconds", "give 1m or more")
    files = tuple(args.capture_on_file or ())
    options = TriggerOptions(files, args.listen, args.capture_every)
    return [Recovery(args.output or Path("captures")), TriggerWatch(options)]


def _port(text: str) -> int:
    if not text.isdigit() or len(text) > 5 or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port (0: any free one)")
    return int(text)
