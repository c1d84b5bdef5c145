"""Steps of a replica whose engine loop is Python: records of its probes, joined across processes."""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

from latencyprism.agent.session import BUDGET_PPM, ProbePlan, ProbeSession
from latencyprism.attach.inject import InjectReport
from latencyprism.engines.discovery import Member, Replica
from latencyprism.engines.packs import PackRange, load_pack
from latencyprism.errors import TargetRefused
from latencyprism.records import Span, Step, Usual, Window, ring
from latencyprism.records.step import NULL
from latencyprism.timeline.requests import RequestJoin

_STEP_AT = {name: index for index, name in enumerate(ring.STEP_WIRE)}
_FIELD = {name: index for index, name in enumerate(Step._fields)}
# For each Step field its place in a KIND_STEP payload; -1: not from there.
_PLACES = tuple(_STEP_AT.get(name, -1) for name in Step._fields)
_ENGINE, _REPLICA, _RANK, _PHASE = (_FIELD[name] for name in ("engine", "replica", "rank", "phase"))
_PREFILL, _DECODE, _KV = (_FIELD[name] for name in ("prefill_tokens", "decode_tokens", "kv_usage"))
_EXECUTE, _SAMPLE = _FIELD["execute_ns"], _FIELD["sample_ns"]
_MAX_WAITING_FOR_STEP = 4096


class WorkerRun(NamedTuple):
    """One model execution seen in a worker process; times in ns, CLOCK_MONOTONIC."""

    pid: int
    rank: int
    start_ns: int
    end_ns: int
    sample_start_ns: int | None
    sample_end_ns: int | None
    tokens: int | None
    gc_ns: int


class Totals:
    """Running sums of what the probes saw that is not a Step column; for fidelity checks."""

    def __init__(self) -> None:
        self.output_tokens = 0
        self.steps_with_output = 0
        self.worker_records = 0
        self.worker_tokens = 0
        # The probe's own time in the step before each record; critical: while the engine does not wait.
        self.probe_self_ns: deque[int] = deque(maxlen=20_000)
        self.probe_critical_ns: deque[int] = deque(maxlen=20_000)
        self.worker_self_ns: deque[int] = deque(maxlen=20_000)

    def forget_costs(self) -> None:
        for costs in (self.probe_self_ns, self.probe_critical_ns, self.worker_self_ns):
            costs.clear()


class PythonSource:
    """A ``records.StepSource`` over one probe in the engine process and one in each worker, and, where the
    replica has an API process of its own, one there.

    Attaches on construction, all or nothing: TargetRefused leaves no process attached. The API process is
    an exception: without it the times of requests end with their steps (``requests_from`` says so).

    ``budget_ppm``: what the probes may cost, ppm of the step time, before they drop readings."""

    def __init__(self, replica: Replica, *, budget_ppm: int = BUDGET_PPM) -> None:
        self.engine = replica.engine
        self.replica = replica
        self.pids = replica.pids
        self.totals = Totals()
        self._runs: dict[int, deque[WorkerRun]] = {}
        self._sessions: dict[int, ProbeSession] = {}
        self._api: ProbeSession | None = None
        self._lost_before = 0
        self._only_if_long = False
        self._step_rings: dict[int, int] = {}
        pack = load_pack(replica.engine)
        entry, self.warning = pack.choose(replica.version)
        probed = [member for member in replica.members if member.role != "api"]
        # One key for all processes: a request has one hash. A new one: it means nothing elsewhere.
        self.request_key = secrets.token_bytes(16)
        self.requests = RequestJoin(replica.engine, replica.number)
        # Workers first: the first whole step then already finds its model execution.
        try:
            for member in sorted(probed, key=lambda m: m.role.startswith("engine")):
                plan = _plan(pack.reader, entry, member, self.request_key)
                self._sessions[member.pid] = ProbeSession(member.pid, plan, budget_ppm=budget_ppm)
            self._api = self._attach_api(pack.reader, entry, budget_ppm)
        except BaseException:
            self.close()
            raise
        self._engine_pid = replica.engine_pid
        self._names = {pid: f"{role} {pid}" for pid, role in replica.roles().items()}
        self._tracks = {pid: (name,) for pid, name in self._names.items()}
        self._deep_names = {
            m.pid: [f"{owner}.{method}" for _, owner, method in _deep_of(entry, m)] for m in probed
        }

    def _attach_api(self, reader: str, entry: PackRange, budget_ppm: int) -> ProbeSession | None:
        member = next((m for m in self.replica.members if m.role == "api"), None)
        if member is None or "deliver" not in entry.hooks or "DP" in self.replica.ranks:
            return None  # with data parallelism one API process serves several loops, and cannot tell which
        try:
            plan = _plan(reader, entry, member, self.request_key)
            return ProbeSession(member.pid, plan, budget_ppm=budget_ppm)
        except TargetRefused:
            return None  # another replica's watch is in it, or it is no Python that we can enter

    @property
    def requests_from(self) -> str:
        """Where the times of requests come from: "api" with a probe in the API process, else "engine"."""
        return "api" if self._api is not None and self._api.live else "engine"

    # -- StepSource ------------------------------------------------------------------------------

    @property
    def lost(self) -> int:
        return sum(session.ring.lost for session in self._sessions.values())

    @property
    def step_threads(self) -> tuple[tuple[int, int], ...]:
        """(process, thread) of the loops that emitted steps so far; threads by the target's own numbers."""
        return tuple((self._engine_pid, thread) for thread in self._step_rings.values() if thread)

    def fileno(self) -> int | None:
        return self._sessions[self._engine_pid].fileno()

    def poll(self) -> Window:
        """All steps finished since the last call, in order, each with its workers' spans before it."""
        window = Window()
        engine = self._sessions[self._engine_pid]
        # The engine first, its workers after: a worker writes its record before the engine ends the step.
        steps = []
        for record in engine.read():
            if record.kind in (ring.KIND_STEP, ring.KIND_DECODE):
                steps.append(record)
                if not self._step_rings.get(record.ring):
                    self._step_rings[record.ring] = engine.ring.header(ring.H_THREADS + record.ring)
                self.requests.step(*record.words[:3])
            elif record.kind == ring.KIND_REQUEST:
                self.requests.events(record.words)
            else:
                self._take(self._engine_pid, record, window)
        if engine.ring.lost != self._lost_before:
            self._lost_before = engine.ring.lost
            self.requests.lost()
        for pid, session in self._sessions.items():
            if session is not engine:
                for record in session.read():
                    self._take(pid, record, window)
        for record in steps:
            if record.kind == ring.KIND_DECODE:
                window.steps.append(self._decode_step(record.words))
            else:
                window.steps.append(self._step(record.words))
        delivers = self._api is not None and self._api.live
        if self._api is not None:
            for record in self._api.read():
                if record.kind == ring.KIND_REQUEST:
                    self.requests.events(record.words)
        window.requests = self.requests.ready(time.monotonic_ns(), delivers)
        return window

    def settle(self) -> bool:
        """Call before sleeping on ``fileno``: True if it is safe to sleep, False if there is more to poll."""
        engine = self._sessions[self._engine_pid]
        engine.drain_wakes()
        return engine.ask_to_be_woken(self._only_if_long)

    def wake_beyond(self, usual: Usual | None) -> None:
        """Be woken only by a step longer than ``usual``; None: by every step."""
        self._only_if_long = usual is not None
        if usual is not None:
            self._sessions[self._engine_pid].call_long(*usual[:4])

    def wake_late(self, typical_1024: int, spare_ns: int) -> bool:
        self._sessions[self._engine_pid].call_late(typical_1024, spare_ns)
        return True

    def close(self) -> None:
        """Detach from every process; the engine loop first, so that no step looks half."""
        for session in self._all(reversed(list(self._sessions.values()))):
            session.close()

    def _all(self, sessions: Iterable[ProbeSession]) -> Iterator[ProbeSession]:
        yield from sessions
        if self._api is not None:
            yield self._api

    # -- control ---------------------------------------------------------------------------------

    def renew(self) -> None:
        for session in self._all(self._sessions.values()):
            session.renew()

    def allow(self, budget_ppm: int) -> None:
        """Let the probes cost this much of the step time before they drop readings; for measuring them."""
        for session in self._all(self._sessions.values()):
            session.ring.set_header(ring.H_BUDGET_PPM, budget_ppm)

    @property
    def engine_session(self) -> ProbeSession:
        """The attachment to the process of the engine loop."""
        return self._sessions[self._engine_pid]

    @property
    def follows_requests(self) -> bool:
        """False once the engine's probe was over its budget and dropped that."""
        return "requests" not in self.engine_session.ring.readings_off()

    @property
    def not_available(self) -> list[str]:
        """What the probes no longer read, in words."""
        return [
            f"{self._names.get(session.pid, session.pid)}: {name}, which its probe dropped to keep its budget"
            for session in self._all(self._sessions.values())
            for name in session.ring.readings_off()
        ]

    def arm_deep(self, seconds: float) -> None:
        for session in self._sessions.values():
            session.arm_deep(seconds)

    def detached(self) -> str | None:
        """Why a probe is no longer there: "detached" by somebody else, "expired" because its lease was not
        renewed in time, "over budget" because it cost too much with nothing left to drop; None while all are
        live."""
        if all(session.live for session in self._sessions.values()):
            return None
        if any(session.over_budget for session in self._sessions.values()):
            return "over budget"
        return "expired" if any(session.expired for session in self._sessions.values()) else "detached"

    def notices(self) -> list[str]:
        return [
            f"{self._names.get(session.pid, session.pid)}: {text}"
            for session in self._all(self._sessions.values())
            for text in session.notices()
        ]

    def hashed(self, request_id: str) -> int:
        """What stands for a request id in this source's records."""
        text = request_id.encode("utf-8", "surrogatepass")
        return int.from_bytes(blake2b(text, digest_size=8, key=self.request_key).digest(), "little") >> 1

    def health(self) -> dict[int, dict[str, object]]:
        return {session.pid: session.health() for session in self._all(self._sessions.values())}

    def attach_reports(self) -> dict[int, InjectReport]:
        return {session.pid: session.report for session in self._all(self._sessions.values())}

    # -- joining ---------------------------------------------------------------------------------

    def _take(self, pid: int, record: ring.RingRecord, window: Window) -> None:
        words = record.words
        track = self._tracks.get(pid) or (str(pid),)
        if record.kind == ring.KIND_WORKER:
            rank, start, end, sample_start, sample_end, tokens, gc_ns = words[:7]
            sampled = sample_start != NULL and sample_end != NULL
            run = WorkerRun(
                pid, rank, start, end, sample_start if sampled else None, sample_end if sampled else None,
                None if tokens == NULL else tokens, gc_ns,
            )  # fmt: skip
            self._runs.setdefault(pid, deque(maxlen=_MAX_WAITING_FOR_STEP)).append(run)
            self.totals.worker_records += 1
            self.totals.worker_tokens += run.tokens or 0
            if words[7] > 0:
                self.totals.worker_self_ns.append(words[7])
            window.spans.append(Span(track, "execute_model", start, end))
            if sampled:
                window.spans.append(Span(track, "sample_tokens", sample_start, sample_end))
        elif record.kind == ring.KIND_SPAN:
            names = self._deep_names[pid]
            if 0 <= words[0] < len(names) and words[1] <= words[2]:
                window.spans.append(Span(track, names[words[0]], words[1], words[2]))

    def _decode_step(self, words: Sequence[int]) -> Step:
        """What ``_step`` makes of ``ring.widened(words)``, by the shortest way: most steps are such steps."""
        (
            step, start, end, requests, context, running, waiting, usage, scheduled_at, update_start, gap,
            gc_ns, outputs, own, critical,
        ) = words[: ring.DECODE_WIRE_WORDS]  # fmt: skip
        execute = update_start - scheduled_at
        sample = self._sample_ns(start, end)
        if sample is not None:
            execute = execute - sample if execute > sample else 0
        self._count(outputs, own, critical)
        return Step._make((
            self.engine, self.replica.number, 0, step, start, end, "decode" if requests else None,
            requests, 0, requests, 0, requests, 0, None if context == NULL else context, 0, 0, None, 0,
            None if running == NULL else running, None if waiting == NULL else waiting,
            None if usage == NULL else usage / 1e6, scheduled_at - start, execute, sample, end - update_start,
            None if gap == NULL else gap, None, None, None, None if gc_ns == NULL else gc_ns,
            None, None, None,
        ))  # fmt: skip

    def _count(self, outputs: int, own_ns: int, critical_ns: int) -> None:
        totals = self.totals
        if outputs > 0:
            totals.output_tokens += outputs
            totals.steps_with_output += 1
        if own_ns > 0:
            totals.probe_self_ns.append(own_ns)
            totals.probe_critical_ns.append(critical_ns)

    def _step(self, words: Sequence[int]) -> Step:
        # One list in the order of the fields: keywords and a dict take five times as long.
        row: list[Any] = [None if at < 0 or (word := words[at]) == NULL else word for at in _PLACES]
        sample_ns = self._sample_ns(words[1], words[2])
        if sample_ns is not None and row[_EXECUTE] is not None:
            row[_SAMPLE] = sample_ns
            row[_EXECUTE] = max(row[_EXECUTE] - sample_ns, 0)
        self._count(*(words[_STEP_AT[name]] for name in ("output_tokens", "self_ns", "self_critical_ns")))
        row[_ENGINE], row[_REPLICA], row[_RANK] = self.engine, self.replica.number, 0
        row[_PHASE] = phase_of(row[_PREFILL], row[_DECODE])
        if row[_KV] is not None:
            row[_KV] /= 1e6
        return Step._make(row)

    def _sample_ns(self, start: int, end: int) -> int | None:
        """Longest sampling among the workers' runs inside [start, end]; runs of earlier steps are dropped."""
        longest: int | None = None
        for runs in self._runs.values():
            while runs and runs[0].start_ns < end:
                run = runs.popleft()
                if (
                    run.start_ns >= start
                    and run.sample_start_ns is not None
                    and run.sample_end_ns is not None
                ):
                    longest = max(longest or 0, run.sample_end_ns - run.sample_start_ns)
        return longest


def phase_of(prefill_tokens: int | None, decode_tokens: int | None) -> str | None:
    """prefill, decode or mixed; None for a step that scheduled nothing or whose tokens are unknown."""
    if prefill_tokens and decode_tokens:
        return "mixed"
    if prefill_tokens:
        return "prefill"
    return "decode" if decode_tokens else None


def _deep_of(entry: PackRange, member: Member) -> tuple[tuple[str, str, str], ...]:
    return tuple(hook for role in member.role.split("+") for hook in entry.deep.get(role, ()))


def _plan(reader: str, entry: PackRange, member: Member, request_key: bytes) -> ProbePlan:
    if member.role not in ("engine", "worker", "engine+worker", "api"):
        raise TargetRefused(
            f"cannot watch process {member.pid}", f"nothing is read in its role {member.role}"
        )
    options = {
        "request_key": request_key.hex(),
        "layout": entry.layout,
        "parameters": entry.parameters,
        "fields": entry.fields_for(member.role),
    }
    return ProbePlan(reader, member.role, member.rank, entry.hooks, _deep_of(entry, member), options)
