"""Environments of engines: found, rebuilt when broken. Nothing is downloaded here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from latencyprism.errors import BadInput
from latencyprism.lab import install
from latencyprism.lab.install import EngineUnavailable, clean_environ, ensure, environment_dir, pins


@pytest.fixture
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_every_engine_is_pinned_exactly() -> None:
    for engine in install.ENGINES:
        pin = pins(engine)
        main_requirement = pin["requirements"][0]
        assert "==" in main_requirement
        assert all("==" in requirement for requirement in pin["first"])


def test_folder_is_named_after_the_pins(empty_cache: Path) -> None:
    names = {environment_dir(engine).name for engine in install.ENGINES}
    assert len(names) == 3
    assert environment_dir("vllm").parent == empty_cache / "latencyprism" / "engines"


def test_unknown_engine_is_bad_input() -> None:
    for name in ("sglang", "../vllm", ""):
        with pytest.raises(BadInput, match="no engine called"):
            ensure(name)  # type: ignore[arg-type]


def test_complete_environment_is_taken_as_it_is(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = environment_dir("vllm")
    where.mkdir(parents=True)
    (where / ".complete").write_text("{}")
    monkeypatch.setattr(install, "_build", lambda *_: pytest.fail("built again"))
    assert ensure("vllm").python == where / "bin" / "python"


def test_broken_environment_is_rebuilt(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = environment_dir("vllm")
    (where / "left over").mkdir(parents=True)
    commands: list[list[str]] = []

    def run(_engine: str, command: list[str]) -> None:
        commands.append(command)
        where.mkdir(exist_ok=True)

    monkeypatch.setattr(install, "_run", run)
    monkeypatch.setattr(install, "_interpreter", lambda *_: sys.executable)
    monkeypatch.setattr(install, "_write_alias", lambda *_: None)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: None)
    ensure("vllm")
    assert not (where / "left over").exists()
    assert (where / ".complete").is_file()
    assert commands[0][1:3] == ["-m", "venv"]
    count = len(commands)
    ensure("vllm")
    assert len(commands) == count


def test_no_cpu_torch_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(*_: Any, **__: Any) -> subprocess.CompletedProcess[str]:
        said = "ERROR: No matching distribution found for torch==2.13.0+cpu"
        return subprocess.CompletedProcess([], 1, "", said)

    monkeypatch.setattr(subprocess, "run", answer)
    with pytest.raises(EngineUnavailable) as caught:
        install._run("vllm", ["pip"])
    assert caught.value.reason == install.NO_CPU_TORCH


def test_missing_interpreter_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineUnavailable, match=r"no python2\.4"):
        install._interpreter("vllm", "2.4")


def test_engine_environment_keeps_bytecode_and_drops_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    environ = clean_environ({"A": "b"})
    assert "PYTHONDONTWRITEBYTECODE" not in environ
    assert "PYTHONPATH" not in environ
    assert environ["A"] == "b"
