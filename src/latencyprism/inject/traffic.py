"""Causes that lie in what an engine is asked, and in the way its answers take."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from latencyprism.errors import BadInput
from latencyprism.inject.injection import Effect, Interval, Plan, Report
from latencyprism.inject.request import Request, share_of

_URL = re.compile(r"http://(127\.0\.0\.1|localhost):(\d{1,5})/?")
_ENOUGH = 0.6
_FULL_LOAD = 32
"""Long outputs at once at strength 1: with a prompt each, more than a KV cache of 8 full contexts holds."""
Judge = Callable[[Mapping[str, Any], float], tuple[bool, float, float, str, str]]


def delay(request: Request) -> Plan:
    """``net.delay``: half of what is added to a round trip on each way."""
    host, port = _place(request)
    added_ms = request.strength_up_to(4.0) * request.reference_ms
    from_ns = time.monotonic_ns() + int(request.lead_s * 1e9)
    to_ns = from_ns + int(request.duration_s * 1e9)
    spec = {
        "host": host,
        "port": port,
        "delay_ns": int(added_ms / 2 * 1e6),
        "from_ns": from_ns,
        "to_ns": to_ns,
        "until_ns": to_ns + int(request.lead_s * 1e9),
    }
    return Plan("proxy.py", [spec], _stretches, _delay_effect(added_ms / 2))


def _delay_effect(asked_ms: float) -> Callable[[Sequence[Report], float], Effect]:
    def effect(reports: Sequence[Report], _ran_s: float) -> Effect:
        delayed = sum(report.get("delayed", 0) for report in reports)
        total_ms = sum(report.get("delay_ns", 0) for report in reports) / 1e6
        connections = sum(report.get("connections", 0) for report in reports)
        measured = total_ms / delayed if delayed else 0.0
        errors = [str(report["error"]) for report in reports if "error" in report]
        text = f"{delayed} pieces of {connections} connections delayed by {measured:.1f} ms each way"
        return Effect(measured >= _ENOUGH * asked_ms, measured, asked_ms, "ms", "; ".join([text, *errors]))

    return effect


def long_prompt(request: Request) -> Plan:
    """``workload.long_prompt``."""
    load = {"prompt_tokens": request.prompt_tokens, "max_tokens": 1, "at_once": 1}
    return _load(request, load, share_of(request.strength_up_to(4.0)), _answers)


def preemption(request: Request) -> Plan:
    """``workload.preemption``."""
    at_once = max(1, math.ceil(request.strength_up_to(4.0) * _FULL_LOAD))
    load = {"prompt_tokens": 64, "max_tokens": max(2, request.prompt_tokens - 64), "at_once": at_once}
    return _load(request, load, 1.0, _preemptions)


def prefix_cache_lost(request: Request) -> Plan:
    """``workload.prefix_cache_lost``."""
    load = {"prompt_tokens": max(2, request.prompt_tokens // 2), "max_tokens": 1, "at_once": 2}
    return _load(request, load, share_of(request.strength_up_to(4.0)), _hits)


def _load(request: Request, load: Mapping[str, Any], share: float, judge: Judge) -> Plan:
    host, port = _place(request)
    spec = {
        "host": host,
        "port": port,
        "model": request.model,
        "share": share,
        "until_ns": request.until_ns(),
        **load,
    }

    def effect(reports: Sequence[Report], _ran_s: float) -> Effect:
        ended = [report for report in reports if "sent" in report]
        if not ended:
            return Effect(False, 0.0, 1.0, "requests", "nothing was sent")
        report = ended[0]
        effective, measured, asked, unit, text = judge(report, share)
        parts = [text, f"{report['sent']} requests sent, {report['answered']} answered"]
        if report["refused"]:
            parts.append(f"{report['refused']} refused ({report['why']})")
        return Effect(effective, measured, asked, unit, "; ".join(parts))

    return Plan("client.py", [spec], _stretches, effect)


def _answers(report: Mapping[str, Any], share: float) -> tuple[bool, float, float, str, str]:
    busy = report["service_ns"] / max(1, report["ended_ns"] - report["begun_ns"])
    text = f"{report['tokens']} prompt tokens, under way {100 * busy:.0f} % of the time"
    return report["answered"] > 0, busy, share, "share of time", text


def _preemptions(report: Mapping[str, Any], _share: float) -> tuple[bool, float, float, str, str]:
    before, after = report["before"].get("preemptions"), report["after"].get("preemptions")
    if before is None or after is None:
        return False, 0.0, 1.0, "preemptions", "the server tells no number of preemptions"
    return after > before, after - before, 1.0, "preemptions", f"{after - before:.0f} preemptions"


def _hits(report: Mapping[str, Any], share: float) -> tuple[bool, float, float, str, str]:
    """The part of prompt tokens that came from the cache, before and during."""
    before, after = report["before"], report["after"]
    if "cache_queries" not in before or "cache_queries" not in after:
        return _answers(report, share)
    asked = after["cache_queries"] - before["cache_queries"]
    normal = before["cache_hits"] / before["cache_queries"] if before["cache_queries"] else 0.0
    now = (after["cache_hits"] - before["cache_hits"]) / asked if asked else normal
    text = f"of prompt tokens {100 * now:.0f} % came from the cache (before: {100 * normal:.0f} %)"
    return bool(report["answered"]) and now < normal, normal - now, normal, "part of prompt tokens", text


def _place(request: Request) -> tuple[str, int]:
    match = _URL.fullmatch(request.url or "")
    if match is None or not 0 < int(match[2]) < 65536:
        raise BadInput(
            "no engine to talk to", f"--url {request.url!r}", "give http://127.0.0.1:PORT, this machine only"
        )
    return "127.0.0.1", int(match[2])


def _stretches(reports: Sequence[Report]) -> list[Interval]:
    return [
        Interval(int(r["begun_ns"]), int(r["ended_ns"]), _detail(r))
        for r in reports
        if "ended_ns" in r and r["ended_ns"] > r["begun_ns"]
    ]


def _detail(report: Report) -> str:
    return f"{report['sent']} requests" if "sent" in report else f"{report['delayed']} pieces delayed"
