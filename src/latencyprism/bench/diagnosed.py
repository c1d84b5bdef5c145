"""Injections on one real engine under load, each diagnosed against the healthy stretch before it.

One engine stays up. A round is a healthy stretch, then a few runs that share it as their reference: inject,
watch for some seconds, localise, wait until steps are as before. What was measured is kept as a line of JSON
a run, so that verdicts can be worked out again from frozen features.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from latencyprism import inject
from latencyprism.bench.observed import Observed
from latencyprism.diagnose.localiser import Compared, compared, localise
from latencyprism.diagnose.signals import Expectations, worked
from latencyprism.diagnose.workline import column
from latencyprism.errors import BadInput, PrismError
from latencyprism.lab import serve
from latencyprism.lab.launch import Options
from latencyprism.lab.load import Load
from latencyprism.lab.profiles import profile
from latencyprism.records import Verdict, Window
from latencyprism.sentinel.finish import split
from latencyprism.sentinel.priority import OnTime

LEARN_S, REFERENCE_S, SUSPECT_S, SETTLE_S, RECOVER_S, MOST_RECOVERY_S = 8.0, 16.0, 5.0, 0.3, 1.5, 8.0
RUNS_A_ROUND = 5
LOOKS_S = (1.0, 2.0, 3.0, 5.0)
HEALTHY = "none"
_CLIENTS = 4
_OPTIONS = Options()
"""The defaults of the lab; what they leave no room for (preemption) comes out as without effect."""
_ENGINE_ITSELF = frozenset({"python.gc", "python.lock", "log.flood"})
_SERVER = frozenset({"engine.tokenizer", "engine.event_loop"})


@dataclass(frozen=True, slots=True)
class Run:
    """``causes``: what is injected at once; empty for a healthy run."""

    causes: tuple[str, ...]
    strength: float
    number: int

    @property
    def key(self) -> tuple[str, float, int]:
        return ("+".join(self.causes) or HEALTHY, self.strength, self.number)


@dataclass
class Plan:
    """``seconds``: stop beginning new rounds after so long; what is left is done another time."""

    engine: str
    causes: Sequence[str]
    strengths: Sequence[float]
    runs: int
    pairs: Sequence[tuple[str, str]] = ()
    out: Path | None = None
    seconds: float | None = None
    healthy: int | None = None
    skipped: dict[str, str] = field(default_factory=dict)
    """Causes that could not be injected, and why."""

    def all_runs(self) -> list[Run]:
        """In rounds: every cause comes up before any comes twice, so that a part is a fair part."""
        wanted = []
        for number in range(self.runs):
            for strength in sorted(self.strengths, reverse=True):
                wanted += [Run((cause,), strength, number) for cause in self.causes]
                wanted += [Run(pair, strength, number) for pair in self.pairs if strength >= 0.5]
        healthy = self.healthy if self.healthy is not None else max(1, len(wanted) // 5)
        every = max(1, len(wanted) // healthy) if healthy else len(wanted) + 1
        out = []
        for place, run in enumerate(wanted):
            if place % every == 0 and place // every < healthy:
                out.append(Run((), 0.0, place // every))
            out.append(run)
        return out


def run(plan: Plan, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """The lines of this and of earlier calls with the same ``out``. Raises PrismError where the engine cannot
    be started or observed."""
    lines = list(read_lines(plan.out)) if plan.out is not None and plan.out.exists() else []
    done = {(line["engine"], line["truth"], line["strength"], line["run"]) for line in lines}
    left = [one for one in plan.all_runs() if (plan.engine, *one.key) not in done]
    for cause in plan.causes:
        if cause not in inject.CATALOGUE:
            plan.skipped[cause] = "the toolkit cannot inject it"
    left = [one for one in left if not set(one.causes) & set(plan.skipped)]
    say(f"{len(lines)} runs read, {len(left)} to do")
    if left:
        with _engine(plan.engine, say) as (server, observed):
            for line in _rounds(plan, server, observed, left, say):
                lines.append(line)
                if plan.out is not None:
                    with plan.out.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(line) + "\n")
    return lines


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Runs of a file; a last line that was cut off is left out. BadInput for a file of something else."""
    try:
        texts = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} cannot be read", str(error)) from error
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
            if not isinstance(line, dict) or not {"engine", "truth", "strength", "run", "shifts"} <= set(
                line
            ):
                raise ValueError("it is no run")
        except ValueError as error:
            if number == len(texts):
                return
            raise BadInput(f"{path} is no file of runs", f"line {number}: {error}") from error
        yield line


@contextlib.contextmanager
def _engine(engine: str, say: Callable[[str], None]) -> Iterator[tuple[serve.Server, Observed]]:
    with serve.start(engine, _OPTIONS) as server:  # type: ignore[arg-type]
        say(f"{engine} serves, started in {server.start_s:.0f} s")
        load = profile("mixed").but(clients=_CLIENTS, think_ms=0.0, prefix=64, duration_s=3600.0)
        # Engines that spin on every core would keep this thread waiting, and with it, while it has the
        # interpreter's lock, the one that renews the lease.
        with Load(server, load), OnTime(), Observed(server.pid) as observed:
            observed.pump(LEARN_S)
            yield server, observed


def _rounds(
    plan: Plan, server: serve.Server, observed: Observed, left: Sequence[Run], say: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    begun = time.monotonic()
    for at in range(0, len(left), RUNS_A_ROUND):
        if plan.seconds is not None and time.monotonic() - begun > plan.seconds - REFERENCE_S:
            say(f"{len(left) - at} runs are left for another time")
            return
        observed.pump(REFERENCE_S)
        until_ns = time.monotonic_ns()
        reference = observed.window(until_ns - int(REFERENCE_S * 1e9), until_ns)
        for one in left[at : at + RUNS_A_ROUND]:
            if set(one.causes) & set(plan.skipped):
                continue
            if plan.seconds is not None and time.monotonic() - begun > plan.seconds:
                return
            line = _one(plan, server, observed, one, reference, until_ns)
            if line is not None:
                top = line["verdict"][0]
                say(f"{line['truth']} {one.strength:g}: {top[0]} ({top[1]:.2f}), steps {line['slow']:+.2f}")
                yield line


def _one(
    plan: Plan, server: serve.Server, observed: Observed, one: Run, reference: Window, reference_ns: int
) -> dict[str, Any] | None:
    seconds = SETTLE_S + SUSPECT_S + 0.2
    with contextlib.ExitStack() as stack:
        injections = []
        for cause in one.causes:
            try:
                start = _start(cause, server, one.strength, seconds)
                injections.append(stack.enter_context(start))
            except PrismError as error:
                plan.skipped[cause] = str(error)
                return None
        observed.pump(SETTLE_S)
        since_ns = time.monotonic_ns()
        observed.pump(SUSPECT_S)
        until_ns = time.monotonic_ns()
    effects = [injection.effect_check() for injection in injections]
    roles = observed.watch.roles
    _, suspect = split(observed.window(since_ns, until_ns), since_ns)
    found = compared(reference, suspect, roles=roles)
    begun = time.perf_counter()
    verdict = localise(reference, suspect, roles=roles, not_available=observed.missing)
    took_ms = (time.perf_counter() - begun) * 1e3
    looks = _looks(reference, suspect, since_ns, roles)
    recovered_s = _recover(observed, reference)
    return {
        "engine": plan.engine,
        "truth": one.key[0],
        "strength": one.strength,
        "run": one.number,
        "effective": all(effect.effective for effect in effects),
        "effect": [effect.text for effect in effects],
        "slow": round(found.shifts["slow"].now - found.shifts["slow"].normal, 4)
        if "slow" in found.shifts
        else 0.0,
        "reference_age_s": round((since_ns - reference_ns) / 1e9, 1),
        "recovered_s": recovered_s,
        "localised_ms": round(took_ms, 1),
        "verdict": _ranked(verdict),
        "looks": looks,
        "culprits": [e.text for e in verdict.evidence if e.signal == "culprit"],
        "not_looked_at": verdict.not_looked_at,
        "shifts": shifts_of(found),
    }


def _start(cause: str, server: serve.Server, strength: float, seconds: float) -> inject.Injection:
    roles = server.roles
    if cause in _SERVER:
        pid = server.main_pid
    elif cause in _ENGINE_ITSELF:
        pid = server.pid
    else:
        pid = roles.get("worker", server.pid)
    return inject.start(cause, pid, strength, seconds, i_know=True, **_options(cause, server))


def _options(cause: str, server: serve.Server) -> dict[str, Any]:
    if cause.startswith("workload."):
        return {"url": server.url, "model": server.model}
    return {"directory": tempfile.gettempdir()} if cause == "disk.stall" else {}


def _looks(reference: Window, suspect: Window, since_ns: int, roles: dict[int, str]) -> list[list[Any]]:
    """Verdicts over the first seconds alone: seconds, cause, probability."""
    found: list[list[Any]] = []
    for seconds in LOOKS_S:
        until_ns = since_ns + int(seconds * 1e9)
        part = Window(
            [step for step in suspect.steps if step.end_ns <= until_ns],
            [span for span in suspect.spans if span.end_ns <= until_ns],
            [counter for counter in suspect.counters if counter.time_ns <= until_ns],
            [r for r in suspect.requests if (r.arrival_ns or 0) <= until_ns],
        )
        verdict = localise(reference, part, roles=roles)
        found.append([seconds, verdict.cause, round(verdict.probability, 4)])
    return found


def _recover(observed: Observed, reference: Window) -> float | None:
    """Seconds until steps took what they should again; None if they did not in time."""
    expected = Expectations.learn(worked(reference.steps))
    usual = _stretch(expected, reference)
    begun = time.monotonic()
    while time.monotonic() - begun < MOST_RECOVERY_S:
        observed.pump(RECOVER_S)
        now_ns = time.monotonic_ns()
        recent = observed.watch.recorder.window(now_ns - 1_000_000_000, now_ns)
        if _stretch(expected, recent) < 1.25 * usual:
            return round(time.monotonic() - begun, 1)
    return None


def _stretch(expected: Expectations | None, window: Window) -> float:
    steps = worked(window.steps)
    if expected is None or not steps:
        return 0.0 if expected is None else float("inf")
    return float(
        np.median((column(steps, "end_ns") - column(steps, "start_ns")) / expected.step.predict(steps))
    )


def _ranked(verdict: Verdict) -> list[list[Any]]:
    return [[entry.cause, round(entry.probability, 5)] for entry in verdict.ranking[:6]]


def shifts_of(found: Compared) -> dict[str, list[Any]]:
    """Signal -> where, normal, now, moved, sigma, spread: what verdicts are worked out from."""
    out: dict[str, list[Any]] = {}
    for name, shift in sorted(found.shifts.items()):
        numbers = [shift.normal, shift.now, shift.moved, shift.sigma, shift.spread]
        out[name] = [shift.where, *(round(float(v), 6) if np.isfinite(v) else None for v in numbers)]
    return out
