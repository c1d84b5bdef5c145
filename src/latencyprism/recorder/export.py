"""Captures in the formats of others, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from latencyprism.recorder.atomic import replace_file
from latencyprism.recorder.capture import Capture, write_capture
from latencyprism.recorder.export_events import chrome, folded, speedscope
from latencyprism.recorder.export_otlp import otlp
from latencyprism.recorder.export_tables import write_csv, write_parquet

_TEXT: dict[str, tuple[str, Callable[[Capture, str], Iterator[str]]]] = {
    "chrome": (".json", lambda capture, name: chrome(capture)),
    "speedscope": (".speedscope.json", speedscope),
    "folded": (".folded", lambda capture, name: folded(capture)),
    "otlp": (".otlp.json", otlp),
}
_FOLDERS = {"parquet": (".parquet", write_parquet), "csv": (".csv", write_csv)}
FORMATS = ("perfetto", *_TEXT, *_FOLDERS)


def default_output(source: Path, kind: str) -> Path:
    """Where it goes if nobody says, in the current folder."""
    suffix = ".copy.pftrace" if kind == "perfetto" else {**_TEXT, **_FOLDERS}[kind][0]
    return Path(source.name.removesuffix(".pftrace") + suffix)


def export(capture: Capture, name: str, kind: str, out: Path) -> int:
    """Write ``capture``, which is called ``name``, as ``kind`` (one of ``FORMATS``); bytes written."""
    if kind in _FOLDERS:
        return _FOLDERS[kind][1](out, capture, name)
    if kind == "perfetto":
        return write_capture(out, capture)
    chunks = _TEXT[kind][1](capture, name)
    return replace_file(out, (chunk.encode("utf-8", "backslashreplace") for chunk in chunks), "the export")
