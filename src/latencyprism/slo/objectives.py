"""Objectives from a TOML file, read strictly: what makes no sense is an error that says why."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from latencyprism.errors import BadInput
from latencyprism.records.objective import METRICS, Objective
from latencyprism.records.request import ROUTES
from latencyprism.slo.windows import BurnWindow, standard_windows
from latencyprism.tomlfile import parse_toml

PERIOD_S = 30 * 86400.0
_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_METRIC = re.compile(rf"({'|'.join(METRICS)})(?:_p(\d+))?")
_LIMIT = re.compile(r"<\s*(\S+?)\s*(us|ms|s|min|m)")
_SPAN = re.compile(r"(\d+(?:\.\d+)?)\s*(s|min|m|h|d)")
_SELECTORS = ("model", "port", "route", "tenant", "period")
LONGEST_LIMIT_S, SHORTEST_PERIOD_S, LONGEST_PERIOD_S = 3600.0, 60.0, 366 * 86400.0
MOST = 200
_BIGGEST = 1 << 20


@dataclass(frozen=True)
class Objectives:
    """All of a file. ``windows``: those that the file gives itself, else None."""

    objectives: tuple[Objective, ...]
    windows: tuple[BurnWindow, ...] | None = None

    def windows_of(self, objective: Objective) -> tuple[BurnWindow, ...]:
        return self.windows or standard_windows(objective.period_s)

    def for_server(self, models: frozenset[str], port: int | None) -> list[Objective]:
        """Those that hold for a server known by these model names, on this port."""
        return [
            o
            for o in self.objectives
            if (o.model is None or o.model in models) and (o.port is None or o.port == port)
        ]


def read_objectives(path: Path) -> Objectives:
    """BadInput where the file cannot be read or means nothing."""
    try:
        with path.open("rb") as file:
            raw = file.read(_BIGGEST + 1)
        text = raw.decode("utf-8")
    except OSError as error:
        raise BadInput(f"cannot read {path}", error.strerror or str(error)) from None
    except UnicodeDecodeError:
        raise BadInput(f"cannot read {path}", "it is no UTF-8 text", "objectives are a TOML file") from None
    if len(raw) > _BIGGEST:
        raise BadInput(f"cannot read {path}", "it is larger than 1 MiB", "objectives are a short TOML file")
    return parse_objectives(text, str(path))


def parse_objectives(text: str, source: str = "the objectives") -> Objectives:
    """``text``: TOML as docs/slo.md tells it."""
    table = parse_toml(text, source)
    groups, windows = table.pop("objective", []), table.pop("window", None)
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise _wrong(source, "objective must be tables", "write [[objective]]")
    period_s = _period(table.get("period"), source)
    found: list[Objective] = []
    for group in [table, *groups]:
        found += _group(group, period_s, source)
        if group is not table and not any(key not in _SELECTORS for key in group):
            raise _wrong(source, "an [[objective]] without an objective", 'add one: ttft_p99 = "< 2 s"')
    if not found:
        raise _wrong(source, "it holds no objective", 'write one: ttft_p99 = "< 2 s"')
    if len(found) > MOST:
        raise _wrong(source, f"{len(found)} objectives, at most {MOST} are kept")
    _refuse_doubles(found, source)
    return Objectives(tuple(found), None if windows is None else _windows(windows, found, source))


def _group(group: Mapping[str, Any], period_s: float, source: str) -> list[Objective]:
    model, port, tenant = group.get("model"), group.get("port"), group.get("tenant")
    for name, value in (("model", model), ("tenant", tenant)):
        if value is not None and (not isinstance(value, str) or not re.fullmatch(r"[^\s\"\\]{1,200}", value)):
            raise _wrong(source, f"{name} = {value!r}", "give it a name in quotes, without blanks")
    if port is not None and (type(port) is not int or not 0 < port < 65536):
        raise _wrong(source, f"port = {port!r}", "a port is a number from 1 to 65535")
    route = group.get("route")
    if route is not None and route not in ROUTES:
        remedy = f"known: {', '.join(ROUTES)}. For any other class of requests give it a port of its own"
        raise _wrong(source, f"route = {route!r} cannot be told from others", remedy)
    if tenant is not None and port is None and route is None:
        raise _wrong(
            source,
            f"tenant = {tenant!r} without a port or a route",
            "only these tell one tenant's requests from others",
        )
    if "period" in group:
        period_s = _period(group["period"], source)
    found = []
    for key, value in group.items():
        if key not in _SELECTORS:
            share, metric = _quantile(key, source)
            limit_ns = _limit(key, value, source)
            found.append(Objective(metric, share, limit_ns, period_s, model, port, tenant, route))
    return found


def _quantile(key: str, source: str) -> tuple[float, str]:
    """(0.99, "ttft") of ``ttft_p99``; p99 where none is given."""
    match = _METRIC.fullmatch(key)
    if match is None:
        raise _wrong(source, f"unknown key {key!r}", f"known: {', '.join(METRICS)}, each with _p50 to _p9999")
    metric, digits = match[1], match[2] or "99"
    if (
        not 2 <= len(digits) <= 4
        or digits.startswith("0")
        or (len(digits) > 2 and not digits.startswith("9"))
    ):
        why = f"{key}: p{digits} is no percentile that leaves a budget"
        raise _wrong(source, why, "write p50 to p99, p999 for 99.9 %, p9999 for 99.99 %")
    return float(f"{digits[:2]}.{digits[2:] or 0}") / 100.0, metric


def _limit(key: str, value: object, source: str) -> int:
    match = _LIMIT.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        raise _wrong(source, f"{key} = {value!r} is no limit", f'write {key} = "< 2 s" (us, ms, s, min)')
    try:
        seconds = float(match[1]) * _UNITS[match[2]]
    except ValueError:
        raise _wrong(source, f"{key} = {value!r}: {match[1]!r} is no number") from None
    if not math.isfinite(seconds) or not 1e-6 <= seconds <= LONGEST_LIMIT_S:
        raise _wrong(source, f"{key} = {value!r}", "a limit is from 1 us to 1 hour")
    return round(seconds * 1e9)


def _period(value: object, source: str) -> float:
    if value is None:
        return PERIOD_S
    seconds = _span(value, "period", source)
    if not SHORTEST_PERIOD_S <= seconds <= LONGEST_PERIOD_S:
        raise _wrong(source, f"period = {value!r}", "a budget's period is from a minute to 366 days")
    return seconds


def _span(value: object, key: str, source: str) -> float:
    match = _SPAN.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        raise _wrong(source, f"{key} = {value!r} is no length of time", f'write {key} = "30d" (s, min, h, d)')
    return float(match[1]) * _UNITS[match[2]]


def _refuse_doubles(found: list[Objective], source: str) -> None:
    """One server must not have two limits for one thing, nor a stricter percentile with a looser limit."""
    for place, one in enumerate(found):
        for other in found[place + 1 :]:
            if _what(one) != _what(other):
                continue
            if one.share == other.share:
                raise _wrong(source, f"two objectives {one.label}", "leave one of them out")
            low, high = sorted((one, other), key=lambda o: o.share)
            if high.limit_ns < low.limit_ns:
                why = f"{high.label} is below {low.label}, which can then never be missed alone"
                raise _wrong(source, why, "the higher percentile has the higher limit")


def _what(one: Objective) -> tuple[object, ...]:
    return one.metric, one.model, one.port, one.route


def _windows(given: object, objectives: list[Objective], source: str) -> tuple[BurnWindow, ...]:
    if not isinstance(given, list) or not given or not all(isinstance(w, dict) for w in given):
        raise _wrong(source, "window must be tables", "write [[window]]")
    found = []
    for table in given:
        unknown = set(table) - {"long", "short", "burn", "level"}
        if unknown:
            raise _wrong(
                source, f"[[window]] with {', '.join(sorted(unknown))}", "known: long, short, burn, level"
            )
        burn, level = table.get("burn"), table.get("level", "page")
        long_s = _span(table.get("long"), "long", source)
        short_s = _span(table["short"], "short", source) if "short" in table else long_s / 12
        if type(burn) not in (int, float) or not 0 < burn <= 1e4:
            raise _wrong(
                source, f"[[window]] burn = {burn!r}", "a burn rate is a number above 0, such as 14.4"
            )
        if level not in ("page", "evidence"):
            raise _wrong(source, f"[[window]] level = {level!r}", "it is page or evidence")
        if not 0.1 <= short_s < long_s:
            raise _wrong(source, f"[[window]] short of {short_s:g} s, long of {long_s:g} s",
                         "the short window is shorter than the long one and at least 0.1 s")  # fmt: skip
        found.append(BurnWindow(long_s, short_s, float(burn), level))
    found.sort(key=lambda w: w.long_s)
    for one, other in pairwise(found):
        if one.long_s == other.long_s or one.burn <= other.burn:
            spans = f"{one.long_s:g} s and {other.long_s:g} s"
            why = f"windows of {spans} overlap: burn {one.burn:g} and {other.burn:g}"
            raise _wrong(
                source, why, "the longer window has the smaller burn rate, else it never fires first"
            )
    longest = found[-1].long_s
    short = next((o for o in objectives if o.period_s < longest), None)
    if short is not None:
        why = f"a window of {longest:g} s is longer than the period of {short.label}, {short.period_s:g} s"
        raise _wrong(source, why)
    for objective in objectives:
        if found[0].burn * objective.budget > 1.0 and all(w.burn * objective.budget > 1.0 for w in found):
            why = f"no window can ever fire for {objective.label}: burn {found[-1].burn:g} is too high"
            raise _wrong(source, why, "at most 1 / budget can burn")
    return tuple(found)


def _wrong(source: str, why: str, remedy: str = "") -> BadInput:
    return BadInput(f"cannot use {source}", why, remedy)
