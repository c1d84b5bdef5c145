"""Tracks of a trace: which there are, whose child each is, and how slices are laid so that they nest."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

_TRAILING_NUMBER = re.compile(r"^(.*\S)[ :#](\d{1,7})$", re.DOTALL)


@dataclass(slots=True)
class Track:
    """``pid`` alone makes a process track, with ``tid`` a thread track; ``unit`` makes a counter track."""

    uuid: int
    name: str
    parent: int | None = None
    pid: int | None = None
    tid: int | None = None
    unit: str | None = None
    rank: int | None = None


@dataclass(slots=True)
class Slice:
    track: int
    name: str
    start_ns: int
    end_ns: int
    details: Iterable[tuple[str, Any]] = field(default=())
    flows: Iterable[int] = ()
    """Numbers of the flows that go through it, and below of those that end in it."""
    last_flows: Iterable[int] = ()


class TrackBook:
    """Every track by its path. ``("EngineCore 812", "MainThread 815")`` is a thread of process 812; a part
    without a number is a track of its own under its parent."""

    def __init__(self) -> None:
        self._by_path: dict[tuple[tuple[str, ...], int], Track] = {}
        self._by_uuid: dict[int, tuple[str, ...]] = {}

    def track(
        self, path: tuple[str, ...], unit: str | None = None, rank: int | None = None, lane: int = 0
    ) -> int:
        """The number of the track at ``path``, made together with its parents on first use. A counter's
        path ends with the word ``counter``, which keeps it apart from a slice track of the same name."""
        known = self._by_path.get((path, lane))
        if known is not None:
            return known.uuid
        shown = path[:-1] if unit is not None else path
        parent = self.track(shown[:-1]) if len(shown) > 1 else None
        track = Track(_uuid(path, lane), shown[-1], parent=parent, unit=unit, rank=rank)
        if unit is None:
            self._give_ids(track, shown, lane)
        self._by_path[path, lane] = track
        self._by_uuid[track.uuid] = path
        return track.uuid

    def _give_ids(self, track: Track, path: tuple[str, ...], lane: int) -> None:
        numbered = _TRAILING_NUMBER.match(track.name)
        if lane or numbered is None or len(path) > 2:
            return
        name, number = numbered[1], int(numbered[2])
        if len(path) == 1 and not re.search(r" (replica|rank)$", name):
            track.name, track.pid = name, number
        elif len(path) == 2:
            process = self._by_path[path[:1], 0]
            if process.pid is not None:
                track.name, track.pid, track.tid = name, process.pid, number

    def lane(self, uuid: int, lane: int) -> int:
        """A track beside track ``uuid``, with its name, for slices that do not nest with those on it."""
        return self.track(self._by_uuid[uuid], lane=lane)

    def tracks(self) -> list[Track]:
        """Parents before children."""
        return list(self._by_path.values())


def _uuid(path: tuple[str, ...], lane: int) -> int:
    digest = hashlib.blake2b(repr((path, lane)).encode("utf-8", "backslashreplace"), digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1


Events = list[tuple[int, "Slice | None"]]


def nest(slices: Iterable[Slice], book: TrackBook) -> Iterator[tuple[int, Events]]:
    """Begin and end events per track, so that slices on one track nest as Perfetto demands.

    A slice that would overlap another by part goes to a lane beside it. Times in the events never go back;
    a slice that ends before it starts is drawn with length 0.
    """
    by_track: dict[int, list[Slice]] = {}
    for drawn in slices:
        by_track.setdefault(drawn.track, []).append(drawn)
    for uuid, drawn_here in by_track.items():
        drawn_here.sort(key=lambda s: (s.start_ns, -s.end_ns))
        lanes: list[tuple[list[int], Events]] = []
        for drawn in drawn_here:
            _lay(drawn, lanes)
        for number, (open_ends, events) in enumerate(lanes):
            while open_ends:
                events.append((open_ends.pop(), None))
            yield (book.lane(uuid, number) if number else uuid), events


def _lay(drawn: Slice, lanes: list[tuple[list[int], Events]]) -> None:
    end_ns = max(drawn.start_ns, drawn.end_ns)
    for open_ends, events in lanes:
        while open_ends and open_ends[-1] <= drawn.start_ns:
            events.append((open_ends.pop(), None))
        if not open_ends or end_ns <= open_ends[-1]:
            break
    else:
        open_ends, events = [], []
        lanes.append((open_ends, events))
    open_ends.append(end_ns)
    events.append((drawn.start_ns, drawn))
