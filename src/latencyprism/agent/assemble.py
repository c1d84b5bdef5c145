"""Joins the probe's source files into the one text that is run inside a target."""

from __future__ import annotations

import re
from importlib.resources import files
from typing import Any

from latencyprism.records import ring
from latencyprism.records.step import NULL

READERS = ("vllm", "transformers", "anchor")

_CUT = re.compile(r"^# \[cut\n.*?^# cut\]\n", re.MULTILINE | re.DOTALL)
_NEEDS = re.compile(r"^from latencyprism\.agent\.probe\.(\w+) import", re.MULTILINE)
_CONSTANT = re.compile(r"[A-Z][A-Z0-9_]*$")


def _constants() -> str:
    lines = [
        f"{name} = {value}"
        for name, value in vars(ring).items()
        if _CONSTANT.match(name) and isinstance(value, int)
    ]
    return "\n".join([*lines, f"NULL = {NULL}"])


def _join(text: str, done: dict[str, None]) -> str:
    """``text`` without its cut imports, after the parts that these name and that are not in ``done`` yet."""
    parts = []
    for name in _NEEDS.findall("".join(_CUT.findall(text))):
        if name not in done:
            done[name] = None
            parts.append(_join(_source(name), done))
    return "\n".join([*parts, _CUT.sub("", text)])


def _source(name: str) -> str:
    return files("latencyprism.agent.probe").joinpath(f"{name}.py").read_text(encoding="utf-8")


def assemble(reader: str, config: dict[str, Any]) -> str:
    """The whole probe as Python 3.9+ source: constants, core, the named reader, and the call that starts it.

    ``config`` must be made of plain literals; it is embedded by ``repr``. ValueError for an unknown reader.
    """
    if reader not in READERS:
        raise ValueError(f"no reader {reader!r}")
    return assemble_source(_source(reader), config)


def assemble_source(reader: str, config: dict[str, Any]) -> str:
    """The same for a reader given as source. What its cut imports name of ``agent.probe`` is joined before
    it."""
    done: dict[str, None] = {"core": None}
    parts = [_join(_source("core"), done), _join(reader, done)]
    return "\n".join([_constants(), *parts, f"start({config!r}, reader)", ""])


def bootstrap(path: str) -> str:
    """The few bytes that are injected: run the file at ``path`` (in the target's own root) in a namespace of
    its own. It leaves no name behind in ``__main__`` and never raises, whatever the file does."""
    if not re.fullmatch(r"[A-Za-z0-9/._-]+", path):
        raise ValueError(f"unfit path {path!r}")
    return (
        f"try:\n exec(compile(open({path!r}).read(),'<latencyprism>','exec'),{{'__name__':'_lp'}})\n"
        "except BaseException:pass\n"
    )
