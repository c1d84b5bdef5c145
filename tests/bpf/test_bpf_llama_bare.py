"""Steps of a program that calls llama.cpp as a library, without the server's loop to mark them."""

from __future__ import annotations

import dataclasses
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from latencyprism.engines.llama_cpp.pack import load_pack
from latencyprism.engines.llama_cpp.source import LlamaSource
from latencyprism.lab.install import EngineUnavailable, ensure
from latencyprism.lab.models import ensure_model

pytestmark = [pytest.mark.bpf, pytest.mark.root, pytest.mark.engine]


@pytest.fixture
def bare() -> Iterator[subprocess.Popen[str]]:
    try:
        env = ensure("llama.cpp")
        model = ensure_model(env)
    except EngineUnavailable as missing:
        pytest.skip(f"engine unavailable: {missing.reason}")
    program = Path(__file__).with_name("bpf_bare_llama.py")
    with subprocess.Popen(
        [str(env.python), str(program), str(model)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        try:
            assert process.stdout and process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def decode(process: subprocess.Popen[str], tokens: int) -> None:
    assert process.stdin and process.stdout
    process.stdin.write(f"{tokens}\n")
    process.stdin.flush()
    assert process.stdout.readline() == "0\n"


def test_each_call_of_the_library_is_a_step(bare: subprocess.Popen[str]) -> None:
    # This build carries the server too; a library of its own has no such symbols.
    pack = load_pack()
    alone = dataclasses.replace(pack, points={"synchronize": pack.points["synchronize"]})
    source = LlamaSource(bare.pid, alone)
    try:
        for tokens in (40, 1, 1, 1, 7, 1):
            decode(bare, tokens)
        steps = source.poll().steps
    finally:
        source.close()
    assert [step.phase for step in steps] == ["prefill", "decode", "decode", "decode", "prefill", "decode"]
    assert [(step.prefill_tokens, step.decode_tokens) for step in steps] == [
        (40, 0), (0, 1), (0, 1), (0, 1), (7, 0), (0, 1),
    ]  # fmt: skip
    assert [step.context_tokens for step in steps] == [40, 41, 42, 43, 50, 51]
    assert all(step.execute_ns == step.duration_ns for step in steps)
    assert all((step.gap_ns or 0) > 0 for step in steps[1:]) and source.lost == 0
