"""Arguments that several verbs share, and how they are read."""

from __future__ import annotations

import argparse
import re

_UNITS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


def duration_s(text: str) -> float:
    """``90``, ``5s``, ``250ms``, ``10m``, ``1h`` as seconds, more than zero and at most a week."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*(ms|s|m|min|h)?", text.strip())
    seconds = float(match[1]) * _UNITS[match[2] or "s"] if match else 0.0
    if not 0 < seconds <= 7 * 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is no duration such as 30s, 5m or 250ms")
    return seconds


def share_ppm(text: str) -> int:
    """``0.5%`` or ``0.5``, per cent, as parts per million: at least 0.01 % and at most 50 %."""
    match = re.fullmatch(r"([0-9]{1,3}(?:\.[0-9]{1,4})?)\s*%?", text.strip())
    ppm = round(float(match[1]) * 10_000) if match else 0
    if not 100 <= ppm <= 500_000:
        raise argparse.ArgumentTypeError(f"{text!r} is no share between 0.01% and 50%")
    return ppm


def pid(text: str) -> int:
    """A process id."""
    if not re.fullmatch(r"[0-9]{1,7}", text) or not 0 < int(text) <= 1 << 22:
        raise argparse.ArgumentTypeError(f"{text!r} is no process id")
    return int(text)


def add_pid(parser: argparse.ArgumentParser, *, required: bool = False, what: str = "") -> None:
    parser.add_argument(
        "-p", "--pid", type=pid, metavar="PID", required=required,
        help=what or "any process of the engine; without it, all engines of this machine",
    )  # fmt: skip


def add_duration(parser: argparse.ArgumentParser, default: float | None, what: str) -> None:
    parser.add_argument("-d", "--duration", type=duration_s, default=default, metavar="TIME", help=what)


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object")
