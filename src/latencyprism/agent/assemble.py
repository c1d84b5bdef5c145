"""Joins the probe's source files into the one text that is run inside a target."""

from __future__ import annotations

import marshal
import re
from importlib.resources import files
from importlib.util import MAGIC_NUMBER
from typing import Any

from latencyprism.records import ring
from latencyprism.records.step import NULL

READERS = ("vllm", "sglang", "transformers", "tgi", "anchor")

TEXT_NAME = "<latencyprism>"
"""The file name of the probe's code, in tracebacks and for telling its frames from others."""

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
    parts = [_join(_source("core"), done)]
    parts += [_join(text, done) for text in (_source("begin"), _source("verify"), reader)]
    return "\n".join([_constants(), *parts, f"start({config!r}, verified(reader))", ""])


def pack(text: str) -> bytes:
    """``text`` as ``bootstrap`` reads it: compiled by this interpreter, and as source for those of another
    version.

    Compiling takes some 5 ms, in which the target would do nothing else; loading what is compiled takes a
    tenth."""
    code = marshal.dumps(compile(text, TEXT_NAME, "exec"))
    return MAGIC_NUMBER + len(code).to_bytes(4, "little") + code + text.encode("utf-8")


def bootstrap(path: str) -> str:
    """The few bytes that are injected: run the file at ``path`` (in the target's own root), packed or plain
    source, in a namespace of its own. It leaves no name behind in ``__main__`` and never raises, whatever the
    file does."""
    if not re.fullmatch(r"[A-Za-z0-9/._-]+", path):
        raise ValueError(f"unfit path {path!r}")
    # A magic number ends in a carriage return and a line feed, as no source of ours does.
    inner = (
        "import sys,marshal\n"
        f"b=open({path!r},'rb').read()\n"
        "n=8+int.from_bytes(b[4:8],'little')if b[2:4]==b'\\r\\n'else 0\n"
        "m=sys.modules['_frozen_importlib_external'].MAGIC_NUMBER\n"
        f"exec(marshal.loads(b[8:n])if n and b[:4]==m else compile(b[n:],{TEXT_NAME!r},'exec'),"
        "{'__name__':'_lp'})"
    )
    return f"try:\n exec({inner!r},{{}})\nexcept BaseException:pass\n"
