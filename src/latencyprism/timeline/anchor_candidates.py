"""From sampled stacks to the few functions that may mark an iteration of an engine's loop."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from latencyprism.attach.stacks import GENERATOR, Function, Stack

PRESENT = 0.03
"""A function on fewer of the stacks than this is not where the time goes."""
RECURSIVE = 0.02
STILL_LIMIT = 6
_STANDARD = re.compile(r"(^<frozen )|(/lib/python3\.\d+t?/(?!(site|dist)-packages/))|(/python3\.\d+\.zip/)")
# Where Python code of the standard library waits for whatever comes next, by (end of file name, function).
_RESTS = (
    ("/threading.py", "wait"),
    ("/threading.py", "_wait_for_tstate_lock"),
    ("/queue.py", "get"),
    ("/selectors.py", "select"),
    ("/socket.py", "accept"),
    ("/asyncio/base_events.py", "_run_once"),
    ("/asyncio/base_events.py", "run_forever"),
    ("/asyncio/runners.py", "run"),
    ("/concurrent/futures/thread.py", "_worker"),
    ("/multiprocessing/pool.py", "worker"),
)
# A wait under one of these is for work that was asked for.
_RESULTS = (("/concurrent/futures/_base.py", "result"), ("/threading.py", "join"))

Namer = Callable[[int], Function]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One function on the loop's stacks. ``presence``: share of the stacks it is on; ``resting``: share of
    those that wait, beneath it, for whatever comes next; ``depth``: how far from the outermost frame, on
    average; ``still``: it never was anywhere else in its code, as is the case of a caller that never gets
    on."""

    code: int
    function: Function
    presence: float
    resting: float
    depth: float
    still: bool


@dataclass(frozen=True, slots=True)
class LoopThread:
    """A thread in which something goes on. ``moving``: share of the samples that found it elsewhere than the
    sample before; ``cpu``: share of the time it had a processor, None where not known; ``resting``: share of
    the samples that found it waiting for whatever comes next."""

    ident: int
    samples: int
    moving: float
    cpu: float | None
    resting: float
    candidates: tuple[Candidate, ...]

    @property
    def activity(self) -> float:
        """How much of an engine's loop this thread looks like, in 0..2. One that mostly waits for what comes
        next, and passes it on, moves just as often as the one that does the work."""
        return (1.0 - self.resting) * (self.moving + min(self.cpu or 0.0, 1.0))


def is_standard(function: Function) -> bool:
    """True for code of the standard library, which no engine's iteration is."""
    return _STANDARD.search(function.file) is not None


def at_rest(stack: Stack, name: Namer) -> bool:
    """Does this stack wait for whatever comes next (rather than for a result that was asked for)?"""
    if not stack or not _ends_in(name(stack[-1].code), _RESTS):
        return False
    return not any(_ends_in(name(frame.code), _RESULTS) for frame in stack[-4:-1])


def _ends_in(function: Function, places: tuple[tuple[str, str], ...]) -> bool:
    return any(function.name == name and function.file.endswith(file) for file, name in places)


def loop_thread(ident: int, stacks: Sequence[Stack], cpu: float | None, name: Namer) -> LoopThread | None:
    """What the samples of one thread tell, None when there is nothing in it that could be a loop."""
    if not stacks:
        return None
    moved = sum(one != other for one, other in pairwise(stacks))
    moving = moved / max(len(stacks) - 1, 1)
    rest = {stack: at_rest(stack, name) for stack in set(stacks)}
    resting = sum(rest[stack] for stack in stacks) / len(stacks)
    found = _candidates(stacks, rest, name)
    return LoopThread(ident, len(stacks), moving, cpu, resting, found) if found else None


def _candidates(stacks: Sequence[Stack], rest: dict[Stack, bool], name: Namer) -> tuple[Candidate, ...]:
    counts: Counter[int] = Counter()
    resting: Counter[int] = Counter()
    depths: Counter[int] = Counter()
    twice: Counter[int] = Counter()
    places: dict[int, set[int]] = {}
    for stack, times in Counter(stacks).items():
        seen = set()
        for depth, frame in enumerate(stack):
            if frame.code in seen:
                twice[frame.code] += times
                continue
            seen.add(frame.code)
            counts[frame.code] += times
            depths[frame.code] += depth * times
            resting[frame.code] += rest[stack] * times
            places.setdefault(frame.code, set()).add(frame.at)
    found = []
    for code, count in counts.items():
        function = name(code)
        if (
            count < max(PRESENT * len(stacks), 2)
            or twice[code] > RECURSIVE * count
            or not _eligible(function)
        ):
            continue
        still = count == len(stacks) and len(places[code]) == 1
        found.append(
            Candidate(code, function, count / len(stacks), resting[code] / count, depths[code] / count, still)
        )
    return tuple(sorted(found, key=lambda one: one.depth))


def _eligible(function: Function) -> bool:
    if function.flags & GENERATOR or function.name.startswith("<") or is_standard(function):
        return False
    return bool(function.file)


def to_hook(
    thread: LoopThread, limit: int, tried: frozenset[int] = frozenset(), *, nested: bool = True
) -> list[Candidate]:
    """A thread's candidates whose calls are worth watching together, outermost first.

    ``limit`` of those that were seen at several places of their code: on as many stacks as possible, but only
    few of each share of the stacks at first, since one that calls nothing but another says no more than that.
    To these come the innermost few of those that never moved, whose calls are rare: a loop that is nearly
    always inside its step looks just like its callers. ``nested``: can functions inside functions be watched?
    """
    left = [one for one in thread.candidates if one.code not in tried and (nested or not _is_nested(one))]
    still = [one for one in left if one.still][-STILL_LIMIT:]
    moving = (one for one in left if not one.still)
    ranked = sorted(moving, key=lambda one: (-round(one.presence, 1), one.depth))
    alike: Counter[float] = Counter()
    first: list[Candidate] = []
    later: list[Candidate] = []
    for one in ranked:
        share = round(one.presence, 1)
        alike[share] += 1
        (first if alike[share] <= (2 if share == 1.0 else 1) else later).append(one)
    return sorted([*[*first, *later][:limit], *still], key=lambda one: one.depth)


def _is_nested(one: Candidate) -> bool:
    return "<locals>" in one.function.qualname
