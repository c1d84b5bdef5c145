"""Attach and detach over and over: on each interpreter found, and on a live engine under load.

On the stand-in every cycle is one whole attachment as the watch makes it: files, probe, records, detach.
Windows with a cycle take turns with windows of the same length without one.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from latencyprism.agent.session import ProbePlan, ProbeSession
from latencyprism.attach import footprint
from latencyprism.attach.inject import Injector, InjectReport
from latencyprism.attach.shared_folder import shared_folder
from latencyprism.bench.attach_stand_in import OWNERS, StandIn
from latencyprism.engines.packs import load_pack
from latencyprism.errors import BadInput, PrismError, TargetRefused
from latencyprism.records import ring

VERSIONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
_RECORDS_WITHIN_S = 2.0
_WARM_UP_CYCLES = 2


def find_pythons() -> dict[str, str]:
    """Interpreters of the versions that are supported, on this machine: version -> path."""
    places = [Path(folder) for folder in _search_folders()]
    found = {}
    for version in VERSIONS:
        if sys.version_info[:2] == tuple(map(int, version.split("."))):
            found[version] = sys.executable
            continue
        for folder in places:
            if (folder / f"python{version}").exists():
                found[version] = str(folder / f"python{version}")
                break
    return found


def version_of(python: str) -> str:
    """(major.minor) of an interpreter, as it tells itself. Raises BadInput when it cannot be run."""
    ask = [python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
    try:
        told = subprocess.run(ask, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BadInput(f"cannot run {python}", str(error)) from None
    if told.returncode or not re.fullmatch(r"\d+\.\d+", told.stdout.strip()):
        raise BadInput(f"{python} is no Python interpreter")
    return told.stdout.strip()


def _search_folders() -> list[str]:
    home = Path.home()
    kept = [*home.glob(".pyenv/versions/*/bin"), *home.glob(".cache/latencyprism/python*/usr/bin")]
    # Before the PATH: there a version manager's stubs may stand for interpreters that it does not run.
    return [*map(str, sorted(kept)), *os.environ.get("PATH", "").split(os.pathsep)]


@dataclass
class Cycles:
    """What some cycles on one target came to."""

    reports: list[InjectReport] = field(default_factory=list)
    attached: list[tuple[int, int]] = field(default_factory=list)
    left_alone: list[tuple[int, int]] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    records: int = 0
    lost: int = 0
    silent: int = 0
    probe_errors: int = 0
    not_removed: int = 0
    files_left: int = 0
    hangs: int = 0


def run_stand_in(python: str, cycles: int, say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """``cycles`` attachments to a busy stand-in on ``python``; the figures of one version.

    Raises TargetRefused when it cannot be attached to at all, PrismError when it does not start.
    """
    plan = _plan()
    with StandIn(python) as target:
        injector = Injector(target.pid)
        version = injector.python.version
        warm = _cycle_all(target, plan, _WARM_UP_CYCLES)
        if not warm.reports:
            why = next(iter(warm.refused), "it did not answer")
            raise TargetRefused(f"Python {_told(version)} cannot be attached to", why)
        before = footprint.take(injector, OWNERS)
        done = _cycle_all(target, plan, cycles, say)
        crashed = not target.running()
        left = ["not looked at: the target is gone"]
        if not crashed:
            after = footprint.take(injector, OWNERS)
            left = after.left_since(before)
        attach_gaps, other_gaps = target.gaps_ns(done.attached), target.gaps_ns(done.left_alone)
        told = target.finish()
    return {
        "python": _told(version),
        "cycles": cycles,
        "attached": len(done.reports),
        "crashes": int(crashed or told is None),
        "hangs": done.hangs,
        "wrong": None if told is None else told["wrong"],
        "leftovers": len(left) + done.not_removed + done.files_left,
        "left": left,
        "compared": before.counts(),
        "refused": dict(done.refused),
        **timing(done.reports),
        **_gap_figures(attach_gaps, other_gaps),
        "records": done.records,
        "silent": done.silent,
        "probe_errors": done.probe_errors,
        "iterations": None if told is None else told["done"],
    }


def _told(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _plan() -> ProbePlan:
    entry = load_pack("vllm").ranges[-1]
    return ProbePlan("vllm", "engine+worker", 0, entry.hooks)


def _cycle_all(
    target: StandIn, plan: ProbePlan, cycles: int, say: Callable[[str], None] = lambda text: None
) -> Cycles:
    done = Cycles()
    for number in range(cycles):
        started = time.monotonic_ns()
        _cycle(target, plan, done)
        ended = time.monotonic_ns()
        if not target.gets_on():
            done.hangs += target.running()
            break
        # As long again without anything: the same load, the same machine, a moment later.
        time.sleep((ended - started) / 1e9)
        done.attached.append((started, ended))
        done.left_alone.append((ended, 2 * ended - started))
        if number % 250 == 249:
            say(f"{number + 1} cycles")
    return done


def _cycle(target: StandIn, plan: ProbePlan, done: Cycles) -> None:
    try:
        session = ProbeSession(target.pid, plan, slots=64)
    except TargetRefused as refusal:
        done.refused[refusal.why or refusal.what] += 1
        return
    try:
        done.reports.append(session.report)
        until, seen = time.monotonic() + _RECORDS_WITHIN_S, 0
        while not seen and time.monotonic() < until:
            time.sleep(0.001)
            seen = sum(record.kind in (ring.KIND_STEP, ring.KIND_DECODE) for record in session.read())
        health = session.health()
        done.records += health["records"]
        done.probe_errors += health["errors"]
        done.silent += not seen
    finally:
        done.not_removed += not session.close()
        folder, _ = shared_folder(target.pid)
        done.files_left += len(list(folder.glob(f"lprism-{session.nonce:016x}*")))


def quantile(values: list[float], q: float) -> float | None:
    """The value below which a share ``q`` of them lies (nearest rank); None when there are none."""
    return round(sorted(values)[min(len(values) - 1, int(q * len(values)))], 1) if values else None


def timing(reports: list[InjectReport]) -> dict[str, Any]:
    """How long the main thread stood still (``held``), from the request to stop until it was let go
    (``stop``), and until the probe had answered (``ack``). A target that is asked without a stop was held
    for 0."""
    held = [report.held_us for report in reports]
    return {
        "held_us_p50": quantile(held, 0.5),
        "held_us_p99": quantile(held, 0.99),
        "held_us_max": quantile(held, 1.0),
        "stop_us_p50": quantile([report.stop_us for report in reports], 0.5),
        "stop_us_p99": quantile([report.stop_us for report in reports], 0.99),
        "ack_ms_p50": quantile([report.ack_ms for report in reports], 0.5),
        "ack_ms_p99": quantile([report.ack_ms for report in reports], 0.99),
        "routes": dict(Counter(report.route for report in reports)),
        "stops": sum(report.stops for report in reports),
    }


def _gap_figures(attach_ns: list[int], other_ns: list[int]) -> dict[str, Any]:
    most, least = max(attach_ns, default=None), max(other_ns, default=None)
    return {
        "target_gap_ratio": None if most is None or not least else round(most / least, 2),
        "gap_ms_attach": None if most is None else round(most / 1e6, 2),
        "gap_ms_without": None if least is None else round(least / 1e6, 2),
        "gap_ms_p99_attach": quantile([gap / 1e6 for gap in attach_ns], 0.99),
        "gap_ms_p99_without": quantile([gap / 1e6 for gap in other_ns], 0.99),
    }


def run_versions(
    pythons: dict[str, str], cycles: int, say: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """``run_stand_in`` for each, told as soon as it is done, since a thousand cycles take minutes; a version
    that cannot be attached to has its reason under ``error``."""
    found: dict[str, dict[str, Any]] = {}
    for version, python in pythons.items():
        say(f"Python {version}")
        try:
            found[version] = run_stand_in(python, cycles, say)
        except PrismError as error:
            found[version] = {"python": version, "cycles": 0, "error": str(error)}
        say(json.dumps({version: found[version]}))
    return found
