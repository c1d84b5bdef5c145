"""Options of ``watch`` about what it keeps of an engine from one run to the next."""

from __future__ import annotations

import argparse
from pathlib import Path

from latencyprism.errors import BadInput
from latencyprism.sentinel.attendant import Attendant
from latencyprism.sentinel.incident_watch import IncidentWatch
from latencyprism.sentinel.known import state_folder
from latencyprism.sentinel.memory_watch import MemoryWatch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kept = parser.add_mutually_exclusive_group()
    kept.add_argument(
        "--state", type=Path, metavar="DIR",
        help="keep what was learned of an engine in DIR (default: the user's state folder)",
    )  # fmt: skip
    kept.add_argument("--no-state", action="store_true", help="begin from nothing, and keep nothing")


def attendants(args: argparse.Namespace) -> list[Attendant]:
    return [IncidentWatch(), MemoryWatch(None if args.no_state else _folder(args.state))]


def _folder(asked: Path | None) -> Path:
    if asked is None:
        return state_folder()
    try:
        asked.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        why = "it is no folder" if isinstance(error, FileExistsError) else error.strerror or str(error)
        raise BadInput(f"cannot keep state in {asked}", why, "name a folder, or --no-state") from None
    return asked
