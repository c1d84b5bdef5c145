"""How a benchmark says what it does and what came of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any


def say(text: str) -> None:
    """Progress, on standard error."""
    print(text, file=sys.stderr, flush=True)


def print_figures(
    result: dict[str, Any], as_json: bool, width: int, plain: Callable[[Any], Any] | None = None
) -> int:
    """One JSON object, or a line for each figure, its name ``width`` wide. ``plain`` makes what JSON does
    not know into what it does. The exit code."""
    if as_json:
        print(json.dumps(result, default=plain))
    else:
        for name, value in result.items():
            print(f"{name:{width}} {value}")
    return 0
