"""What the eBPF tests share: whether eBPF works here, and targets of our own."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest
from bpf_targets import Caller, start_caller

from latencyprism.bpf.features import measure_probe
from latencyprism.errors import PrismError


@cache
def why_not() -> str:
    """Empty when uprobes work here, else the reason."""
    try:
        measure_probe()
    except PrismError as error:
        return str(error)
    return ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("bpf") and "tests/bpf" in item.path.as_posix() and why_not():
            item.add_marker(pytest.mark.skip(reason=why_not()))


@pytest.fixture
def caller() -> Iterator[Caller]:
    started = start_caller()
    try:
        yield started
    finally:
        started.process.kill()
        started.process.communicate()
