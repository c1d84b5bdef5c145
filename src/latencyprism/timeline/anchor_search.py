"""Unknown engines: find the function that marks one iteration of the engine's loop, in ten seconds at most.

Stacks are sampled from outside first, which costs the engine nothing but a shared memory bus. That leaves a
few functions of the busiest thread. Their calls are then watched from inside for a few seconds, and judged.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from latencyprism.agent.session import ProbePlan, ProbeSession
from latencyprism.attach.interpreter import python_of
from latencyprism.attach.process import Identity, children
from latencyprism.attach.stacks import Function, Stack, StackReader, Thread
from latencyprism.errors import TargetRefused
from latencyprism.records import ring
from latencyprism.timeline.anchor_candidates import Candidate, LoopThread, loop_thread, to_hook
from latencyprism.timeline.anchor_judge import Call, Judgement, Watched, judge

LIMIT_S = 10.0
SAMPLE_S, SAMPLE_HZ = 2.5, 100.0
LOOK_S = 0.25
WATCH_S, SHORTEST_WATCH_S = 2.5, 1.0
MOST_HOOKS = 6
"""At once, of functions that are called often; to these come a few whose calls are rare."""
ROUNDS = 3
CLOSING_S = 0.8
CLEARLY = 0.1
GOOD = 0.7
"""With this confidence nothing else is tried."""
LEAST = 0.4
ACTIVE, COMPARABLE = 0.02, 0.25
NESTED_SINCE = (3, 12)
"""Before, a function inside a function can be reached from nowhere."""
BUDGET_PPM = 20_000
"""What watching calls may cost the engine while it is searched: 2 %."""
_READ_S = 0.05
_RING_SLOTS = 4096
_UNHOOKED_SHIFT = 16


@dataclass(frozen=True, slots=True)
class Anchor:
    """What marks an iteration in one process, and in which thread (``threading.get_ident`` there).

    ``confidence`` in 0..1 with its ``reasons`` in words; ``seconds`` the search took; ``stacks`` and ``torn``
    how many were read whole and how many had to be dropped.
    """

    identity: Identity
    thread: int
    function: Function
    witness: Function | None
    confidence: float
    reasons: tuple[str, ...]
    per_s: float
    typical_ms: float
    seconds: float
    stacks: int
    torn: int

    @property
    def name(self) -> str:
        """``Class.method (file:line)``, as people name it."""
        return f"{self.function.qualname} ({os.path.basename(self.function.file)}:{self.function.line})"


def where(function: Function) -> tuple[str, str, str]:
    """How the probe is told which function is meant."""
    return function.file, function.name, str(function.line)


def search(pid: int, *, limit_s: float = LIMIT_S, say: Callable[[str], None] = lambda text: None) -> Anchor:
    """The anchor of a Python process that serves at this moment.

    Attaches a probe for the seconds in which calls are watched and takes it away again. Raises TargetRefused
    when the process cannot be read or attached to, when nothing goes on in it, or when no function marks an
    iteration clearly.
    """
    begun = time.monotonic()
    python = python_of(pid)
    reader = StackReader(python)
    threads = sample(reader, SAMPLE_S, SAMPLE_HZ)
    active = [one for one in threads if one.activity >= ACTIVE]
    if not active:
        raise _refused(pid, "nothing goes on in its Python threads", _idle_remedy(pid))
    say(f"{reader.whole} stacks read from outside; the busiest of {len(threads)} threads is looked into")
    nested = reader.layout.version >= NESTED_SINCE
    found, thread = _watched(pid, active, nested, begun + limit_s - CLOSING_S)
    if found.confidence < LEAST:
        name = found.anchor.function.qualname
        raise _refused(pid, f"the best guess, {name}, is too unsure ({found.confidence})", _idle_remedy(pid))
    return Anchor(
        identity=python.identity,
        thread=thread.ident,
        function=found.anchor.function,
        witness=found.witness.function if found.witness is not None else None,
        confidence=found.confidence,
        reasons=found.reasons,
        per_s=found.per_s,
        typical_ms=found.typical_ms,
        seconds=round(time.monotonic() - begun, 2),
        stacks=reader.whole,
        torn=reader.torn,
    )


def _watched(
    pid: int, active: list[LoopThread], nested: bool, until_s: float
) -> tuple[Judgement, LoopThread]:
    """Watch calls in rounds until one is good or time is over: the best judgement, and of which thread."""
    best: tuple[Judgement, LoopThread] | None = None
    tried: dict[int, set[int]] = {}
    problem = "no function of its threads is called again and again"
    for _ in range(ROUNDS):
        thread = _next(active, tried)
        left_s = until_s - time.monotonic()
        if thread is None or left_s < SHORTEST_WATCH_S:
            break
        before = tried.setdefault(thread.ident, set())
        chosen = to_hook(thread, MOST_HOOKS, frozenset(before), nested=nested)
        before |= {one.code for one in chosen}
        try:
            watched, window_ns = watch_calls(pid, thread.ident, chosen, min(WATCH_S, left_s))
        except TargetRefused as refusal:
            if "nothing to hook" not in refusal.why:
                raise
            problem = refusal.why
            continue
        judgement = judge(watched, window_ns, 1.0 - thread.resting)
        # What is watched first is what most speaks for: the rest has to be clearly better.
        if judgement is not None and (best is None or judgement.confidence > best[0].confidence + CLEARLY):
            best = judgement, thread
        if best is not None and best[0].confidence >= GOOD:
            break
    if best is None:
        raise _refused(pid, problem, _idle_remedy(pid))
    return best


def _refused(pid: int, why: str, remedy: str) -> TargetRefused:
    return TargetRefused(f"no iteration was found in process {pid}", why, remedy)


def _idle_remedy(pid: int) -> str:
    below = [str(child.pid) for child in children(pid)][:8]
    also = f"; or give one of its child processes ({', '.join(below)})" if below else ""
    return f"let the engine serve requests while the watch begins{also}"


def _next(active: list[LoopThread], tried: dict[int, set[int]]) -> LoopThread | None:
    """The busiest thread that nothing was watched in; after these the busiest that has more to watch."""
    ranked = sorted(active, key=lambda one: -one.activity)
    worth = [one for one in ranked if one.activity >= COMPARABLE * ranked[0].activity]
    fresh = [one for one in worth if one.ident not in tried]
    more = [one for one in worth if to_hook(one, 1, frozenset(tried.get(one.ident, ())))]
    return fresh[0] if fresh else more[0] if more else None


# -- from outside ------------------------------------------------------------------------------------


def sample(reader: StackReader, seconds: float, hz: float) -> list[LoopThread]:
    """Stacks of every thread for a moment, then of those that move, at random times ``hz`` times a second."""
    stacks: dict[int, list[Stack]] = {}
    by_ident: dict[int, Thread] = {thread.ident: thread for thread in reader.threads()}
    cpu = _CpuTimes(reader.pid, by_ident)
    generator = random.Random(0)
    begun = time.monotonic()
    followed = list(by_ident.values())
    looked = False
    while (now := time.monotonic()) < begun + seconds:
        if not looked and now > begun + LOOK_S:
            looked = True
            followed = [one for one in followed if len(set(stacks.get(one.ident, ()))) > 1]
            # Threads that came since, or that had nothing to do at that moment.
            still = [one for one in by_ident.values() if one not in followed]
            rare = {one.ident for one in still}
        if looked:
            again = [by_ident[ident] for ident in rare] if generator.random() < 0.1 else []
            moved = [one for one in again if _take(reader, one, stacks, keep=False)]
            followed += moved
            rare -= {one.ident for one in moved}
        for thread in followed:
            _take(reader, thread, stacks)
        time.sleep(generator.uniform(0.5, 1.5) / hz)
    shares = cpu.shares()
    found = (loop_thread(ident, seen, shares.get(ident), reader.function) for ident, seen in stacks.items())
    return [one for one in found if one is not None]


def _take(reader: StackReader, thread: Thread, stacks: dict[int, list[Stack]], *, keep: bool = True) -> bool:
    """Read one stack; True if it is another one than the thread's last."""
    stack = reader.stack(thread)
    if not stack:
        return False
    seen = stacks.setdefault(thread.ident, [])
    other = bool(seen) and seen[-1] != stack
    if keep or other:
        seen.append(stack)
    return other


class _CpuTimes:
    """Share of the time that each thread had a processor, between construction and ``shares``."""

    def __init__(self, pid: int, threads: dict[int, Thread]) -> None:
        self._tids = {thread.ident: thread.tid for thread in threads.values() if thread.tid is not None}
        self._pid = pid
        self._begun_ns = time.monotonic_ns()
        self._before = self._read()

    def _read(self) -> dict[int, int]:
        found = {}
        for ident, tid in self._tids.items():
            try:
                with open(f"/proc/{self._pid}/task/{tid}/schedstat") as file:
                    found[ident] = int(file.read().split()[0])
            except (OSError, ValueError, IndexError):
                continue
        return found

    def shares(self) -> dict[int, float]:
        span_ns = max(time.monotonic_ns() - self._begun_ns, 1)
        now = self._read()
        return {
            ident: (now[ident] - before) / span_ns for ident, before in self._before.items() if ident in now
        }


# -- from inside -------------------------------------------------------------------------------------


def watch_calls(
    pid: int, thread: int, candidates: list[Candidate], seconds: float
) -> tuple[list[Watched], int]:
    """Calls of these functions in that thread over some seconds, and over how many nanoseconds.

    The probe is gone when this returns. Raises TargetRefused when none of the functions can be hooked."""
    plan = ProbePlan(
        "anchor",
        "search",
        0,
        {str(index): where(one.function) for index, one in enumerate(candidates)},
        options={"thread": thread},
    )
    session = ProbeSession(pid, plan, slots=_RING_SLOTS, budget_ppm=BUDGET_PPM)
    calls: list[list[Call]] = [[] for _ in candidates]
    begun = time.monotonic_ns()
    end = begun + int(seconds * 1e9)
    try:
        session.renew(seconds + 2.0)
        while time.monotonic_ns() < end and session.live:
            time.sleep(_READ_S)
            _read_calls(session, calls)
        window_ns = time.monotonic_ns() - begun
        missing = session.ring.header(ring.H_MISSING)
        message = session.ring.message()
    finally:
        session.close()
    return [
        Watched(
            one,
            tuple(sorted(calls[index], key=lambda call: call.start_ns)),
            hot=bool(missing >> index & 1),
            unseen=_why(one, message) if missing >> _UNHOOKED_SHIFT + index & 1 else None,
        )
        for index, one in enumerate(candidates)
    ], window_ns


def _read_calls(session: ProbeSession, calls: list[list[Call]]) -> None:
    for record in session.read():
        index, start, end = record.words[:3]
        if record.kind == ring.KIND_SPAN and 0 <= index < len(calls) and start <= end:
            calls[index].append(Call(start, end))


def _why(candidate: Candidate, message: str) -> str:
    name = candidate.function.name
    found = [part for part in message.removeprefix("not found: ").split(", ") if part.startswith(f"{name}: ")]
    return found[0].removeprefix(f"{name}: ") if found else "it could not be hooked"
