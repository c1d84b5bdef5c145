"""A capture told in words, for a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timezone
from typing import Any

from latencyprism.faces import collective_words, kernel_words, request_words, wording
from latencyprism.faces.contrast import Contrast, contrast
from latencyprism.faces.wording import clean, ms, number, part_of
from latencyprism.recorder import Capture
from latencyprism.recorder.drawing import step_gaps
from latencyprism.records import STEP_COLUMNS, Alert, Ranked, Step, Verdict
from latencyprism.records.device_spans import from_a_window
from latencyprism.timeline.breakdown import Breakdown, SpanIndex, break_down

_SPANS_SHOWN = 40


def slowest(capture: Capture, count: int) -> list[tuple[Step, float | None]]:
    """The steps furthest above their expectation (or, without one, the longest), with it in ms."""
    expected = capture.expected_ms or [None] * len(capture.steps)
    pairs = list(zip(capture.steps, expected))
    return sorted(pairs, key=lambda pair: -(pair[0].duration_ms - (pair[1] or 0.0)))[:count]


def when(capture: Capture, monotonic_ns: int, form: str = "%H:%M:%S.%f") -> str:
    """Wall time (UTC) of a CLOCK_MONOTONIC reading; empty if the capture holds no clock. Microseconds at
    the end of ``form`` are cut to milliseconds."""
    clock = capture.meta.get("clock")
    if not isinstance(clock, dict):
        return ""
    monotonic, realtime = clock.get("monotonic_ns"), clock.get("realtime_ns")
    if not isinstance(monotonic, int) or not isinstance(realtime, int):
        return ""
    try:
        told = datetime.fromtimestamp((realtime - monotonic + monotonic_ns) / 1e9, timezone.utc)
    except (ValueError, OverflowError, OSError):
        return ""
    return told.strftime(form)[:-3] if form.endswith("%f") else told.strftime(form)


def tell(capture: Capture, path: str, count: int, whole: bool = False) -> Iterator[str]:
    """The whole story, line by line, with ``count`` of the slowest steps and requests; ``whole``: all that is
    known of these requests."""
    yield from _heading(capture, path)
    for alert in capture.alerts:
        yield from ("", *_alert(alert))
    if not capture.alerts:
        yield from ("", "No alert is in this capture.")
    if capture.alerts:
        found = contrast(capture.steps, capture.alerts[0])
        if found is not None:
            yield from ("", *_contrast(found))
    yield from ("", *tell_verdict(capture.verdict))
    yield from kernel_words.tell(capture)
    met = list(collective_words.tell(capture))
    if met:
        yield from ("", *met)
    if count and capture.steps:
        yield from ("", *_slowest(capture, count))
    if count and capture.requests:
        yield from ("", *_slowest_requests(capture, count, whole))
    yield from ("", f"See it: open {clean(path)} at https://ui.perfetto.dev (the file stays in the browser).")


def _heading(capture: Capture, path: str) -> Iterator[str]:
    meta = capture.meta
    about = [clean(meta[key]) for key in ("engine", "host") if meta.get(key)]
    steps = capture.steps
    yield f"{clean(path)}" + (f": {', '.join(about)}" if about else "")
    seconds = (max(s.end_ns for s in steps) - steps[0].start_ns) / 1e9 if steps else 0.0
    yield (
        f"  {seconds:.1f} s, {len(steps)} steps, {len(capture.requests)} requests, "
        f"{len(capture.spans)} spans, {len(capture.counters)} readings of counters"
    )
    if isinstance(meta.get("pids"), dict):
        yield "  processes: " + ", ".join(f"{clean(role)} {clean(pid)}" for role, pid in meta["pids"].items())
    missing = meta.get("not_available")
    if isinstance(missing, list) and missing:
        yield "  not available: " + "; ".join(clean(entry) for entry in missing)
    for notice in capture.notices:
        yield f"  NOTE: {clean(notice)}"
    gone = sum(after.step - before.step - 1 for _, before, after in step_gaps(capture.steps))
    if gone:
        yield f"  NOTE: {gone} steps between the first and the last are not recorded"


def _alert(alert: Alert) -> Iterator[str]:
    late = "" if alert.delay_ms is None else f", said {ms(alert.delay_ms)} after the step ended"
    yield f"ALERT ({clean(alert.level)}, {clean(alert.kind)}) {clean(alert.time)}{late}"
    yield f"  {wording.alert_sentence(alert)}"
    if alert.terms:
        yield f"  expected: {wording.terms_words(alert.terms)}"
    if alert.where:
        yield f"  the excess is in: {clean(alert.where)}"


def _contrast(found: Contrast) -> Iterator[str]:
    yield (
        f"WHERE THE TIME WENT (median of {found.before_steps} steps before, {found.during_steps} during; "
        f"{ms(found.before_ms)} -> {ms(found.during_ms)})"
    )
    rows = [("", "before", "during", "share of excess")]
    rows += [(part.name, ms(part.before), ms(part.during), part_of(part.share)) for part in found.parts]
    rows += [(f"({part.name})", ms(part.before), ms(part.during), "") for part in found.within]
    rows += [(part.name, number(part.before), number(part.during), "") for part in found.load]
    for row in rows:
        yield f"  {row[0]:<16} {row[1]:>12} {row[2]:>12} {row[3]:>16}".rstrip()
    if found.holder is not None:
        yield f"  Most of the excess is in {found.holder.name}."


def tell_verdict(verdict: Verdict | None) -> Iterator[str]:
    yield f"VERDICT {wording.verdict_sentence(verdict)}"
    if verdict is None:
        return
    for entry in verdict.evidence:
        measured = f"normal {number(entry.normal)}, now {number(entry.now)}"
        yield f"  - {clean(entry.text)} ({clean(entry.signal)}: {measured})"
    if verdict.together:
        sure = f"{verdict.together_probability or 0.0:.0%}"
        yield f"  two causes at once ({sure}): {clean(' and '.join(verdict.together))}"
    if verdict.remedy:
        yield f"  what to do: {clean(verdict.remedy)}"
    for text in verdict.settle:
        yield f"  would settle it: {clean(text)}"
    others = other_causes(verdict)
    if others:
        yield "  others: " + ", ".join(f"{clean(r.cause)} {r.probability:.0%}" for r in others)
    for source in verdict.not_looked_at:
        yield f"  not looked at: {clean(source)}"


def other_causes(verdict: Verdict) -> list[Ranked]:
    """What else was weighed, likeliest first."""
    rest = [r for r in verdict.ranking if r.cause != verdict.cause and r.probability >= 0.01]
    return sorted(rest, key=lambda r: -r.probability)[:5]


def _slowest(capture: Capture, count: int) -> Iterator[str]:
    yield "SLOWEST STEPS" + (" (furthest above their expectation)" if capture.expected_ms else "")
    for step, expected in slowest(capture, count):
        yield f"  {_step_line(capture, step, expected)}"


def _slowest_requests(capture: Capture, count: int, whole: bool) -> Iterator[str]:
    yield "SLOWEST REQUESTS (by time that was not their own work)"
    for told in request_words.slowest(capture, count):
        lines = list(request_words.tell(told))
        yield from (f"  {line}" for line in (lines if whole else lines[:2]))


def _step_line(capture: Capture, step: Step, expected: float | None) -> str:
    said = "" if expected is None else f", expected {ms(expected)}"
    columns = ("requests", "prefill_tokens", "decode_tokens")
    load = [f"{value} {c.replace('_', ' ')}" for c in columns if (value := getattr(step, c)) is not None]
    at = when(capture, step.start_ns)
    return f"{at} step {step.step} {step.phase or ''} {ms(step.duration_ms)}{said}; {', '.join(load)}".strip(
        " ;"
    )


def tell_step(capture: Capture, number_of_step: int) -> Iterator[str]:
    """Everything about the steps with this number (one per replica and rank), and the spans in them."""
    expected = capture.expected_ms or [None] * len(capture.steps)
    for step, expectation in zip(capture.steps, expected):
        if step.step != number_of_step:
            continue
        yield _step_line(capture, step, expectation)
        for name, value in zip(STEP_COLUMNS, step):
            shown = "not seen" if value is None else clean(value)
            yield f"  {name:<18} {shown}{_in_ms(name, value)}"
        yield from _parts_of(capture, step)
        inside = [s for s in capture.spans if s.start_ns < step.end_ns and s.end_ns > step.start_ns]
        yield from kernel_words.of_step(inside)
        inside = [span for span in inside if not from_a_window(span)]
        for span in sorted(inside, key=lambda s: s.start_ns)[:_SPANS_SHOWN]:
            at = (span.start_ns - step.start_ns) / 1e6
            lane = " / ".join(clean(part, 60) for part in span.track)
            yield f"  +{at:.2f} ms {ms((span.end_ns - span.start_ns) / 1e6)} {lane}: {clean(span.name)}"
        if len(inside) > _SPANS_SHOWN:
            yield f"  and {len(inside) - _SPANS_SHOWN} spans more"


def _in_ms(name: str, value: Any) -> str:
    if not isinstance(value, int) or not name.endswith("_ns") or name in ("start_ns", "end_ns"):
        return ""
    return f"  ({ms(value / 1e6)})"


def _broken_down(capture: Capture, step: Step) -> Breakdown | None:
    """Within its neighbours: which execution is whose depends on them."""
    own = [
        s for s in capture.steps if (s.engine, s.replica, s.rank) == (step.engine, step.replica, step.rank)
    ]
    threads = capture.meta.get("loop_threads")
    thread = threads[0] if isinstance(threads, list) and threads and isinstance(threads[0], int) else None
    found = break_down(own, SpanIndex.of(capture.spans, thread))
    return next((one for one in found if one.step is step), None)


def _parts_of(capture: Capture, step: Step) -> Iterator[str]:
    found = _broken_down(capture, step)
    if found is None or not found.parts:
        return
    yield "  its parts, which add up to it:"
    for name, ns in found.sums.items():
        yield f"    {name:<16} {ms(ns / 1e6):>12} {ns / max(step.duration_ns, 1):>6.1%}"
    if found.states:
        told = sorted(found.states.items(), key=lambda state: -state[1])
        yield "  meanwhile its threads were: " + ", ".join(
            f"{clean(n)} {ms(ns / 1e6)}" for n, ns in told if ns
        )


def parts_of_step(capture: Capture, number_of_step: int) -> list[dict[str, Any]]:
    """For JSON: ``parts`` and ``states`` (ns) of each such step; ``gap_ns``, ``idle_ns`` before."""
    told = []
    for step in capture.steps:
        found = _broken_down(capture, step) if step.step == number_of_step else None
        if found is not None:
            told.append(
                {
                    "parts": found.sums,
                    "states": found.states,
                    "gap_ns": found.gap_ns,
                    "idle_ns": found.idle_ns,
                }
            )
    return told
