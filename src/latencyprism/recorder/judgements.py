"""Alerts and verdicts as plain JSON objects, and back from a file that may say anything."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

from latencyprism.records import Alert, Evidence, Ranked, Verdict

_REQUIRED = {
    "id": str, "kind": str, "level": str, "engine": str, "time": str,
    "replica": int, "rank": int, "step": int, "onset_step": int,
    "observed_ms": float, "expected_ms": float, "excess": float,
}  # fmt: skip

_OPTIONAL = {"delay_ms": float, "where": str, "text": str, "capture": str, "verdict": dict}
_NUMBERS = ("terms", "detectable")
_FIELDS = {field.name for field in fields(Alert)}


def alert_to_dict(alert: Alert) -> dict[str, Any]:
    return asdict(alert)


def alert_from_dict(told: object) -> Alert:
    """ValueError if a field is missing or of another type; fields not known here are left out."""
    if not isinstance(told, dict):
        raise ValueError("an alert is not an object")
    values: dict[str, Any] = {name: _typed(told, name, kind) for name, kind in _REQUIRED.items()}
    for name in _FIELDS.intersection(_OPTIONAL):
        values[name] = _optional(told, name, _OPTIONAL[name])
    for name in _FIELDS.intersection(_NUMBERS):
        numbers = _optional(told, name, dict)
        values[name] = None if numbers is None else {str(key): _number(ms) for key, ms in numbers.items()}
    machine = _optional(told, "machine", dict)
    if machine is not None:
        values["machine"] = {str(key): None if one is None else _number(one) for key, one in machine.items()}
    return Alert(**values)


def verdict_from_dict(told: object) -> Verdict:
    """ValueError if it is not one."""
    if not isinstance(told, dict):
        raise ValueError("a verdict is not an object")
    ranking = [
        Ranked(_typed(entry, "cause", str), _typed(entry, "probability", float))
        for entry in _list(told, "ranking")
    ]
    evidence = [
        Evidence(
            _typed(entry, "signal", str),
            _optional(entry, "normal", float),
            _optional(entry, "now", float),
            _typed(entry, "text", str),
        )
        for entry in _list(told, "evidence")
    ]
    return Verdict(
        cause=_typed(told, "cause", str),
        probability=_typed(told, "probability", float),
        ranking=ranking,
        evidence=evidence,
        cycles=_optional(told, "cycles", int) or 0,
        seconds=_optional(told, "seconds", float) or 0.0,
        not_looked_at=[str(entry) for entry in _list(told, "not_looked_at")],
        together=[str(entry) for entry in _list(told, "together")],
        together_probability=_optional(told, "together_probability", float),
        remedy=_optional(told, "remedy", str),
        settle=[str(entry) for entry in _list(told, "settle")],
    )


def _list(told: dict[str, Any], name: str) -> list[Any]:
    value = told.get(name, [])
    if not isinstance(value, list):
        raise ValueError(f"{name} is not a list")
    return value


def _optional(told: object, name: str, kind: type) -> Any:
    if isinstance(told, dict) and told.get(name) is None:
        return None
    return _typed(told, name, kind)


def _typed(told: object, name: str, kind: type) -> Any:
    if not isinstance(told, dict) or name not in told:
        raise ValueError(f"{name} is missing")
    value = told[name]
    if kind is float:
        return _number(value)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{name} is not {kind.__name__}")
    return value


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{value!r:.40} is not a number")
    try:
        return float(value)
    except OverflowError:
        raise ValueError("a number is too large") from None
