"""Vendor libraries built for these tests, with the true names and layouts."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

STUBS = Path(__file__).parent / "stubs"


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """``build("nvml", "-DHANG")`` is the path of that library. A fresh copy each time: no state is shared."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler on this machine")

    def make(name: str, *flags: str, source: str | None = None, stem: str | None = None) -> str:
        out = tmp_path_factory.mktemp("lib") / (stem or f"lib{name}.so")
        given = ["-x", "c", "-"] if source is not None else [str(STUBS / f"{name}.c")]
        command = [compiler, "-shared", "-fPIC", "-O1", "-w", *flags, "-o", str(out), *given]
        subprocess.run(command, input=source, text=True, check=True, capture_output=True, timeout=60)
        return str(out)

    return make
