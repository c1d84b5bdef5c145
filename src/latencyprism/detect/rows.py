"""Lines of a text table that nobody vouches for: plain or gzip, read one at a time, bounded."""

from __future__ import annotations

import csv
import gzip
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from latencyprism.errors import BadInput

LINE_MAX = 65536
COLUMNS_MAX = 512
_GZIP = b"\x1f\x8b"
_NUMBER = re.compile(r"[+-]?(?:\d{1,30}(?:\.\d{0,30})?|\.\d{1,30})(?:[eE][+-]?\d{1,3})?", re.ASCII)
_NULLS = ("", "null", "NULL", "None", "\\N")
_INTEGER_MAX = 2**63 - 1


class RowError(Exception):
    """One row that cannot be used; ``final``: nothing after it can be read either."""

    def __init__(self, why: str, column: str = "", final: bool = False) -> None:
        super().__init__(why)
        self.why, self.column, self.final = why, column, final


def open_table(path: Path) -> IO[bytes]:
    """The file as bytes, unpacked if it is gzip (by its content, whatever its name). BadInput if it cannot
    be opened."""
    try:
        raw = path.open("rb")
        packed = raw.peek(2)[:2] == _GZIP
    except OSError as error:
        raise BadInput(f"cannot read {path}", error.strerror or str(error)) from error
    return gzip.GzipFile(fileobj=raw) if packed else raw  # type: ignore[return-value]


def lines(table: IO[bytes]) -> Iterator[list[str] | RowError]:
    """Fields of each line, or why it has none. Quoted line breaks are not supported."""
    while True:
        try:
            line = table.readline(LINE_MAX + 1)
        except (EOFError, OSError, zlib.error) as error:
            yield RowError(f"the file cannot be unpacked further ({error})", final=True)
            return
        if not line:
            return
        yield _fields(line)


def _fields(line: bytes) -> list[str] | RowError:
    if len(line) > LINE_MAX:
        return RowError(f"a line longer than {LINE_MAX} bytes: this is no table", final=True)
    if b"\0" in line:
        return RowError("binary data, not text")
    try:
        text = line.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError:
        return RowError("binary data, not UTF-8 text")
    try:
        rows = list(csv.reader([text], strict=True))
    except csv.Error as error:
        return RowError(str(error))
    return [field.strip() for field in rows[0]] if rows else []


def number(text: str, column: str) -> float | None:
    """A finite decimal number; None for an empty field (not observed)."""
    if text in _NULLS:
        return None
    if not _NUMBER.fullmatch(text):
        raise RowError(f"{text[:40]!r} is no number", column)
    value = float(text)
    if value - value != 0.0:
        raise RowError(f"{text[:40]!r} is not finite", column)
    return value


def integer(text: str, column: str) -> int | None:
    """A whole number of at most 63 bits, also written as 12.0; None for an empty field."""
    if text.isdecimal() and text.isascii() and len(text) < 19:
        return int(text)
    value = number(text, column)
    if value is None:
        return None
    whole = int(text) if re.fullmatch(r"[+-]?\d{1,30}", text, re.ASCII) else int(value)
    if whole != value and abs(whole - value) > abs(value) * 1e-15:
        raise RowError(f"{text[:40]!r} is not a whole number", column)
    if abs(whole) > _INTEGER_MAX:
        raise RowError(f"{text[:40]!r} is too large", column)
    return whole
