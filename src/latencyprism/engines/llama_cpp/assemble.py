"""From what probes saw to steps: one step for each decode call that executed a micro-batch.

With the server's loop in sight a step reaches from the start of the loop's iteration (or, of a second
decode call in it, from that call) to the end of the iteration (or the next call): so batch building,
compute, sampling and sending are all inside some step, and ``gap_ns`` is true idleness. Without it, a
step is the decode call up to the moment its caller asks for the result.

Prefill and decode are told apart by sequence: a launched request is in prefill until the first token whose
logits are wanted has been computed. Token values are never seen, only positions and counts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

from latencyprism.records import Span, Step, Window

ENGINE = "llama.cpp"
_MAX_SEQUENCE, _MAX_POSITION = 1 << 16, 1 << 28


class Role(Enum):
    """What a probe's hit means."""

    ITERATION = "iteration"
    TASK = "task"
    LAUNCH = "launch"
    DECODE = "decode"
    UBATCH = "ubatch"
    SAMPLE = "sample"
    SYNCHRONIZE = "synchronize"


class SeenRun(NamedTuple):
    """Consecutive tokens of one sequence; ``output``: the last one's logits are wanted."""

    sequence: int
    first_position: int
    tokens: int
    output: bool


class Event(NamedTuple):
    """One hit. ``context``: address of the llama_context (DECODE, UBATCH); ``other``: the argument after it.
    ``sequence``: of a LAUNCH. ``tokens`` and ``runs``: of a UBATCH, None when they could not be read."""

    role: Role
    time_ns: int
    tid: int
    context: int = 0
    other: int = 0
    sequence: int | None = None
    tokens: int | None = None
    runs: tuple[SeenRun, ...] | None = None


@dataclass
class _Ubatch:
    start_ns: int
    tokens: int | None
    runs: tuple[SeenRun, ...] | None


@dataclass
class _Call:
    """A decode call in the making."""

    entry_ns: int
    computed_ns: int | None = None
    ubatches: list[_Ubatch] = field(default_factory=list)


@dataclass
class _Sequence:
    in_prefill: bool
    last_position: int = -1


@dataclass
class _Load:
    """What one step did for one sequence."""

    prefill_tokens: int = 0
    decode_tokens: int = 0
    context: int = 0


@dataclass
class _Loop:
    """State of one thread that drives a model: one server, hence one replica."""

    replica: int
    started_ns: int | None = None
    calls: list[_Call] = field(default_factory=list)
    context: int = 0
    context_known: bool = False
    launched: bool = False
    sequences: dict[int, _Sequence] = field(default_factory=dict)
    ended_ns: int | None = None
    steps: int = 0
    drafts: bool = False


def believable(runs: Iterable[SeenRun], tokens: int) -> bool:
    """Whether runs read from a target's memory can be what the pack takes them for."""
    listed = list(runs)
    return sum(run.tokens for run in listed) == tokens and all(
        0 <= run.sequence < _MAX_SEQUENCE and 0 <= run.first_position < _MAX_POSITION and run.tokens > 0
        for run in listed
    )


class Assembler:
    """``with_loop``: the server's iterations and tasks are among the events. Times in CLOCK_MONOTONIC ns."""

    def __init__(self, pid: int, with_loop: bool, first_replica: int = 0) -> None:
        self._pid, self._with_loop, self._first_replica = pid, with_loop, first_replica
        self._loops: dict[int, _Loop] = {}
        self.unreadable = 0
        """Micro-batches whose sequences could not be read or believed."""

    @property
    def threads(self) -> tuple[int, ...]:
        """The threads that drive a model, in the order in which they were seen."""
        return tuple(self._loops)

    def add(self, event: Event, window: Window) -> None:
        """Take one event in; a step that it completes, and its spans, go into ``window``."""
        if event.role is Role.TASK and event.tid not in self._loops:
            return
        loop = self._loops.get(event.tid)
        if loop is None:
            loop = self._loops[event.tid] = _Loop(self._first_replica + len(self._loops))
        if event.role in (Role.ITERATION, Role.TASK):
            self._close(loop, event.time_ns, window)
            loop.started_ns = event.time_ns if event.role is Role.ITERATION else None
        elif event.role is Role.LAUNCH:
            loop.launched = True
            if event.sequence is not None:
                loop.sequences[event.sequence] = _Sequence(in_prefill=True)
        elif event.role is Role.DECODE:
            self._decode(loop, event, window)
        elif loop.calls and event.role is Role.UBATCH:
            self._ubatch(loop, event)
        elif loop.calls and event.role in (Role.SAMPLE, Role.SYNCHRONIZE):
            self._computed(loop, event, window)

    def _decode(self, loop: _Loop, event: Event, window: Window) -> None:
        if not self._with_loop:
            self._close(loop, event.time_ns, window)
            loop.started_ns = event.time_ns
        elif loop.started_ns is None:
            return
        # A draft model decodes in a context of its own; the first call after a launch is the target's.
        if not loop.context_known:
            loop.context, loop.context_known = event.context, loop.launched
        if event.context == loop.context or not self._with_loop:
            loop.calls.append(_Call(event.time_ns))
            loop.context = event.context

    def _ubatch(self, loop: _Loop, event: Event) -> None:
        runs, tokens = event.runs, event.tokens
        if event.context != loop.context:
            if event.other != loop.context:
                return
            # A build whose function returns an object: arguments are one place further than the pack says.
            runs = tokens = None
        if runs is None or tokens is None or not believable(runs, tokens):
            self.unreadable += 1
            runs = tokens = None
        loop.calls[-1].ubatches.append(_Ubatch(event.time_ns, tokens, runs))

    def _computed(self, loop: _Loop, event: Event, window: Window) -> None:
        call = loop.calls[-1]
        if call.ubatches and call.computed_ns is None:
            call.computed_ns = event.time_ns
            if not self._with_loop:
                self._close(loop, event.time_ns, window)

    def _close(self, loop: _Loop, end_ns: int, window: Window) -> None:
        """End of an iteration: its decode calls that executed something become steps."""
        calls, loop.calls = [call for call in loop.calls if call.ubatches], []
        if loop.started_ns is None:
            return
        start_ns = loop.started_ns
        for index, call in enumerate(calls):
            until_ns = calls[index + 1].entry_ns if index + 1 < len(calls) else end_ns
            step = self._step(loop, call, start_ns, until_ns)
            window.steps.append(step)
            window.spans.extend(self._spans(call, step.step, call.computed_ns or until_ns))
            loop.ended_ns = start_ns = until_ns

    def _step(self, loop: _Loop, call: _Call, start_ns: int, end_ns: int) -> Step:
        computed_ns = call.computed_ns if call.computed_ns is not None else end_ns
        number, loop.steps = loop.steps, loop.steps + 1
        return Step(
            ENGINE,
            loop.replica,
            0,
            number,
            start_ns,
            end_ns,
            **self._workload(loop, call),
            schedule_ns=call.entry_ns - start_ns if self._with_loop else None,
            execute_ns=computed_ns - call.entry_ns,
            update_ns=end_ns - computed_ns if self._with_loop else None,
            gap_ns=None if loop.ended_ns is None else max(0, start_ns - loop.ended_ns),
        )

    def _workload(self, loop: _Loop, call: _Call) -> dict[str, Any]:
        """Counts of a call; nothing when any of its micro-batches could not be read."""
        loads: dict[int, _Load] = {}
        drafts = 0
        for ubatch in call.ubatches:
            if ubatch.runs is None:
                # Where the sequences stand is unknown from here on: start over with what is seen next.
                loop.sequences.clear()
                return {}
            for run in ubatch.runs:
                drafts += self._account(loop, loads.setdefault(run.sequence, _Load()), run)
        loop.drafts = loop.drafts or drafts > 0
        prefill = [load for load in loads.values() if load.prefill_tokens]
        decode = [load for load in loads.values() if load.decode_tokens]
        return {
            "phase": "mixed" if prefill and decode else "prefill" if prefill else "decode",
            "requests": len(loads),
            "prefill_requests": len(prefill),
            "decode_requests": len(decode),
            "prefill_tokens": sum(load.prefill_tokens for load in prefill),
            "decode_tokens": sum(load.decode_tokens for load in decode),
            "context_tokens": sum(load.context for load in loads.values()),
            "attention_work": sum(load.prefill_tokens * load.context for load in prefill),
            # Without any draft ever seen, nothing says that this engine could make one.
            "draft_tokens": drafts if loop.drafts else None,
        }

    def _account(self, loop: _Loop, load: _Load, run: SeenRun) -> int:
        """Add a run to its sequence's load; returns the tokens of it that were drafts."""
        state = loop.sequences.get(run.sequence)
        if state is None:
            # Attached in the middle of a request: one token with an output is what decode looks like.
            state = loop.sequences[run.sequence] = _Sequence(run.tokens > 1 or not run.output)
        elif not self._with_loop and (run.first_position <= state.last_position or run.tokens > 1):
            state.in_prefill = True
        drafts = 0
        if state.in_prefill:
            load.prefill_tokens += run.tokens
        else:
            drafts = max(0, load.decode_tokens + run.tokens - 1) - max(0, load.decode_tokens - 1)
            load.decode_tokens += run.tokens
        if run.output:
            state.in_prefill = False
        state.last_position = run.first_position + run.tokens - 1
        load.context = max(load.context, state.last_position + 1)
        return drafts

    def _spans(self, call: _Call, step: int, end_ns: int) -> list[Span]:
        """One span for each micro-batch; the last ends when the call's result was there."""
        track = (f"{ENGINE} {self._pid}", "ubatch")
        ends = [ubatch.start_ns for ubatch in call.ubatches[1:]] + [end_ns]
        spans = []
        for ubatch, end in zip(call.ubatches, ends):
            if ubatch.tokens is None:
                spans.append(Span(track, "ubatch", ubatch.start_ns, end, step))
            else:
                details = (("tokens", ubatch.tokens),)
                spans.append(Span(track, f"ubatch of {ubatch.tokens}", ubatch.start_ns, end, step, details))
        return spans
