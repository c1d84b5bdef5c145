"""A stand-in of an engine as a process of a test: started, told to serve its scenario, ended."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def until_the_end(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """Ready and idle; killed afterwards. Both its standard input and output are pipes."""
    assert process.stdin is not None and process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def let_serve(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Let it serve its scenario: what it says that it did."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("go\n")
    process.stdin.flush()
    said: dict[str, Any] = json.loads(process.stdout.readline())
    time.sleep(0.05)
    return said
