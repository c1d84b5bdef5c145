"""SQL over captures, by an embedded ClickHouse (chDB): tables in memory, then read-only."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from importlib import import_module
from typing import Any

from latencyprism.errors import BadInput, PrismError
from latencyprism.recorder.capture import Capture
from latencyprism.recorder.columns import COLUMNS, Table, tables_of
from latencyprism.recorder.export_tables import arrow_table
from latencyprism.recorder.sql_gate import FUNCTIONS_SQL, MOST_SQL_BYTES, allowed_functions, check, quoted

FORMATS = {
    "table": "PrettyCompactMonoBlock", "csv": "CSVWithNames", "tsv": "TSVWithNames", "jsonl": "JSONEachRow",
    "json": "JSON", "markdown": "Markdown", "parquet": "Parquet",
}  # fmt: skip
_KINDS = {str: "String", int: "Int64", float: "Float64"}
_LIMITS = {"max_memory_usage": 4 << 30, "max_threads": 2, "max_result_bytes": 1 << 30, "readonly": 1}
_LOOK = {
    "output_format_pretty_color": 0, "output_format_pretty_max_rows": 1_000_000,
    "output_format_pretty_row_numbers": 0, "output_format_write_statistics": 0,
    "output_format_json_quote_64bit_integers": 0, "output_format_pretty_fallback_to_vertical": 0,
    "output_format_pretty_single_large_number_tip_threshold": 0,
}  # fmt: skip


class Sql:
    """Holds the tables of some captures until ``close``; ``ask`` answers. PrismError without chDB."""

    def __init__(self, captures: Iterable[tuple[str, Capture]], seconds: float = 60.0) -> None:
        try:
            session = import_module("chdb.session").Session
        except ImportError as error:
            missing = "pip install 'latencyprism[store]'"
            raise PrismError("SQL needs chDB", f"it cannot be loaded ({error})", missing) from None
        self._session: Any = session()
        self._functions = self._allowed()
        self._ask("CREATE DATABASE captured")
        for table in tables_of(captures):
            self._fill(table)
        self._ask("USE captured")
        settings = {**_LOOK, "max_execution_time": seconds, **_LIMITS}
        self._ask("SET " + ", ".join(f"{name} = {value}" for name, value in settings.items()))

    def _allowed(self) -> frozenset[str]:
        rows = json.loads(self._ask(FUNCTIONS_SQL, "JSONCompact"))["data"]
        return allowed_functions((str(name), str(real), int(good)) for name, real, good in rows)

    def _fill(self, table: Table) -> None:
        kinds = ", ".join(
            f"`{name}` {_KINDS[kind] if name == 'capture' else f'Nullable({_KINDS[kind]})'}"
            for name, kind in table.columns
        )
        self._ask(f"CREATE TABLE captured.{table.name} ({kinds}) ENGINE = Memory")
        if len(table):
            packed = arrow_table(table)  # found by its name in the next line
            self._session.query(f"INSERT INTO captured.{table.name} SELECT * FROM Python(packed)")
            del packed

    def _ask(self, sql: str, form: str = "CSV") -> bytes:
        return bytes(self._session.query(sql, form).bytes())

    def ask(self, sql: str, form: str = "table") -> bytes:
        """The answer in one of ``FORMATS``. BadInput if the SQL is wrong or not allowed."""
        text = sql.strip().rstrip(";").strip()
        if not text:
            raise BadInput("there is no SQL to run")
        if len(text.encode("utf-8", "replace")) > MOST_SQL_BYTES or "\0" in text:
            raise BadInput("that SQL is not run", f"it is longer than {MOST_SQL_BYTES} bytes, or no text")
        try:
            parsed = json.loads(self._ask(f"SELECT parseQueryToJSON({quoted(text)})", "JSONCompact"))
            check(parsed["data"][0][0], self._functions)
            return self._ask(text, FORMATS[form])
        except RecursionError:
            raise BadInput("that SQL is not run", "it is nested too deeply") from None
        except (RuntimeError, UnicodeError) as error:
            raise BadInput("that SQL cannot be answered", words_of(str(error))) from None

    def close(self) -> None:
        self._session.close()


def words_of(error: str) -> str:
    """What ClickHouse says, without its codes and our wrapping."""
    text = " ".join(error.split())
    text = re.sub(r"^(?:Code: \d+\. DB::Exception: )+", "", text)
    text = re.sub(r":? In scope SELECT parseQueryToJSON\(.*", "", text)
    text = re.sub(r" \([A-Z_]+\)(?: \(version [\d.]+\))?\.?(?: \([A-Z_]+\))?$", "", text)
    return "".join(c for c in text if c.isprintable())[:600].rstrip(" .:")


def tables_in_words() -> Any:
    """Each table with its columns: name and type."""
    return {
        name: [{"name": column, "type": _KINDS[kind]} for column, kind in columns]
        for name, columns in COLUMNS.items()
    }
