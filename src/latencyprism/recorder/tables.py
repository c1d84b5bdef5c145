"""Records as packed tables: fixed-size rows, with repeated words kept once beside them.

The rows of ``steps`` are ``records.STEP_DTYPE``. Packing goes by columns, not by records: 6000 steps,
20000 spans and 20000 counters take some 20 ms, which a watcher can afford.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from latencyprism.records import (
    NULL,
    PHASES,
    REQUEST_COLUMNS,
    STEP_COLUMNS,
    STEP_DTYPE,
    Counter,
    Request,
    Span,
    Step,
)
from latencyprism.records.request import PLACES, place_of, row_to_request
from latencyprism.records.step import row_to_step

Packed = npt.NDArray[np.void]

SPAN_DTYPE = np.dtype(
    [
        ("track", "<u4"),
        ("name", "<u4"),
        ("start_ns", "<i8"),
        ("end_ns", "<i8"),
        ("step", "<i8"),
        ("details", "<i4"),
    ]
)
"""``track``, ``name``, ``details``: places in the word list; details -1: none. ``step`` NULL: none."""

COUNTER_DTYPE = np.dtype(
    [("track", "<u4"), ("name", "<u4"), ("unit", "<u4"), ("time_ns", "<i8"), ("value", "<f8")]
)

_ENGINE_BYTES = STEP_DTYPE["engine"].itemsize

REQUEST_DTYPE = np.dtype(
    [(name, f"S{_ENGINE_BYTES}" if name == "engine" else "<i8") for name in REQUEST_COLUMNS]
)
"""``request.PLACES``: as places in their words."""


class Details(tuple[tuple[str, "str | int | float"], ...]):
    """The details of a span in a word list, told apart from a track."""

    __slots__ = ()


class Words:
    """The word list of a set of tables: each string, track or details and its place."""

    def __init__(self) -> None:
        self._place: dict[Any, int] = {}
        self.words: list[Any] = []

    def places(self, column: Sequence[Any]) -> list[int]:
        """The place of each value of ``column``, adding those not seen yet. Values must be hashable."""
        place = self._place
        for value in dict.fromkeys(column):
            if value not in place:
                place[value] = len(self.words)
                self.words.append(value)
        return list(map(place.__getitem__, column))

    def add_details(self, column: Sequence[tuple[tuple[str, str | int | float], ...]]) -> range:
        """The places of ``column``, which are new each time: details are seldom the same twice."""
        first = len(self.words)
        self.words += map(Details, column)
        return range(first, len(self.words))


def pack_step_columns(steps: Sequence[Step]) -> Packed:
    """The same array as ``records.pack_steps``, several times faster. OverflowError if a number does not
    fit 64 bits."""
    packed = np.empty(len(steps), dtype=STEP_DTYPE)
    if not steps:
        return packed
    phase_place: dict[str | None, int] = {phase: place for place, phase in enumerate(PHASES)}
    for name, column in zip(STEP_COLUMNS, zip(*steps)):
        if name == "engine":
            encoded = {word: word.encode("ascii", "replace")[:_ENGINE_BYTES] for word in set(column)}
            packed[name] = [encoded[word] for word in column]
            continue
        missing: float = float("nan") if name == "kv_usage" else NULL
        if name == "phase":
            packed[name] = [phase_place.get(word, NULL) for word in column]
            continue
        absent = column.count(None)
        if absent == len(column):
            packed[name] = missing
        elif absent:
            packed[name] = [missing if value is None else value for value in column]
        else:
            packed[name] = column
    return packed


def pack_spans(spans: Sequence[Span], words: Words) -> Packed:
    packed = np.empty(len(spans), dtype=SPAN_DTYPE)
    if not spans:
        return packed
    tracks, names, starts, ends, steps, details = zip(*spans)
    packed["track"] = words.places(tracks)
    packed["name"] = words.places(names)
    packed["start_ns"] = starts
    packed["end_ns"] = ends
    packed["step"] = [NULL if step is None else step for step in steps]
    packed["details"] = -1
    told = [place for place, detail in enumerate(details) if detail]
    if told:
        packed["details"][told] = words.add_details([details[place] for place in told])
    return packed


def pack_counters(counters: Sequence[Counter], words: Words) -> Packed:
    packed = np.empty(len(counters), dtype=COUNTER_DTYPE)
    if not counters:
        return packed
    tracks, names, times, values, units = zip(*counters)
    packed["track"] = words.places(tracks)
    packed["name"] = words.places(names)
    packed["unit"] = words.places(units)
    packed["time_ns"] = times
    packed["value"] = values
    return packed


def pack_requests(requests: Sequence[Request]) -> Packed:
    """OverflowError if a number does not fit 64 bits."""
    packed = np.empty(len(requests), dtype=REQUEST_DTYPE)
    if not requests:
        return packed
    for name, column in zip(REQUEST_COLUMNS, zip(*requests)):
        if name == "engine":
            packed[name] = [word.encode("ascii", "replace")[:_ENGINE_BYTES] for word in column]
        elif name in PLACES:
            packed[name] = [place_of(PLACES[name], word) for word in column]
        else:
            packed[name] = [NULL if value is None else value for value in column]
    return packed


def words_to_json(words: Iterable[Any]) -> bytes:
    """A string as a string, a track as a list, details as ``{"details": pairs}``."""
    told = [{"details": word} if type(word) is Details else word for word in words]
    return json.dumps(told, separators=(",", ":")).encode()


def words_from_json(text: bytes) -> list[Any]:
    """The inverse of ``words_to_json``; ValueError for anything else."""
    loaded = json.loads(text)
    if not isinstance(loaded, list):
        raise ValueError("the word list is not a list")
    return [_word(entry) for entry in loaded]


def _word(entry: object) -> Any:
    if isinstance(entry, str):
        return entry
    if isinstance(entry, list) and all(isinstance(part, str) for part in entry):
        return tuple(entry)
    pairs = entry.get("details") if isinstance(entry, dict) else None
    if not isinstance(pairs, list):
        raise ValueError("an entry of the word list is neither text, track nor details")
    for pair in pairs:
        if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)):
            raise ValueError("a detail is not a pair")
        if not isinstance(pair[1], (str, int, float)):
            raise ValueError("a detail is neither text nor number")
    return Details((pair[0], pair[1]) for pair in pairs)


def unpack_step_rows(packed: Packed) -> list[Step]:
    """Steps from rows that may come from a file: a phase not known is None. ValueError if a row does not
    say which step it is and when it was."""
    for name in ("replica", "rank", "step", "start_ns", "end_ns"):
        if (packed[name] == NULL).any():
            raise ValueError(f"a step has no {name}")
    phase = packed["phase"]
    packed["phase"] = np.where((phase >= 0) & (phase < len(PHASES)), phase, NULL)
    return [row_to_step(row) for row in packed.tolist()]


def unpack_requests(packed: Packed) -> list[Request]:
    """ValueError if a row does not say which request it is; a reason not known is None."""
    for name in ("replica", "request"):
        if (packed[name] == NULL).any():
            raise ValueError(f"a request has no {name}")
    return [row_to_request(row) for row in packed.tolist()]


def unpack_spans(packed: Packed, words: Sequence[Any]) -> list[Span]:
    """ValueError if a row points outside the word list or at a word of another kind."""
    spans = []
    for track, name, start_ns, end_ns, step, details in packed.tolist():
        spans.append(
            Span(
                _pick(words, track, tuple),
                _pick(words, name, str),
                start_ns,
                end_ns,
                None if step == NULL else step,
                () if details == -1 else tuple(_pick(words, details, Details)),
            )
        )
    return spans


def unpack_counters(packed: Packed, words: Sequence[Any]) -> list[Counter]:
    """ValueError as ``unpack_spans``."""
    return [
        Counter(_pick(words, track, tuple), _pick(words, name, str), time_ns, value, _pick(words, unit, str))
        for track, name, unit, time_ns, value in packed.tolist()
    ]


def _pick(words: Sequence[Any], place: int, kind: type) -> Any:
    if not 0 <= place < len(words) or not isinstance(words[place], kind):
        raise ValueError(f"row points at word {place}, which is not there")
    return words[place]
