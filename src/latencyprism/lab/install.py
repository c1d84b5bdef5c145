"""Environments of the engines in the lab: one virtual environment each, in the user's cache folder.

``ensure("vllm")`` answers at once when the environment is there, and builds it otherwise. A virtual
environment cannot be moved, so it is built in place; the marker file written last tells a whole one from a
broken one, and a lock file keeps two processes from building the same one.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

from latencyprism.errors import BadInput, PrismError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

EngineName = Literal["vllm", "transformers", "llama.cpp"]
ENGINES: tuple[EngineName, ...] = get_args(EngineName)
NO_CPU_TORCH = "no CPU build of torch"
_MARKER = ".complete"


class EngineUnavailable(PrismError):
    """An engine cannot be had on this machine; ``reason`` is short enough for a skipped test."""

    def __init__(self, engine: str, reason: str, remedy: str = "") -> None:
        self.reason = reason
        super().__init__(f"{engine} is unavailable", reason, remedy)


@dataclass(frozen=True)
class EngineEnv:
    """``python``: the interpreter that has the engine; ``dir``: the environment it belongs to."""

    engine: EngineName
    python: Path
    dir: Path

    def command(self, name: str) -> Path:
        """Path of a console script of this environment."""
        return self.python.parent / name


def cache_root() -> Path:
    """``$XDG_CACHE_HOME/latencyprism``, or ``~/.cache/latencyprism``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "latencyprism"


def clean_environ(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment without what would slow an engine down or lead it to other packages.

    PYTHONDONTWRITEBYTECODE makes every engine process recompile torch's sources (minutes); PYTHONPATH and
    VIRTUAL_ENV belong to the caller's interpreter.
    """
    drop = {"PYTHONDONTWRITEBYTECODE", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PYTHONPYCACHEPREFIX"}
    env = {key: value for key, value in os.environ.items() if key not in drop}
    env.update(extra or {})
    return env


def pins(engine: str) -> dict[str, Any]:
    """The engine's pins as written in ``lab/pins``; raises BadInput for a name without any."""
    if engine not in ENGINES:
        raise BadInput(f"no engine called {engine!r} in the lab", remedy=f"Known: {', '.join(ENGINES)}.")
    text = resources.files("latencyprism.lab").joinpath("pins", f"{engine}.toml").read_text("utf-8")
    return tomllib.loads(text)


def environment_dir(engine: EngineName) -> Path:
    """Where the environment of the present pins is, or would be."""
    digest = hashlib.sha256(json.dumps(pins(engine), sort_keys=True).encode()).hexdigest()[:12]
    return cache_root() / "engines" / f"{engine}-{digest}"


def ensure(engine: EngineName) -> EngineEnv:
    """The engine's environment, built first where it is missing (vLLM: minutes and 2-3 GB).

    Raises EngineUnavailable where it cannot be built, BadInput for an unknown engine. Progress goes to
    stderr.
    """
    pin = pins(engine)
    modules = pin.get("modules")
    if modules and all(importlib.util.find_spec(name) for name in modules):
        return EngineEnv(engine, Path(sys.executable), Path(sys.prefix))
    where = environment_dir(engine)
    where.parent.mkdir(parents=True, exist_ok=True)
    with _locked(where.with_name(where.name + ".lock"), engine):
        if not (where / _MARKER).is_file():
            try:
                _build(engine, pin, where)
            except BaseException:
                shutil.rmtree(where, ignore_errors=True)
                raise
    return EngineEnv(engine, where / "bin" / "python", where)


@contextlib.contextmanager
def _locked(path: Path, engine: str) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(engine, "another process is installing it; waiting")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(engine: EngineName, pin: dict[str, Any], where: Path) -> None:
    python = _interpreter(engine, pin.get("python"))
    began = time.monotonic()
    if where.exists():
        shutil.rmtree(where)
    _say(engine, f"installing into {where}")
    _run(engine, [python, "-m", "venv", str(where)])
    inside = str(where / "bin" / "python")
    # Byte-compiling is left to the end: a gigabyte of what is installed is removed again.
    pip = [inside, "-m", "pip", "install", "--quiet", "--no-cache-dir", "--no-compile"]
    # torch alone first: where no CPU build is to be had this fails in seconds instead of after 2 GB.
    if pin["first"]:
        _run(engine, [*pip, *pin["first"]])
        _say(engine, f"{time.monotonic() - began:.0f} s: {' '.join(pin['first'])}")
    _run(engine, [*pip, *pin["first"], *pin["requirements"]])
    _say(engine, f"{time.monotonic() - began:.0f} s: {' '.join(pin['requirements'])}")
    if pin["remove"]:
        _run(engine, [inside, "-m", "pip", "uninstall", "--quiet", "--yes", *pin["remove"]])
    if "alias" in pin:
        _write_alias(inside, pin["alias"])
    _say(engine, f"{time.monotonic() - began:.0f} s: byte-compiling")
    # Fails on files that are templates or for another Python; those are never imported.
    subprocess.run(
        [inside, "-m", "compileall", "-q", "-j", "0", str(where / "lib")],
        env=clean_environ(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=False,
    )
    seconds = time.monotonic() - began
    (where / _MARKER).write_text(
        json.dumps({"engine": engine, "seconds": round(seconds, 1), "pins": pin}) + "\n"
    )
    _say(engine, f"ready after {seconds:.0f} s")


def _interpreter(engine: str, version: str | None) -> str:
    """An interpreter of ``version`` ("3.11") that can make virtual environments; any where None."""
    candidates = [getattr(sys, "_base_executable", sys.executable), sys.executable]
    if version:
        folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
        candidates += [str(Path(folder) / f"python{version}") for folder in folders if folder]
    check = "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"
    for candidate in candidates:
        if not os.access(candidate, os.X_OK):
            continue
        answer = subprocess.run(
            [candidate, "-c", check], capture_output=True, text=True, env=clean_environ(), check=False
        )
        if answer.returncode == 0 and (version is None or answer.stdout.strip() == version):
            return candidate
    raise EngineUnavailable(
        engine, f"no python{version or '3'} with venv", f"Install python{version or '3'} and its venv module."
    )


def _run(engine: str, command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, env=clean_environ(), check=False)
    if result.returncode == 0:
        return
    said = (result.stderr or result.stdout).strip()
    if "No matching distribution found for torch" in said:
        raise EngineUnavailable(
            engine,
            NO_CPU_TORCH,
            "Let pip see a CPU wheel of torch for Python 3.11 (PIP_FIND_LINKS, or an extra index).",
        )
    last = said.splitlines()[-1] if said else f"exit status {result.returncode}"
    raise EngineUnavailable(engine, f"installation failed: {last}", f"Command: {' '.join(command)}")


def _write_alias(python: str, alias: dict[str, str]) -> None:
    """A second distribution name for an installed package, for code that looks itself up by that name."""
    answer = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    )
    info = Path(answer.stdout.strip()) / f"{alias['name']}-{alias['version']}.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {alias['name']}\nVersion: {alias['version']}\n"
    )
    (info / "RECORD").write_text("")


def _say(engine: str, text: str) -> None:
    sys.stderr.write(f"latencyprism lab: {engine}: {text}\n")
    sys.stderr.flush()
