"""What a detector has learned, as plain data that can be kept and taken up again.

The model and the noise of a stream, not its incidents. What is read back is hostile until checked: every
number is finite and of sane size, every list of the right length, or nothing is taken.
"""

from __future__ import annotations

from typing import Any

from latencyprism.baseline.cells import CELLS_MAX, CorrectedLine
from latencyprism.detect.detector import Detector
from latencyprism.detect.noise import Noise
from latencyprism.errors import BadInput

VERSION = 1
PAGE_AFTER_STEPS = 50
"""Steps of the new stream before it may page: the machine may be another one by now."""
LEAST_STEPS = 500
"""A detector that saw less is not worth keeping."""
BIGGEST = 1e12
_LINE = ("a", "b", "c", "p00", "p01", "p02", "p11", "p12", "p22", "rows", "scale", "unit")
_PARTS = ("decode", "mixed", "prefill")
_NOISE = ("count", "d_far", "d_mid", "d_near", "prefill")
_TAIL = ("count", "excess", "threshold")
_AT_LEAST_ZERO = frozenset(("p00", "p11", "p22", "rows", "scale", "unit", "b", "c", *_NOISE, *_TAIL[:2]))


def remember(detector: Detector) -> dict[str, Any] | None:
    """Plain data for JSON; None while too little is known, or while something is wrong."""
    if detector.steps < LEAST_STEPS or detector.incident_open:
        return None
    model, noise = detector.model, detector.noise
    return {
        "version": VERSION,
        "steps": detector.steps,
        "model_steps": model.steps,
        "model": {name: _part(getattr(model, name)) for name in _PARTS},
        "noise": {name: getattr(noise, name) for name in _NOISE},
        "tails": [[getattr(tail, name) for name in _TAIL] for tail in (noise.tail, noise.far_tail)],
    }


def restore(detector: Detector, data: object) -> None:
    """Put what ``remember`` gave into a fresh detector. BadInput, and nothing changed, if it is not that."""
    fields = _mapping(data, "the state")
    if fields.get("version") != VERSION:
        raise BadInput(
            "this state cannot be used", f"its version is {str(fields.get('version'))[:20]}, not {VERSION}"
        )
    steps, model_steps = (
        _whole(fields.get("steps"), "steps"),
        _whole(fields.get("model_steps"), "model_steps"),
    )
    parts = _mapping(fields.get("model"), "model")
    lines = {name: _read_part(parts.get(name), name) for name in _PARTS}
    noise = Noise()
    measured = _mapping(fields.get("noise"), "noise")
    for name in _NOISE:
        value = _number(measured.get(name), name)
        setattr(noise, name, int(value) if name == "count" else value)
    if not 0.0 < noise.d_near < 10.0:
        raise BadInput("this state cannot be used", "its noise is out of range")
    for tail, values in zip((noise.tail, noise.far_tail), _list(fields.get("tails"), "tails", 2)):
        for name, value in zip(_TAIL, _list(values, "tail", len(_TAIL))):
            setattr(tail, name, _number(value, name))
    for name, line in lines.items():
        setattr(detector.model, name, line)
    detector.model.steps = model_steps
    detector.noise = noise
    detector.steps = steps
    detector.page_from = steps + PAGE_AFTER_STEPS


def _part(part: CorrectedLine) -> dict[str, Any]:
    return {
        "line": [getattr(part.line, name) for name in _LINE],
        "least": part.least,
        "coarse": [[key, *cell] for key, cell in part.coarse.items()],
        "fine": [[key, *cell] for key, cell in part.fine.items()],
    }


def _read_part(data: object, what: str) -> CorrectedLine:
    fields = _mapping(data, what)
    part = CorrectedLine()
    for name, value in zip(_LINE, _list(fields.get("line"), what, len(_LINE))):
        number = _number(value, name)
        setattr(part.line, name, int(number) if name == "rows" else number)
    part.least = _number(fields.get("least"), "least")
    for name in ("coarse", "fine"):
        cells = fields.get(name)
        if not isinstance(cells, list) or len(cells) > CELLS_MAX:
            raise BadInput("this state cannot be used", f"{what}.{name} is no list of cells")
        into = getattr(part, name)
        for cell in cells:
            key, *values = _list(cell, name, 5)
            count, u, v, y = (_number(value, name) for value in values)
            if count < 1.0 or u < 0.0 or v < 0.0 or y <= 0.0:
                raise BadInput("this state cannot be used", f"a cell of {what}.{name} is out of range")
            into[_whole(key, name)] = [count, u, v, y]
    if part.least < 0.0 or (part.coarse and (part.line.unit <= 0.0 or part.line.rows < 1)):
        raise BadInput("this state cannot be used", f"the line of {what} is out of range")
    return part


def _mapping(data: object, what: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise BadInput("this state cannot be used", f"{what} is no object")
    return data


def _list(data: object, what: str, length: int) -> list[Any]:
    if not isinstance(data, list) or len(data) != length:
        raise BadInput("this state cannot be used", f"{what} is no list of {length}")
    return data


def _number(value: object, what: str) -> float:
    fine = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not fine or not -BIGGEST < value < BIGGEST:  # type: ignore[operator]
        raise BadInput("this state cannot be used", f"{what} is no number of sane size")
    number = float(value)  # type: ignore[arg-type]
    if what in _AT_LEAST_ZERO and number < 0.0:
        raise BadInput("this state cannot be used", f"{what} is negative")
    return number


def _whole(value: object, what: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**62:
        raise BadInput("this state cannot be used", f"{what} is no whole number")
    return value
