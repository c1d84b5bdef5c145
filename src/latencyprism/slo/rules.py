"""Alerting rules for Prometheus, made from the objectives: the same windows over our two counters."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from latencyprism.records.objective import Objective
from latencyprism.slo.objectives import Objectives
from latencyprism.slo.windows import BurnWindow
from latencyprism.slo.words import objective_words

REQUESTS, VIOLATIONS = "latencyprism_slo_requests_total", "latencyprism_slo_violations_total"
SHORTEST_S = 60.0
"""Prometheus scrapes every 15 to 60 s: a rate over less means nothing."""


def prometheus_rules(objectives: Objectives) -> str:
    """A rule file (YAML). Windows shorter than a minute become one; of two that become the same the first
    stays."""
    lines = [
        "# Made by latencyprism from a file of objectives.",
        "groups:",
        "  - name: latencyprism-slo",
        "    rules:",
    ]
    for objective in objectives.objectives:
        for length_s in _lengths(objectives.windows_of(objective)):
            lines += _record(objective, length_s)
        for window in _scrapable(objectives.windows_of(objective)):
            lines += _alert(objective, window)
    return "\n".join(lines) + "\n"


def _scrapable(windows: tuple[BurnWindow, ...]) -> Iterator[BurnWindow]:
    seen = set()
    for window in windows:
        pair = (max(window.long_s, SHORTEST_S), max(window.short_s, SHORTEST_S))
        if pair not in seen:
            seen.add(pair)
            yield window._replace(long_s=pair[0], short_s=pair[1])


def _lengths(windows: tuple[BurnWindow, ...]) -> list[float]:
    return sorted({length for w in _scrapable(windows) for length in (w.long_s, w.short_s)})


def _series(objective: Objective, length_s: float) -> str:
    return f'latencyprism:slo_error_ratio:rate{_span(length_s)}{{objective="{objective.label}"}}'


def _record(objective: Objective, length_s: float) -> list[str]:
    span, chosen = _span(length_s), f'{{objective="{objective.label}"}}'
    ratio = f"sum without (replica, pid, instance) (rate({VIOLATIONS}{chosen}[{span}])) / "
    ratio += f"sum without (replica, pid, instance) (rate({REQUESTS}{chosen}[{span}]))"
    return [
        f"      - record: latencyprism:slo_error_ratio:rate{span}",
        f"        expr: {_quoted(ratio)}",
        "        labels:",
        f"          objective: {_quoted(objective.label)}",
    ]


def _alert(objective: Objective, window: BurnWindow) -> list[str]:
    limit = f"{window.burn * objective.budget:.6g}"
    expression = (
        f"{_series(objective, window.long_s)} > {limit} and {_series(objective, window.short_s)} > {limit}"
    )
    severity = "page" if window.level == "page" else "ticket"
    lines = [
        "      - alert: LatencyPrismBudgetBurn",
        f"        expr: {_quoted(expression)}",
        "        labels:",
        f"          severity: {severity}",
        f"          objective: {_quoted(objective.label)}",
        f"          long: {_quoted(_span(window.long_s))}",
    ]
    if objective.tenant is not None:
        lines.append(f"          tenant: {_quoted(objective.tenant)}")
    burnt = f"its budget burns {window.burn:g} times too fast over {_span(window.long_s)}"
    text = f"{objective_words(objective)}: {burnt}"
    return [*lines, "        annotations:", f"          summary: {_quoted(text)}"]


def _span(seconds: float) -> str:
    """As Prometheus writes it, to the second."""
    whole = max(1, round(seconds))
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if whole % size == 0:
            return f"{whole // size}{unit}"
    return f"{whole}s"


def _quoted(text: str) -> str:
    """A YAML string; JSON's strings are ones, and braces of templates would be taken for such."""
    return json.dumps(text.replace("{{", "{ {"), ensure_ascii=False)


def metrics_text(objectives: Sequence[Mapping[str, Any]], ready: bool) -> str:
    """The counters that the rules read, in Prometheus's text form; ``objectives``: as ``SloWatch.describe``
    tells them."""
    lines = []
    for name, key, text in (
        (REQUESTS, "requests", "Requests that an objective applies to."),
        (VIOLATIONS, "violations", "Those of them that violate it."),
    ):
        lines += [f"# HELP {name} {text}", f"# TYPE {name} counter"]
        lines += [
            f'{name}{{objective="{one["objective"]}",pid="{one["pid"]}"}} {one[key]}' for one in objectives
        ]
    lines += ["# HELP latencyprism_ready 0 while a budget burns.", "# TYPE latencyprism_ready gauge"]
    return "\n".join([*lines, f"latencyprism_ready {int(ready)}"]) + "\n"
