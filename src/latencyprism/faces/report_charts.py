"""Charts of a report as inline SVG: time runs to the right, all panels share one axis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from statistics import median

from latencyprism.faces.contrast import Contrast
from latencyprism.faces.wording import clean, ms, number
from latencyprism.records import Step

WIDTH, LEFT, RIGHT = 1000, 58, 14
_BINS = 420

Act = tuple[str, int, int]
"""Name, start and end (CLOCK_MONOTONIC ns) of a stretch to shade."""


@dataclass(slots=True)
class Bin:
    """What happened in one column of the chart."""

    time_ns: int
    values: list[float] = field(default_factory=list)


class TimeAxis:
    """Where a moment lies on the page."""

    def __init__(self, start_ns: int, end_ns: int) -> None:
        self.start_ns = start_ns
        self.span_ns = max(end_ns - start_ns, 1)

    def x(self, time_ns: float) -> float:
        share = (time_ns - self.start_ns) / self.span_ns
        return LEFT + min(max(share, 0.0), 1.0) * (WIDTH - LEFT - RIGHT)

    def bin(self, time_ns: int) -> int:
        return min(max(int((time_ns - self.start_ns) * _BINS / self.span_ns), 0), _BINS - 1)

    def ticks(self) -> list[tuple[float, str]]:
        seconds = self.span_ns / 1e9
        step = _nice(seconds / 8)
        return [
            (self.x(self.start_ns + count * step * 1e9), f"{round(count * step, 3):g} s")
            for count in range(int(seconds / step) + 1)
        ]


def _nice(rough: float) -> float:
    power = 1.0
    while power > rough:
        power /= 10
    while power * 10 <= rough:
        power *= 10
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)


def binned(axis: TimeAxis, points: Sequence[tuple[int, float]]) -> list[Bin]:
    """Points by column, in order of time, empty columns left out."""
    columns: dict[int, Bin] = {}
    for time_ns, value in points:
        columns.setdefault(axis.bin(time_ns), Bin(time_ns)).values.append(value)
    return [columns[place] for place in sorted(columns)]


class Panel:
    """One chart: a frame with a scale, to which lines and marks are added."""

    def __init__(self, axis: TimeAxis, height: int, top_value: float, unit: str, head: int = 10) -> None:
        self.axis, self.height, self.head = axis, height, head
        self.floor = height - 24
        self.tick = _nice(max(top_value, 1e-9) / 4)
        self.top_value = self.tick * (int(max(top_value, 1e-9) / self.tick * 0.999) + 1)
        self._unit = unit
        self._shapes: list[str] = []

    def y(self, value: float) -> float:
        share = min(max(value / self.top_value, 0.0), 1.0)
        return self.floor - share * (self.floor - self.head)

    def add(self, shape: str) -> None:
        self._shapes.append(shape)

    def line(self, points: Sequence[tuple[float, float]], kind: str) -> None:
        """A line through (time_ns, value), broken where nothing was seen for long."""
        most_ns = self.axis.span_ns / 25
        path, last = [], None
        for time_ns, value in points:
            move = "M" if last is None or time_ns - last > most_ns else "L"
            path.append(f"{move}{self.axis.x(time_ns):.1f} {self.y(value):.1f}")
            last = time_ns
        self.add(f'<path class="{kind}" d="{"".join(path)}"/>')

    def acts(self, acts: Sequence[Act], named: bool) -> None:
        for place, (name, start_ns, end_ns) in enumerate(acts):
            x, end = self.axis.x(start_ns), self.axis.x(end_ns)
            kind = "act-bad" if place and place == len(acts) - 1 else "act"
            self.add(
                f'<rect class="{kind}" x="{x:.1f}" y="{self.head}" width="{max(end - x, 0):.1f}" '
                f'height="{self.floor - self.head}"/>'
            )
            if named:
                said = escape(clean(name, 60))
                self.add(f'<text class="strong" x="{x + 6:.1f}" y="{self.head - 8}">{said}</text>')

    def alerts(self, times: Sequence[tuple[int, str]], named: bool) -> None:
        last_x = -1e9
        for time_ns, name in times:
            x = self.axis.x(time_ns)
            self.add(
                f'<line class="alert" x1="{x:.1f}" x2="{x:.1f}" y1="{self.head}" y2="{self.floor}">'
                f"<title>{escape(clean(name))}</title></line>"
            )
            if named and x - last_x > 60:
                side, anchor = (x - 5, "end") if x > WIDTH - 120 else (x + 5, "start")
                place = f'x="{side:.1f}" y="{self.head + 13}" text-anchor="{anchor}"'
                self.add(f'<text class="alert-word" {place}>alert</text>')
                last_x = x

    def hits(self, bins: Sequence[Bin], words: Callable[[Bin], str]) -> None:
        """An invisible strip over each column that tells its values when pointed at."""
        wide = (WIDTH - LEFT - RIGHT) / _BINS
        for column in bins:
            place = self.axis.bin(column.time_ns)
            self.add(
                f'<rect class="hit" x="{LEFT + place * wide:.1f}" y="{self.head}" width="{wide:.1f}" '
                f'height="{self.floor - self.head}"><title>{escape(words(column))}</title></rect>'
            )

    def svg(self, label: str) -> str:
        frame = []
        steps = round(self.top_value / self.tick)
        for count in range(steps + 1):
            y = self.y(count * self.tick)
            frame.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            text = f"{count * self.tick:,.6g}" + (f" {self._unit}" if count == steps and self._unit else "")
            frame.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
        for x, text in self.axis.ticks():
            frame.append(
                f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{self.floor}" y2="{self.floor + 4}"/>'
            )
            frame.append(f'<text x="{x:.1f}" y="{self.floor + 18}" text-anchor="middle">{text}</text>')
        return (
            f'<svg viewBox="0 0 {WIDTH} {self.height}" role="img" aria-label="{escape(label, quote=True)}">'
            + "".join(frame)
            + "".join(self._shapes)
            + "</svg>"
        )


def step_time_chart(
    axis: TimeAxis,
    steps: Sequence[Step],
    expected_ms: Sequence[float | None],
    acts: Sequence[Act],
    alerts: Sequence[tuple[int, str]],
) -> tuple[str, str]:
    """The chart and a sentence on what it leaves out. Band: shortest to longest, line: median per column."""
    bins = binned(axis, [(step.start_ns, step.duration_ms) for step in steps])
    expected = binned(axis, [(s.start_ns, ms_) for s, ms_ in zip(steps, expected_ms) if ms_ is not None])
    lengths = sorted(step.duration_ms for step in steps)
    # One stall must not press everything else flat: the scale ends above nearly all steps.
    usual = lengths[min(int(len(lengths) * 0.985), len(lengths) - 1)]
    top = max([usual, *(median(b.values) for b in expected)]) * 1.2
    panel = Panel(axis, 300, min(top, lengths[-1] * 1.05), "ms", head=30 if acts else 14)
    panel.acts(acts, named=True)
    upper = [f"{axis.x(b.time_ns):.1f} {panel.y(max(b.values)):.1f}" for b in bins]
    lower = [f"{axis.x(b.time_ns):.1f} {panel.y(min(b.values)):.1f}" for b in reversed(bins)]
    panel.add(f'<path class="band" d="M{"L".join(upper + lower)}Z"/>')
    panel.line([(b.time_ns, median(b.values)) for b in bins], "step")
    panel.line([(b.time_ns, median(b.values)) for b in expected], "expected")
    clipped = [step for step in steps if step.duration_ms > panel.top_value]
    for step in clipped[:300]:
        x, y = axis.x(step.start_ns), panel.head
        panel.add(
            f'<path class="clipped" d="M{x - 4:.1f} {y + 8}L{x + 4:.1f} {y + 8}L{x:.1f} {y}Z">'
            f"<title>step {step.step}: {ms(step.duration_ms)}</title></path>"
        )
    panel.hits(
        bins, lambda b: f"{len(b.values)} steps, median {ms(median(b.values))}, longest {ms(max(b.values))}"
    )
    panel.alerts(alerts, named=True)
    note = (
        f"{len(clipped)} of {len(steps)} steps are longer than the scale and drawn as red triangles "
        f"at its top; the longest took {ms(lengths[-1])}."
        if clipped
        else ""
    )
    return panel.svg("step time and expected step time"), note


def pair_chart(
    axis: TimeAxis,
    lines: Sequence[tuple[str, Sequence[tuple[int, float]]]],
    acts: Sequence[Act],
    alerts: Sequence[tuple[int, str]],
    unit: str,
) -> str:
    """Two lines over time: the mean per column of each."""
    both = [(name, binned(axis, points)) for name, points in lines]
    highest = max((sum(b.values) / len(b.values) for _, bins in both for b in bins), default=1.0)
    panel = Panel(axis, 150, highest * 1.05 or 1.0, unit)
    panel.acts(acts, named=False)
    for place, (_, bins) in enumerate(both):
        kind = ("line decode", "line second")[place % 2]
        panel.line([(b.time_ns, sum(b.values) / len(b.values)) for b in bins], kind)
    panel.alerts(alerts, named=False)
    for name, bins in both[:1]:
        panel.hits(bins, lambda b, name=name: f"{name}: {number(sum(b.values) / len(b.values))} a step")  # type: ignore[misc]
    return panel.svg(", ".join(name for name, _ in both))


def parts_chart(found: Contrast) -> str:
    """Two stacked bars: what a step consisted of, before and during."""
    widest = max(sum(p.before or 0 for p in found.parts), sum(p.during or 0 for p in found.parts), 1e-9)
    scale = (WIDTH - 90 - 90) / widest
    shapes = []
    for row, (name, total) in enumerate((("before", found.before_ms), ("during", found.during_ms))):
        x, y = 70.0, 8 + row * 40
        shapes.append(f'<text class="strong" x="0" y="{y + 19}">{name}</text>')
        for place, part in enumerate(found.parts):
            value = (part.before if row == 0 else part.during) or 0.0
            wide = value * scale
            shapes.append(
                f'<rect class="p{place % 5}" x="{x:.1f}" y="{y}" width="{max(wide - 1, 0):.1f}" height="28">'
                f"<title>{escape(part.name)}: {ms(value)}</title></rect>"
            )
            x += wide
        shapes.append(f'<text class="strong" x="{x + 8:.1f}" y="{y + 19}">{ms(total)}</text>')
    return f'<svg viewBox="0 0 {WIDTH} 84" role="img" aria-label="parts of a step">{"".join(shapes)}</svg>'


def sparkline(points: Sequence[tuple[int, float]], axis: TimeAxis, alerts: Sequence[tuple[int, str]]) -> str:
    """One counter, small: its shape and where the alert was."""
    values = [value for _, value in points]
    low, high = min(values), max(values)
    reach = (high - low) or 1.0
    left, wide = LEFT, WIDTH - LEFT - RIGHT

    def x(time_ns: int) -> float:
        return (axis.x(time_ns) - left) / wide * 188 + 1

    path = "L".join(
        f"{x(t):.1f} {31 - (v - low) / reach * 28:.1f}" for t, v in points[:: max(1, len(points) // 240)]
    )
    marks = "".join(
        f'<line class="alert" x1="{x(t):.1f}" x2="{x(t):.1f}" y1="1" y2="33"/>' for t, _ in alerts[:5]
    )
    shape = f'{marks}<path class="spark" d="M{path}"/>'
    return f'<svg viewBox="0 0 190 34" role="img" aria-label="over time">{shape}</svg>'
