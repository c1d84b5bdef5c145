"""Which SQL may run: one SELECT over the tables that are there, with functions that only compute.

The statement is parsed by ClickHouse itself, as data, and its tree is walked: everything that is not known to
be harmless is refused. Whatever reads files, dictionaries, settings or the network, or says where it runs, is
not.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from latencyprism.errors import BadInput

_NODES = {
    "SelectWithUnionQuery", "SelectIntersectExceptQuery", "SelectQuery", "ExpressionList", "Function",
    "Identifier", "TableIdentifier", "Literal", "Subquery", "TablesInSelectQuery",
    "TablesInSelectQueryElement",
    "TableExpression", "TableJoin", "ArrayJoin", "Asterisk", "QualifiedAsterisk", "ColumnsTransformerList",
    "ColumnsExceptTransformer", "WithElement", "WindowDefinition", "WindowListElement", "OrderByElement",
    "InterpolateElement", "SampleRatio",
}  # fmt: skip
TABLE_FUNCTIONS = {"numbers", "zeros", "generateseries", "generate_series", "values", "sqlstandardvalues"}
_CATEGORIES = (
    "Type Conversion", "Mathematical", "Bit", "Bitmap", "Arrays", "String Search", "JSON", "Arithmetic",
    "Dates and Times", "Hash", "Time Window", "String Splitting", "Time Series", "String Replacement",
    "String",
    "Random Number", "Encoding", "Tuple", "Map", "Null", "Comparison", "Rounding", "Distance", "Conditional",
    "Logical", "Aggregate Functions", "UUID",
)  # fmt: skip
_ALSO = (
    "bar", "formatReadableSize", "formatReadableQuantity", "formatReadableTimeDelta", "toTypeName",
    "materialize", "identity", "ignore", "transform", "runningDifference", "neighbor", "version", "throwIf",
    "rowNumberInAllBlocks", "finalizeAggregation", "runningAccumulate", "isConstant", "lambda",
    "caseWithExpression", "nested",
)  # fmt: skip
_COMBINATORS = (
    "if", "array", "map", "distinct", "ordefault", "ornull", "resample", "foreach", "argmin", "argmax",
    "state", "merge",
)  # fmt: skip
"""What ClickHouse lets one add to the name of an aggregate function: ``countIf``."""
MOST_SQL_BYTES = 100_000

FUNCTIONS_SQL = (
    "SELECT name, alias_to, is_aggregate OR categories IN ("
    + ", ".join(f"'{name}'" for name in _CATEGORIES)
    + ") OR name IN ("
    + ", ".join(f"'{name}'" for name in _ALSO)
    + ") FROM system.functions"
)
"""Asks ClickHouse for its functions: name, what it is an alias of, 1 where its kind is harmless."""


def quoted(text: str) -> str:
    """As a string literal of SQL."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def allowed_functions(rows: Iterable[tuple[str, str, int]]) -> frozenset[str]:
    """Names in lower case, from the answer to ``FUNCTIONS_SQL``."""
    listed = list(rows)
    good = {name for name, _, harmless in listed if harmless}
    good |= {name for name, real, _ in listed if real in good}
    # One name for something else in another spelling must not let that through.
    bad = {name.lower() for name, real, _ in listed if name not in good}
    return frozenset({name.lower() for name in good} - bad | {name.lower() for name in _ALSO})


def check(parsed: str, functions: frozenset[str]) -> None:
    """``parsed``: what ``parseQueryToJSON`` made of the statement. BadInput, saying what is not allowed."""
    tree = json.loads(parsed)
    if not isinstance(tree, dict) or tree.get("type") not in (
        "SelectWithUnionQuery",
        "SelectIntersectExceptQuery",
    ):
        raise _refused("it is not a SELECT", "begin with SELECT or WITH; --tables lists what there is")
    pending: list[tuple[str, Any]] = [("", tree)]
    while pending:
        key, node = pending.pop()
        if isinstance(node, list):
            pending += [(key, entry) for entry in node]
        elif isinstance(node, dict):
            if "type" in node:
                _check_node(key, node, functions)
            pending += list(node.items())


def _check_node(key: str, node: dict[str, Any], functions: frozenset[str]) -> None:
    kind = node.get("type")
    if node.get("out_file") is not None:
        raise _refused("INTO OUTFILE is not allowed", "write the result with -o")
    if node.get("format_ast") is not None:
        raise _refused("FORMAT is not allowed", "choose one with --format")
    if kind == "SetQuery":
        raise _refused("SETTINGS are not allowed")
    if kind not in _NODES:
        raise _refused(f"{str(kind)[:60]} is not allowed")
    name = str(node.get("name", ""))
    if kind == "Function":
        if key == "table_function":
            if name.lower() not in TABLE_FUNCTIONS:
                raise _refused(
                    f"the table function {name[:60]} is not allowed", "read the tables of --tables"
                )
        elif not _known(name.lower(), functions):
            raise _refused(f"the function {name[:60]} is unknown or not allowed")
    parts = node.get("name_parts")
    if kind == "TableIdentifier" and ((isinstance(parts, list) and len(parts) > 1) or "." in name):
        raise _refused(f"the table {name[:60]} is not there", "--tables lists those that are")
    if kind == "Identifier" and name.partition(".")[0].lower() in _DATABASES:
        raise _refused(f"{name[:60]} is not allowed")


def _known(name: str, functions: frozenset[str]) -> bool:
    while name not in functions:
        ending = next((e for e in _COMBINATORS if name.endswith(e) and len(name) > len(e)), None)
        if ending is None:
            return False
        name = name.removesuffix(ending)
    return True


_STATEMENTS = ("SelectWithUnionQuery", "SelectIntersectExceptQuery")
_DATABASES = {"system", "information_schema", "default", "_table_function"}


def _refused(why: str, remedy: str = "") -> BadInput:
    return BadInput("that SQL is not run", why, remedy)
