"""Ask captures, or the last minute of running watches, in SQL (ClickHouse's; embedded, nothing to set up)."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from latencyprism.cli.options import add_pid, duration_s
from latencyprism.errors import BadInput, PrismError
from latencyprism.recorder import Capture, read_capture
from latencyprism.recorder.atomic import replace_file
from latencyprism.recorder.sql import FORMATS, Sql, tables_in_words
from latencyprism.recorder.tape import tape_folder
from latencyprism.recorder.tape_reading import read_tape, tapes_in
from latencyprism.sentinel.flight_tape import capture_of

NAME = "query"
HELP = "SQL over captures and the last minute of running watches"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sql", metavar="SQL", nargs="?", help="one SELECT; - reads it from standard input")
    parser.add_argument(
        "captures", metavar="CAPTURE", type=Path, nargs="*",
        help="files that watch or record wrote; without any, what running watches have recorded",
    )  # fmt: skip
    add_pid(parser, what="without CAPTURE: of the watch of this process alone")
    parser.add_argument("--tables", action="store_true", help="no SQL: list the tables and their columns")
    parser.add_argument(
        "--format", choices=tuple(FORMATS), default="table", help="of the answer (default: table)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object: short for --format json")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the answer to FILE")
    parser.add_argument(
        "--limit", type=duration_s, default=60.0, metavar="TIME", help="give up after this long (default 60s)"
    )


def run(args: argparse.Namespace) -> int:
    if args.tables:
        return _tell_tables(args.json)
    if args.sql is None:
        raise BadInput("there is no SQL to run", remedy="give it in quotes, or ask for --tables")
    if args.captures and args.pid is not None:
        raise BadInput("-p is for running watches, not for captures", remedy="leave out one of them")
    text = sys.stdin.read(1 << 20) if args.sql == "-" else args.sql
    sources = [(path.name, read_capture(path)) for path in args.captures] or _live(args.pid)
    _tell_notices(sources)
    sql = Sql(sources, args.limit)
    try:
        answer = sql.ask(text, "json" if args.json else args.format)
    finally:
        sql.close()
    if args.output is not None:
        replace_file(args.output, [answer], "the answer")
    else:
        sys.stdout.buffer.write(answer)
        sys.stdout.buffer.flush()
    return 0


def _live(pid: int | None) -> list[tuple[str, Capture]]:
    """What the tapes of running watches hold."""
    found = []
    for file in tapes_in(tape_folder()):
        if file.live and pid in (None, file.pid):
            try:
                found.append((f"live:{file.pid}", capture_of(read_tape(file.path))))
            except BadInput as error:
                print(f"note: {error}", file=sys.stderr)
    if not found:
        who = f"no watch of process {pid} runs" if pid is not None else "no watch of yours runs"
        raise PrismError("there is nothing to ask", who, "name captures, or start latencyprism watch")
    return found


def _tell_notices(sources: list[tuple[str, Capture]]) -> None:
    for name, capture in sources:
        for notice in capture.notices:
            print(f"note: {name}: {notice}", file=sys.stderr)


def _tell_tables(as_json: bool) -> int:
    tables = tables_in_words()
    if as_json:
        print(json.dumps(tables))
        return 0
    for name, columns in tables.items():
        print(f"{name}: " + ", ".join(f"{column['name']} {column['type']}" for column in columns))
    return 0
