"""Causes that come from within a Python process: a thread in it that holds what its steps need."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from typing import Any

from latencyprism.errors import BadInput
from latencyprism.inject.injection import Effect, Interval, Plan, Report
from latencyprism.inject.lease import Tenancy
from latencyprism.inject.request import Request, share_of
from latencyprism.tomlfile import parse_toml

_ENOUGH = 0.6
_PLACE = re.compile(r"([\w.]+):(\w+)\.(\w+)")


def gil(request: Request) -> Plan:
    """``python.gil``."""
    return _shared(request, "gil", "the interpreter's lock held {share:.0f} % of the time")


def collect(request: Request) -> Plan:
    """``python.gc``."""
    return _shared(request, "collect", "{rounds} collections, {share:.0f} % of the time")


def lock(request: Request) -> Plan:
    """``python.lock``."""
    return _shared(request, "lock", "of {count} locks, waited for {share:.0f} % of the time")


def flood(request: Request) -> Plan:
    """``log.flood``."""
    return _shared(request, "flood", "{count} lines, {share:.0f} % of the time")


def event_loop(request: Request) -> Plan:
    """``engine.event_loop``."""
    return _shared(request, "event_loop", "{count} event loop blocked {share:.0f} % of the time")


def compete(request: Request) -> Plan:
    """``cpu.oversubscription`` of a target that computes on one thread."""
    options = {"stat": f"/proc/self/task/{request.target.busiest}/stat"}
    text = "a thread of its own had {share:.0f} % of the CPU of its busiest"
    request.strength_up_to(1.0)
    return _shared(request, "compete", text, options)


def tokenizer(request: Request) -> Plan:
    """``engine.tokenizer``: ``at`` (module:Class.method) instead of the places that are known."""
    added_ms = request.strength_up_to(4.0) * request.reference_ms
    if request.at is None:
        text = files("latencyprism.inject").joinpath("places.toml").read_text("utf-8")
        known = parse_toml(text, "places.toml")["tokenizer"]
        places = [(*each["place"], each["part"] * added_ms) for each in known]
    else:
        match = _PLACE.fullmatch(request.at)
        if match is None:
            raise BadInput("--at is no method", f"{request.at[:80]!r}", "write it as module:Class.method")
        places = [(*match.groups(), added_ms)]
    return _plan(request, "slow_call", 0.5, {"places": places}, _calls_effect)


def _calls_effect(reports: Sequence[Report], _ran_s: float) -> Effect:
    calls = sum(report.get("count", 0) for report in reports)
    added_ms = sum(report.get("harm_ns", 0) for report in reports) / 1e6
    text = f"{calls} calls slowed, {added_ms:.0f} ms of CPU added"
    return Effect(calls > 0, float(calls), 1.0, "calls", "; ".join([text, *said(reports)]))


def _shared(request: Request, part: str, text: str, options: Mapping[str, Any] | None = None) -> Plan:
    """A tenant that disturbs for a share of the time, which it measures itself."""
    share = share_of(request.strength_up_to(4.0))
    return _plan(request, part, share, options or {}, _share_effect(share, text))


def _plan(
    request: Request,
    part: str,
    share: float,
    options: Mapping[str, Any],
    effect: Callable[[Sequence[Report], float], Effect],
) -> Plan:
    tenancy = Tenancy(request.target.pid, part, share, options, time.monotonic_ns)
    spec = {"file": tenancy.descriptor, "duration_ns": int(request.duration_s * 1e9)}
    return Plan("lessee.py", [spec], intervals, effect, (tenancy.descriptor,), tenancy.end)


def intervals(reports: Sequence[Report]) -> list[Interval]:
    """From the first harm until the target said that it has put everything back."""
    return [
        Interval(
            int(r["begun_ns"]), int(r["ended_ns"]), f"by thread {r['thread']}, {r['harm_ns'] / 1e6:.0f} ms"
        )
        for r in reports
        if r.get("begun_ns")
    ]


def _share_effect(share: float, text: str) -> Callable[[Sequence[Report], float], Effect]:
    def effect(reports: Sequence[Report], _ran_s: float) -> Effect:
        ended = [report for report in reports if report.get("begun_ns")]
        wall_ns = sum(r["ended_ns"] - r["begun_ns"] for r in ended)
        measured = sum(r["harm_ns"] for r in ended) / wall_ns if wall_ns else 0.0
        rounds, count = sum(r["rounds"] for r in ended), sum(r["count"] for r in ended)
        words = [text.format(share=100 * measured, rounds=rounds, count=count), f"asked: {100 * share:.0f} %"]
        return Effect(
            measured >= _ENOUGH * share, measured, share, "share of time", "; ".join(words + said(reports))
        )

    return effect


def said(reports: Sequence[Report]) -> list[str]:
    """What the tenants had to say, and whether one is not known to have gone."""
    words = [str(report["said"]) for report in reports if report.get("said")]
    return words + [
        "the target has not said that it is gone" for report in reports if report.get("gone") is False
    ]
