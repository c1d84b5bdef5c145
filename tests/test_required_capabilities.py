"""A test that this machine could run does not get away with skipping itself."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

TESTS = """
import pytest

@pytest.mark.root
def test_skips_itself(): pytest.skip("some reason")

@pytest.fixture
def nothing_there(): pytest.skip("no bpf")

@pytest.mark.bpf
def test_skipped_by_its_fixture(nothing_there): pass

@pytest.mark.engine
def test_excused(): pytest.skip("engine unavailable: no CPU build of torch")

def test_needs_nothing(): pytest.skip("free to")

@pytest.mark.root
@pytest.mark.xfail(strict=True)
def test_expected_to_fail(): raise AssertionError
"""


def outcomes(tmp_path: Path, required: str) -> dict[str, int]:
    here = Path(__file__).parent
    (tmp_path / "conftest.py").write_text((here / "conftest.py").read_text())
    (tmp_path / "test_sample.py").write_text(TESTS)
    answer = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-c",
            str(here.parent / "pyproject.toml"),
            "--rootdir",
            str(tmp_path),
            "-p",
            "no:cacheprovider",
            str(tmp_path),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "LATENCYPRISM_REQUIRE": required},
        cwd=tmp_path,
        check=False,
    )
    last = answer.stdout.strip().splitlines()[-1]
    return {name.rstrip("s"): int(count) for count, name in re.findall(r"(\d+) (\w+)", last) if name != "in"}


def test_skips_are_failures_where_the_machine_has_what_they_need(tmp_path: Path) -> None:
    seen = outcomes(tmp_path, "root,bpf,engine")
    assert (seen["failed"], seen["error"], seen["skipped"], seen["xfailed"]) == (1, 1, 2, 1)


def test_skips_are_skips_where_it_has_not(tmp_path: Path) -> None:
    seen = outcomes(tmp_path, "")
    assert (seen.get("failed"), seen["skipped"], seen["xfailed"]) == (None, 4, 1)
