"""Scenarios: which causes disturb whom, when, and what should be said about it, as a TOML file."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from latencyprism.errors import BadInput, PrismError
from latencyprism.inject.catalogue import CATALOGUE, start
from latencyprism.inject.injection import Effect, Injection, Interval
from latencyprism.records.verdict import CAUSES
from latencyprism.tomlfile import parse_toml

MOST_FILE_BYTES = 1 << 20
LONGEST_S = 3600.0
PROCESSES = ("target", "parent")
OPTIONS: dict[str, type | tuple[type, ...]] = {
    "stop_ms": (int, float),
    "every_s": (int, float),
    "directory": str,
    "at": str,
    "reference_ms": (int, float),
    "model": str,
    "prompt_tokens": int,
}


@dataclass(frozen=True, slots=True)
class Act:
    """``at_s`` from the start of the scenario. ``process``: the target, or its parent (vLLM: the API server
    of an EngineCore)."""

    cause: str
    at_s: float
    for_s: float
    strength: float | None
    process: str
    options: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Expected:
    """Between these times the verdict should be one of ``causes``."""

    from_s: float
    to_s: float
    causes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Scenario:
    """``engine``: one of the lab to be started, None: the target is given; ``profile``: load of the lab,
    None: none is made here."""

    name: str
    duration_s: float
    acts: tuple[Act, ...]
    expected: tuple[Expected, ...]
    engine: str | None = None
    profile: str | None = None


@dataclass(slots=True)
class Played:
    """What came of one act. ``refused``: why it could not be injected."""

    act: Act
    pid: int
    truth: list[Interval] = field(default_factory=list)
    effect: Effect | None = None
    refused: str | None = None


def read(path: Path) -> Scenario:
    """Raises BadInput that names the file and what is wrong in it."""
    try:
        with path.open("rb") as file:
            text = file.read(MOST_FILE_BYTES + 1).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read {path}", str(error)) from None
    if len(text) > MOST_FILE_BYTES:
        raise BadInput(f"cannot read {path}", "it is larger than a scenario may be")
    return parse(parse_toml(text, str(path)), str(path))


def parse(table: Mapping[str, Any], source: str) -> Scenario:
    """The scenario in a table; BadInput for anything that is missing, unknown, or out of range."""
    of = _Table(table, source, {"name", "duration_s", "target", "workload", "inject", "expect"})
    duration_s = of.number("duration_s", 0.1, LONGEST_S)
    target = _Table(of.value("target", dict, {}), f"{source}: [target]", {"engine"})
    workload = _Table(of.value("workload", dict, {}), f"{source}: [workload]", {"profile"})
    acts = [
        _act(each, f"{source}: [[inject]] {n}", duration_s)
        for n, each in enumerate(of.value("inject", list, []), 1)
    ]
    expected = [
        _expected(each, f"{source}: [[expect]] {n}", duration_s)
        for n, each in enumerate(of.value("expect", list, []), 1)
    ]
    if not acts and not expected:
        raise BadInput(f"{source} is no scenario", "it has neither [[inject]] nor [[expect]]")
    return Scenario(
        of.value("name", str, ""),
        duration_s,
        tuple(sorted(acts, key=lambda act: act.at_s)),
        tuple(expected),
        target.value("engine", str, None),
        workload.value("profile", str, None),
    )


def _act(table: Any, source: str, duration_s: float) -> Act:
    of = _Table(table, source, {"cause", "at_s", "for_s", "strength", "process", *OPTIONS})
    cause = of.value("cause", str, "")
    if cause not in CATALOGUE:
        raise BadInput(
            f"{source} cannot be injected", f"no cause {cause!r}", f"one of: {', '.join(CATALOGUE)}"
        )
    at_s, for_s = of.number("at_s", 0, duration_s), of.number("for_s", 0.1, duration_s)
    if at_s + for_s > duration_s:
        raise BadInput(
            f"{source} is out of range", f"it ends at {at_s + for_s} s, the scenario at {duration_s} s"
        )
    process = of.value("process", str, "target")
    if process not in PROCESSES:
        raise BadInput(f"{source}: process is {process!r}", remedy=f"one of: {', '.join(PROCESSES)}")
    strength = of.number("strength", 0.001, 4.0) if "strength" in of.table else None
    options = {name: of.value(name, kind, None) for name, kind in OPTIONS.items() if name in of.table}
    return Act(cause, at_s, for_s, strength, process, options)


def _expected(table: Any, source: str, duration_s: float) -> Expected:
    of = _Table(table, source, {"from_s", "to_s", "causes"})
    causes = of.value("causes", list, [])
    unknown = [str(cause) for cause in causes if cause not in CAUSES]
    if not causes or unknown:
        raise BadInput(f"{source} expects no cause that there is", ", ".join(unknown) or "causes is empty")
    from_s, to_s = of.number("from_s", 0, duration_s), of.number("to_s", 0, duration_s)
    if from_s >= to_s:
        raise BadInput(f"{source} is out of range", f"from_s is {from_s}, to_s {to_s}")
    return Expected(from_s, to_s, tuple(causes))


class _Table:
    """A table of which every key is known."""

    def __init__(self, table: Any, source: str, keys: set[str]) -> None:
        if not isinstance(table, dict):
            raise BadInput(f"{source} is no table")
        strange = sorted(set(table) - keys)
        if strange:
            raise BadInput(
                f"{source} has {strange[0]!r}", "no such key", f"there are: {', '.join(sorted(keys))}"
            )
        self.table, self.source = table, source

    def value(self, name: str, kind: type | tuple[type, ...], default: Any) -> Any:
        found = self.table.get(name, default)
        if found is not None and (
            not isinstance(found, kind) or (isinstance(found, bool) and kind is not bool)
        ):
            raise BadInput(f"{self.source}: {name} has the wrong type", f"{found!r:.80}")
        return found

    def number(self, name: str, least: float, most: float) -> float:
        found = self.value(name, (int, float), math.nan)
        if not (math.isfinite(found) and least <= found <= most):
            raise BadInput(
                f"{self.source}: {name} is out of range", f"{found}", f"from {least:g} to {most:g}"
            )
        return float(found)


def play(
    scenario: Scenario,
    pids: Mapping[str, int],
    *,
    i_know: bool = False,
    url: str | None = None,
    model: str | None = None,
    tell: Callable[[float, str], None] = lambda _at_s, _text: None,
) -> tuple[int, list[Played]]:
    """Disturbs on time; (start, CLOCK_MONOTONIC ns, what came of each act). ``pids``: of each of
    ``PROCESSES`` that the acts name. A cause that is refused is noted, and the rest goes on. However this is
    left, everything is put back."""
    begun_ns = time.monotonic_ns()
    played, running = [], []
    with ExitStack() as stack:
        for act in scenario.acts:
            _sleep_until(begun_ns, act.at_s)
            one = Played(act, pids[act.process])
            played.append(one)
            given = {"url": url, "model": model, **act.options}
            try:
                injection = start(act.cause, one.pid, act.strength, act.for_s, i_know=i_know, **given)
            except PrismError as error:
                one.refused = str(error)
                tell(act.at_s, f"{act.cause} refused: {error}")
                continue
            stack.enter_context(injection)
            running.append((one, injection, _waiter(injection)))
            tell(act.at_s, f"{act.cause} on {one.pid} for {act.for_s:g} s")
        _sleep_until(begun_ns, scenario.duration_s)
    for one, injection, waiter in running:
        waiter.join()
        one.truth, one.effect = injection.truth(), injection.effect_check()
    return begun_ns, played


def _waiter(injection: Injection) -> threading.Thread:
    """Takes note of the end when it comes: the next act may be long in coming."""
    waiter = threading.Thread(target=injection.wait, daemon=True)
    waiter.start()
    return waiter


def _sleep_until(begun_ns: int, at_s: float) -> None:
    time.sleep(max(0.0, at_s - (time.monotonic_ns() - begun_ns) / 1e9))
