"""An incident as one HTML file: no script, nothing fetched, light and dark, readable in a mail or offline."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from latencyprism.faces import report_charts as charts
from latencyprism.faces.contrast import Change, Contrast, contrast
from latencyprism.faces.readings import Moved, moved
from latencyprism.faces.report_style import STYLE
from latencyprism.faces.story import other_causes, when
from latencyprism.faces.wording import (
    alert_sentence,
    clean,
    ms,
    number,
    part_of,
    percent,
    quantity,
    terms_words,
    verdict_sentence,
)  # fmt: skip
from latencyprism.recorder import Capture
from latencyprism.recorder.atomic import replace_file
from latencyprism.recorder.drawing import alert_time_ns
from latencyprism.records import Alert, Step

_COUNTERS_SHOWN = 24
_REPLICAS_SHOWN = 4


def write_report(
    path: str | os.PathLike[str],
    capture: Capture,
    *,
    title: str | None = None,
    acts: Sequence[charts.Act] = (),
    expected_ms: Sequence[float | None] | None = None,
    capture_path: str | os.PathLike[str] | None = None,
) -> int:
    """Write the report whole or not at all; returns its size in bytes. PrismError if it cannot be written.

    ``acts``: (name, start_ns, end_ns) stretches to shade, the last of several as bad. ``expected_ms``:
    aligned with ``capture.steps``, in place of ``capture.expected_ms``. ``capture_path``: the file to name
    as the one to open in Perfetto.
    """
    if expected_ms is None:
        expected_ms = capture.expected_ms
    if expected_ms is None or len(expected_ms) != len(capture.steps):
        expected_ms = [None] * len(capture.steps)
    page = "\n".join(_page(capture, title, acts, expected_ms, capture_path))
    return replace_file(path, [page.encode("utf-8", "xmlcharrefreplace")], "the report")


def _e(text: object) -> str:
    return escape(clean(text), quote=True)


def _page(
    capture: Capture,
    title: str | None,
    acts: Sequence[charts.Act],
    expected_ms: Sequence[float | None],
    capture_path: str | os.PathLike[str] | None,
) -> Iterator[str]:
    headline = title or _headline(capture)
    yield "<!doctype html>"
    yield f'<html lang="en"><head><meta charset="utf-8"><title>{_e(headline)}</title>'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<style>{STYLE}</style></head><body><main>"
    yield from _top(capture, headline)
    yield from _times(capture, acts, expected_ms)
    found = contrast(capture.steps, capture.alerts[0]) if capture.alerts else None
    if found is not None:
        yield from _parts(found)
    yield from _evidence(capture)
    yield from _counters(capture)
    yield from _files(capture, capture_path)
    yield "</main></body></html>"


def _headline(capture: Capture) -> str:
    if capture.verdict is not None:
        return verdict_sentence(capture.verdict)
    if capture.alerts:
        return "Steps took longer than expected; no diagnosis was made"
    return "No alert was raised"


def _top(capture: Capture, headline: str) -> Iterator[str]:
    about = [str(capture.meta[key]) for key in ("engine", "host") if capture.meta.get(key)]
    if capture.steps:
        about.append(when(capture, capture.steps[0].start_ns, "%Y-%m-%d %H:%M:%S UTC"))
    yield f'<header><p class="brand">{_e(" · ".join(["LatencyPrism", *filter(None, about)]))}</p>'
    yield f"<h1>{_e(headline)}</h1>"
    lead = (
        alert_sentence(capture.alerts[0])
        if capture.alerts
        else "All steps here stayed within what was expected."
    )
    yield f'<p class="lead">{_e(lead)}</p></header>'
    for notice in capture.notices:
        yield f'<section class="note">{_e(notice)}</section>'
    if capture.alerts:
        yield f'<div class="facts">{"".join(_facts(capture.alerts[0], capture))}</div>'


def _facts(alert: Alert, capture: Capture) -> Iterator[str]:
    facts = [
        ("observed", ms(alert.observed_ms), "bad"),
        ("expected", ms(alert.expected_ms), ""),
        ("excess", percent(alert.excess), "bad"),
        ("from step end to alert", ms(alert.delay_ms), ""),
        ("alerts in this capture", str(len(capture.alerts)), ""),
    ]
    for name, value, kind in facts:
        yield f'<div class="{kind}"><b>{_e(value)}</b><span>{_e(name)}</span></div>'


def _key(name: str, colour: str, shape: str = "") -> str:
    style = "" if shape == "dashed" else f' style="background:var({colour})"'
    return f'<span class="key"><i class="{shape}"{style}></i>{_e(name)}</span>'


def _replicas(capture: Capture) -> list[tuple[str, int, int]]:
    """Replicas by engine, number and rank; the one that alerted first."""
    seen = dict.fromkeys((step.engine, step.replica, step.rank) for step in capture.steps)
    alerted = [(alert.engine, alert.replica, alert.rank) for alert in capture.alerts]
    return sorted(seen, key=lambda key: (key not in alerted[:1], key not in alerted, key))


def _times(
    capture: Capture, acts: Sequence[charts.Act], expected_ms: Sequence[float | None]
) -> Iterator[str]:
    if not capture.steps:
        yield "<section><h2>Step time</h2><p>No step is in this capture.</p></section>"
        return
    starts = [s.start_ns for s in capture.steps] + [start for _, start, _ in acts]
    ends = [s.end_ns for s in capture.steps] + [end for _, _, end in acts]
    axis = charts.TimeAxis(min(starts), max(ends))
    replicas = _replicas(capture)
    for key in replicas[:_REPLICAS_SHOWN]:
        yield from _one_replica(capture, key, axis, acts, expected_ms, alone=len(replicas) == 1)
    if len(replicas) > _REPLICAS_SHOWN:
        yield f'<p class="soft">{len(replicas) - _REPLICAS_SHOWN} more replicas are in the capture.</p>'


def _one_replica(
    capture: Capture,
    key: tuple[str, int, int],
    axis: charts.TimeAxis,
    acts: Sequence[charts.Act],
    expected_ms: Sequence[float | None],
    alone: bool,
) -> Iterator[str]:
    own = [(s, e) for s, e in zip(capture.steps, expected_ms) if (s.engine, s.replica, s.rank) == key]
    steps, expected = [s for s, _ in own], [e for _, e in own]
    alerts = [mark for mark in _alert_times(capture) if mark[2] == key]
    marks = [(time_ns, name) for time_ns, name, _ in alerts]
    name = "" if alone else f" of {key[0]} replica {key[1]} rank {key[2]}"
    chart, note = charts.step_time_chart(axis, steps, expected, acts, marks)
    known = any(value is not None for value in expected)
    yield f"<section><h2>Step time{_e(name)}</h2><p class='soft'>"
    yield _key("observed, median (band: shortest to longest)", "--step")
    yield _key("expected for the same work", "", "dashed") if known else "no expectation was recorded"
    yield f"</p><figure>{chart}<figcaption>{_e(note)}</figcaption></figure>"
    yield from _load(steps, axis, acts, marks)
    yield "</section>"


def _load(
    steps: Sequence[Step], axis: charts.TimeAxis, acts: Sequence[charts.Act], marks: Sequence[tuple[int, str]]
) -> Iterator[str]:
    for caption, unit, names in (
        ("Work: tokens scheduled per step", "tok", ("decode_tokens", "prefill_tokens")),
        ("Requests", "", ("running", "waiting")),
    ):
        lines = [(name.replace("_", " "), _column(steps, name)) for name in names]
        seen = [line for line in lines if line[1]]
        if not seen:
            continue
        keys = [_key(name, ("--decode", "--prefill")[place]) for place, (name, _) in enumerate(seen)]
        yield f'<figure><p class="soft" style="margin:14px 0 0">{_e(caption)}: {"".join(keys)}</p>'
        yield f"{charts.pair_chart(axis, seen, acts, marks, unit)}</figure>"


def _column(steps: Sequence[Step], name: str) -> list[tuple[int, float]]:
    return [(s.start_ns, float(value)) for s in steps if (value := getattr(s, name)) is not None]


def _alert_times(capture: Capture) -> list[tuple[int, str, tuple[str, int, int]]]:
    by_step = {(s.engine, s.replica, s.rank, s.step): s for s in capture.steps}
    told = []
    for alert in capture.alerts:
        key = (alert.engine, alert.replica, alert.rank)
        step = by_step.get((*key, alert.step))
        time_ns = alert_time_ns(alert, step, capture.meta.get("clock"), capture.steps)
        told.append((time_ns, alert_sentence(alert), key))
    return told


def _parts(found: Contrast) -> Iterator[str]:
    yield "<section><h2>Where the time went</h2>"
    yield (
        f'<p class="soft">Median step of {found.before_steps} before the onset and {found.during_steps} from '
        "the onset to the alert, of the same phase.</p>"
    )
    if found.parts:
        yield f"<figure>{charts.parts_chart(found)}</figure><p class='soft'>"
        yield "".join(_key(part.name, f"--p{place % 5}", "square") for place, part in enumerate(found.parts))
        yield "</p>"
    yield '<div class="wide"><table><tr><th>per step</th><th class="n">before</th><th class="n">during</th>'
    yield '<th class="n">share of the excess</th></tr>'
    for part in found.parts:
        yield _change_row(part.name, part, ms, part_of(part.share), part is found.holder)
    if found.within:
        yield _group("inside those parts")
    for part in found.within:
        yield _change_row(_WITHIN_WORDS.get(part.name, part.name), part, ms, "", False)
    if found.load:
        yield _group("work of the step")
    for part in found.load:
        yield _change_row(part.name.replace("_", " "), part, number, "", False)
    yield "</table></div></section>"


_WITHIN_WORDS = {
    "runqueue": "ready, waiting for a CPU",
    "offcpu": "asleep (off-CPU)",
    "throttled": "throttled by the CPU quota",
    "gc": "garbage collection",
    "collective": "collectives",
    "xpu_busy": "accelerator busy",
    "gap": "idle before the step",
}


def _group(name: str) -> str:
    return f'<tr><th colspan="4" class="group">{name}</th></tr>'


def _change_row(name: str, change: Change, words: Any, share: str, grew: bool) -> str:
    kind = "n grew" if grew else "n"
    return (
        f'<tr><td>{_e(name)}</td><td class="n">{_e(words(change.before))}</td>'
        f'<td class="{kind}">{_e(words(change.during))}</td><td class="{kind}">{_e(share)}</td></tr>'
    )


def _evidence(capture: Capture) -> Iterator[str]:
    verdict = capture.verdict
    if verdict is None:
        return
    looked = f"{verdict.cycles} steps, {verdict.seconds:.1f} s looked at."
    yield f'<section><h2>Evidence</h2><p class="soft">{_e(verdict_sentence(verdict))} {_e(looked)}</p>'
    if verdict.evidence:
        yield '<div class="wide"><table><tr><th>what was seen</th><th>signal</th><th class="n">normal</th>'
        yield '<th class="n">now</th></tr>'
        for entry in verdict.evidence:
            yield (
                f"<tr><td>{_e(entry.text)}</td><td><code>{_e(entry.signal)}</code></td>"
                f'<td class="n">{_e(number(entry.normal))}</td>'
                f'<td class="n">{_e(number(entry.now))}</td></tr>'
            )
        yield "</table></div>"
    if verdict.together:
        both = " and ".join(map(str, verdict.together))
        yield f"<p>Two causes at once ({verdict.together_probability or 0.0:.0%}): {_e(both)}.</p>"
    if verdict.remedy:
        yield f"<p>What to do: {_e(verdict.remedy)}</p>"
    if verdict.settle:
        yield f'<p class="soft">Would settle it: {_e("; ".join(map(str, verdict.settle)))}.</p>'
    others = other_causes(verdict)
    if others:
        told = ", ".join(f"{clean(r.cause, 60)} {r.probability:.0%}" for r in others)
        yield f'<p class="soft">Other causes weighed: {_e(told)}.</p>'
    if verdict.not_looked_at:
        yield f'<p class="soft">Not looked at: {_e("; ".join(map(str, verdict.not_looked_at)))}.</p>'
    yield "</section>"


def _counters(capture: Capture) -> Iterator[str]:
    if not capture.counters:
        return
    times = _alert_times(capture)
    onset_ns = _onset_ns(capture) if times else None
    shown = moved(capture.counters, onset_ns, times[0][0] if times else None)
    ends = [c.time_ns for c in capture.counters] + [s.end_ns for s in capture.steps]
    starts = [c.time_ns for c in capture.counters] + [s.start_ns for s in capture.steps]
    axis = charts.TimeAxis(min(starts), max(ends))
    yield "<section><h2>Counters of host and processes</h2>"
    order = "those that moved most at the onset first" if onset_ns is not None else "by name"
    yield f'<p class="soft">{min(len(shown), _COUNTERS_SHOWN)} of {len(shown)}, {order}.</p>'
    yield '<div class="wide"><table><tr><th>counter</th><th class="n">before</th>'
    yield '<th class="n">during</th><th></th></tr>'
    marks = [(time_ns, name) for time_ns, name, _ in times]
    for entry in shown[:_COUNTERS_SHOWN]:
        yield _counter_row(entry, axis, marks)
    yield "</table></div></section>"


def _counter_row(entry: Moved, axis: charts.TimeAxis, marks: Sequence[tuple[int, str]]) -> str:
    kind = "n grew" if entry.strength > 5 else "n"
    return (
        f'<tr><td>{_e(entry.name)} <span class="soft">{_e(" / ".join(entry.track))}</span></td>'
        f'<td class="n">{_e(quantity(entry.before, entry.unit, entry.rate))}</td>'
        f'<td class="{kind}">{_e(quantity(entry.during, entry.unit, entry.rate))}</td>'
        f'<td class="spark">{charts.sparkline(entry.points, axis, marks)}</td></tr>'
    )


def _onset_ns(capture: Capture) -> int | None:
    alert = capture.alerts[0]
    key = (alert.engine, alert.replica, alert.rank, alert.onset_step)
    held = (s.start_ns for s in capture.steps if (s.engine, s.replica, s.rank, s.step) == key)
    return next(held, None)


def _files(capture: Capture, capture_path: str | os.PathLike[str] | None) -> Iterator[str]:
    yield "<section><h2>Look closer</h2>"
    if capture_path is not None:
        yield (
            f"<ol><li>Open <code>https://ui.perfetto.dev</code>, choose “Open trace file” and take "
            f"<code>{_e(capture_path)}</code>. The file stays in the browser.</li>"
            f"<li>In words: <code>latencyprism explain {_e(capture_path)}</code>; one step: add "
            f"<code>--step {capture.alerts[0].step if capture.alerts else 'N'}</code>.</li></ol>"
        )
    if capture.alerts and capture.alerts[0].terms:
        terms = terms_words(capture.alerts[0].terms)
        yield f'<p class="soft">Expected for the step that alerted: {_e(terms)}.</p>'
    rows = list(_meta_rows(capture.meta))
    if rows:
        yield f'<div class="wide"><table>{"".join(rows)}</table></div>'
    yield "</section>"


_NOT_FOR_PEOPLE = {
    "clock", "loop_threads", "request_key", "roles", "alert_ns", "onset_ns", "begun_ns", "deep_probe",
}  # fmt: skip


def _meta_rows(meta: dict[str, Any]) -> Iterator[str]:
    for name, value in meta.items():
        if value in (None, "", [], {}) or name in _NOT_FOR_PEOPLE:
            continue
        if isinstance(value, dict):
            told = ", ".join(f"{key} {entry}" for key, entry in value.items())
        elif isinstance(value, list):
            told = "; ".join(map(str, value))
        else:
            told = str(value)
        yield f"<tr><td>{_e(str(name).replace('_', ' '))}</td><td><code>{_e(told)}</code></td></tr>"
