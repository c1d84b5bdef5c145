"""Options of ``explain`` that write a capture in the format of another tool."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from latencyprism.errors import BadInput
from latencyprism.recorder import Capture
from latencyprism.recorder.export import FORMATS, default_output, export

__all__ = ["FORMATS", "add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="where --format writes (parquet and csv: a folder)"
    )


def run(args: argparse.Namespace, capture: Capture) -> int:
    out: Path = args.output or default_output(args.capture, args.format)
    if args.output is None and out.exists():
        raise BadInput(f"{out} is there already", "it is not overwritten", "name a file with -o")
    size = export(capture, args.capture.name, args.format, out)
    if args.json:
        print(
            json.dumps({"output": str(out), "format": args.format, "bytes": size, "notices": capture.notices})
        )
    else:
        print(f"{out}: {size} bytes")
        for notice in capture.notices:
            print(f"NOTE: {notice}")
    return 0
