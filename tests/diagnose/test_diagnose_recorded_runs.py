"""Frozen signals of injections into real engines: verdicts by today's signatures must not become worse.

Recorded by ``latencyprism bench diagnose --out FILE``; see data/README.md. Signatures were looked at with
some of these runs in view: a guard against regressions, no measurement.
"""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from latencyprism.bench import diagnose_score
from latencyprism.diagnose.signatures import builtin_table

FILE = Path(__file__).parent / "data" / "engine_runs.jsonl.gz"
REACHED = 0.35
"""Steps took so much longer: a cause can be seen."""
WRONG, NOT_IN_THREE = 5, 4
"""Of 42, by the signatures of 2026-11-28."""


@pytest.fixture(scope="module")
def lines() -> list[dict[str, Any]]:
    with gzip.open(FILE, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.fixture(scope="module")
def visible(lines: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """(truth, ranking) of the runs that took effect and made steps slower."""
    table = builtin_table()
    return [
        (line["truth"], [name for name, _ in diagnose_score.rank(line, table)])
        for line in lines
        if line["effective"] and line["truth"] != "none" and line["slow"] >= REACHED
    ]


def test_there_is_something_of_each_engine(lines: list[dict[str, Any]]) -> None:
    assert Counter(line["engine"] for line in lines).keys() == {"vllm", "transformers", "llama.cpp"}


def test_visible_causes_are_named(visible: list[tuple[str, list[str]]]) -> None:
    assert len(visible) == 42
    wrong = [(truth, ranking[:3]) for truth, ranking in visible if ranking[0] != truth]
    assert len(wrong) <= WRONG, wrong
    far = [(truth, ranking[:3]) for truth, ranking in visible if truth not in ranking[:3]]
    assert len(far) <= NOT_IN_THREE, far


def test_healthy_runs_name_no_cause(lines: list[dict[str, Any]]) -> None:
    table = builtin_table()
    named = [
        ranking[0]
        for line in lines
        if line["truth"] == "none"
        for ranking in [diagnose_score.rank(line, table)]
        if ranking[0][0] not in ("none", "unknown")
    ]
    assert named == []
