"""Which communicators of different processes are one: each process knows its own only by an address."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from latencyprism.timeline.collectives import Place


class Entry(NamedTuple):
    """One rank's call that made it a member; it returns when all have joined. ``handle``: the communicator's
    address in that process. Times in ns of its node's clock."""

    place: Place
    handle: int
    rank: int
    size: int
    start_ns: int
    end_ns: int


@dataclass(slots=True)
class _Forming:
    size: int
    members: dict[int, Entry] = field(default_factory=dict)

    def takes(self, entry: Entry, skew_ns: int) -> bool:
        """The rank is free, and every member's call and this one have a moment in common."""
        if entry.size != self.size or entry.rank in self.members:
            return False
        for member in self.members.values():
            slack = 0 if member.place.node == entry.place.node else skew_ns
            if entry.start_ns > member.end_ns + slack or member.start_ns > entry.end_ns + slack:
                return False
        return True

    def distance(self, entry: Entry) -> int:
        return max((abs(entry.end_ns - member.end_ns) for member in self.members.values()), default=0)


def match(entries: Iterable[Entry], skew_ns: int = 0) -> dict[tuple[Place, int], str]:
    """(place, handle) -> a name that is the same for all members of one communicator.

    Members are those of one size and different ranks whose joining calls overlap; between nodes up to
    ``skew_ns`` (the clocks' greatest difference) more. Of several groups that would take an entry, the one
    that was joined at the nearest time does. A group that is not full keeps a name all the same: its other
    ranks were not seen."""
    forming: list[_Forming] = []
    for entry in sorted(entries, key=lambda entry: (entry.end_ns, entry.place, entry.rank)):
        fitting = [group for group in forming if group.takes(entry, skew_ns)]
        chosen = min(fitting, key=lambda group: group.distance(entry), default=None)
        if chosen is None:
            chosen = _Forming(entry.size)
            forming.append(chosen)
        chosen.members[entry.rank] = entry
    return {
        (entry.place, entry.handle): _name(group) for group in forming for entry in group.members.values()
    }


def _name(group: _Forming) -> str:
    members = sorted((e.rank, e.place.node, e.place.pid, e.handle) for e in group.members.values())
    return hashlib.blake2b(repr((group.size, members)).encode(), digest_size=6).hexdigest()
