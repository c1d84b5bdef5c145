"""A capture's tables as files that other programs read: Parquet, and CSV as ClickHouse's CSVWithNames."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from latencyprism.errors import BadInput, PrismError
from latencyprism.recorder.atomic import replace_file
from latencyprism.recorder.capture import Capture
from latencyprism.recorder.columns import Table, tables_of


def arrow_table(table: Table) -> Any:
    """A ``pyarrow.Table``. PrismError where pyarrow is not installed."""
    try:
        import pyarrow
    except ImportError:
        what, remedy = "tables of that kind need pyarrow", "pip install 'latencyprism[store]'"
        raise PrismError(what, "it is not installed", remedy) from None
    kinds = {str: pyarrow.string(), int: pyarrow.int64(), float: pyarrow.float64()}
    try:
        columns = [
            pyarrow.array(_plain(values) if kind is str else values, kinds[kind])
            for (_, kind), values in zip(table.columns, table.values)
        ]
    except (pyarrow.ArrowException, OverflowError, TypeError) as error:
        raise PrismError(f"the table {table.name} cannot be packed", str(error)[:200]) from None
    return pyarrow.table(columns, names=[name for name, _ in table.columns])


def _plain(values: Iterable[Any]) -> list[Any]:
    """Text that is no UTF-8 is escaped."""
    return [v if v is None else str(v).encode("utf-8", "backslashreplace").decode() for v in values]


def write_parquet(folder: Path, capture: Capture, name: str) -> int:
    """A file for each table in a new ``folder``; bytes in all."""
    tables = [(table.name, arrow_table(table)) for table in tables_of([(name, capture)])]
    import pyarrow.parquet

    def chunks(packed: Any) -> Iterator[bytes]:
        buffer = io.BytesIO()
        pyarrow.parquet.write_table(packed, buffer, compression="zstd")
        yield buffer.getvalue()

    make_new(folder)
    return sum(replace_file(folder / f"{t}.parquet", chunks(packed), "the table") for t, packed in tables)


def write_csv(folder: Path, capture: Capture, name: str) -> int:
    """The same as CSV with names in its first line; an empty cell is not observed."""
    make_new(folder)
    tables = tables_of([(name, capture)])
    return sum(replace_file(folder / f"{t.name}.csv", _csv(t), "the table") for t in tables)


def _csv(table: Table) -> Iterator[bytes]:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(name for name, _ in table.columns)
    for number, row in enumerate(table.rows()):
        writer.writerow(row)
        if number % 1000 == 999:
            yield buffer.getvalue().encode("utf-8", "backslashreplace")
            buffer.seek(0)
            buffer.truncate()
    yield buffer.getvalue().encode("utf-8", "backslashreplace")


def make_new(folder: Path) -> None:
    """BadInput if it is there and not empty."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        full = next(folder.iterdir(), None) is not None
    except OSError as error:
        raise BadInput(f"cannot write tables into {folder}", error.strerror or str(error)) from None
    if full:
        raise BadInput(f"cannot write tables into {folder}", "it is not empty", "name another folder with -o")
