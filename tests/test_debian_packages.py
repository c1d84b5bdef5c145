"""What tests need of Debian is told by package, and only root's machine is changed."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def packages() -> ModuleType:
    path = Path(__file__).parents[1] / "scripts" / "debian_packages.py"
    spec = importlib.util.spec_from_file_location("debian_packages", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def only(*there: str):  # type: ignore[no-untyped-def]
    return lambda program: f"/usr/bin/{program}" if program in there else None


def test_each_missing_package_is_told_once(packages: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages.shutil, "which", only("gcc", "gdb", "node", "strip", "llvm-strip-14"))
    assert packages.missing() == ["clang-14", "util-linux"]


def test_nothing_is_installed_without_root_or_apt(
    packages: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*_: object, **__: object) -> None:
        raise AssertionError("something was run")

    monkeypatch.setattr(packages.subprocess, "run", run)
    for uid, there in ((1000, ("apt-get",)), (0, ())):
        monkeypatch.setattr(packages.os, "geteuid", lambda uid=uid: uid)
        monkeypatch.setattr(packages.shutil, "which", only(*there))
        assert "clang-14" in packages.ensure()


def test_lists_are_fetched_where_the_first_try_fails(
    packages: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        said.append(command[2] if command[2] == "update" else "install")
        return subprocess.CompletedProcess(command, 0 if said.count("update") else 100, "", "")

    monkeypatch.setattr(packages.subprocess, "run", run)
    monkeypatch.setattr(packages.os, "geteuid", lambda: 0)
    monkeypatch.setattr(packages.shutil, "which", only("apt-get"))
    packages.ensure()
    assert said == ["install", "update", "install"]
