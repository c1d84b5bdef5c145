"""The watch of one machine: attach to the engines, wait for steps, raise alerts, capture, leave."""

from __future__ import annotations

import gc
import os
import select
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from latencyprism.attach.process import Identity
from latencyprism.engines.discovery import Replica, discover
from latencyprism.engines.unknown import discover_any, successors
from latencyprism.errors import PrismError, TargetRefused
from latencyprism.host.neighbours import Neighbours
from latencyprism.records import Alert, Window
from latencyprism.records.alert import LEVELS
from latencyprism.sentinel import below_watch
from latencyprism.sentinel.attendant import Attendant, Attendants, Raised
from latencyprism.sentinel.captures import Captures
from latencyprism.sentinel.heap import keep_small
from latencyprism.sentinel.incident_capture import IncidentCapture
from latencyprism.sentinel.priority import OnTime
from latencyprism.sentinel.replica_watch import NAP_S, ReplicaWatch
from latencyprism.sentinel.signals import SignalPipe
from latencyprism.sentinel.sinks import JsonLines, Webhook
from latencyprism.sentinel.steplog import StepLog
from latencyprism.sentinel.targets import attach

HOST_PERIOD_S, HOST_CALM_S = 0.2, 0.5
"""What the kernel counts about the engine: after a page or while a capture is under way, and else."""
NEIGHBOURS_PERIOD_S, NEIGHBOURS_CALM_S = 1.0, 3.0
"""Who else burns CPU: while a capture is under way, and else."""
LEASE_PERIOD_S = 0.5
SEARCH_PERIOD_S = 1.0


@dataclass
class WatchOptions:
    """``pid`` None: all engines of the machine. ``captures`` None: none are written."""

    pid: int | None = None
    duration_s: float | None = None
    captures: Path | None = None
    steps: StepLog | None = None
    capture_levels: tuple[str, ...] = LEVELS
    deep: bool = True
    kernels: bool = False
    """Captures of pages, and those asked for, may hold kernels of devices."""
    reattach: bool = True
    realtime: bool = True
    budget_ppm: int | None = None
    """What probes may cost, parts per million of the step time; None: what those that go along need."""


@dataclass
class WatchSummary:
    steps: int = 0
    evidence: int = 0
    page: int = 0
    lost: int = 0
    braked: int = 0
    """How often the watch ran for too long at real-time priority and had to sleep."""
    captures: list[str] = field(default_factory=list)
    costs: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Of each replica that was watched, by the PID of its loop: see ``Cost.values``."""

    def count(self, alert: Alert) -> None:
        """One that no detector raised."""
        if alert.level == "page":
            self.page += 1
        else:
            self.evidence += 1


class Watcher:
    """``run`` returns when the duration is over, on SIGINT or SIGTERM, or when ``stop`` was called; every
    process is detached from by then. ``say`` gets sentences for a person."""

    def __init__(
        self, options: WatchOptions, out: JsonLines, *, webhook: Webhook | None = None,
        say: Callable[[str], None] = lambda text: None,
        on_alert: Callable[[Alert], None] = lambda alert: None,
        on_verdict: Callable[[IncidentCapture], None] = lambda capture: None,
        attendants: Sequence[Attendant] = (),
    ) -> None:  # fmt: skip
        self.options = options
        self.summary = WatchSummary()
        self.watches: list[ReplicaWatch] = []
        self._out = out
        self._webhook = webhook
        self._say = say
        self._on_alert = on_alert
        self._epoll = select.epoll()
        self._registered: dict[int, ReplicaWatch] = {}
        self.captures = Captures(
            options.captures, options.capture_levels, out, say, on_verdict, deep=options.deep
        )
        self._attendants = Attendants(attendants, out.event, say)
        self._refused: set[Identity] = set()
        self._gone: list[Replica] = []
        self._stop = False
        self._neighbours: Neighbours | None = None

    # -- life ------------------------------------------------------------------------------------

    def stop(self) -> None:
        self._stop = True

    def attach_all(self) -> None:
        """Attach to what ``options.pid`` names, or to every engine found. TargetRefused if to none."""
        keep_small()
        replicas = discover_any(self.options.pid)
        # What is left after start-up is never garbage (``run`` freezes it); later collections are short. Now,
        # because after the attach steps wait.
        gc.collect()
        problems: list[tuple[Replica, TargetRefused]] = []
        for replica in replicas:
            try:
                self._attach(replica)
            except TargetRefused as problem:
                problems.append((replica, problem))
        if problems and not self.watches:
            raise problems[0][1]
        for replica, refusal in problems:
            self._refuse(replica, refusal)
        if not self.watches:
            raise TargetRefused(
                "no engine to watch",
                "none runs on this machine that we may read",
                "start one, or name a PID with -p",
            )

    def run(self) -> WatchSummary:
        """Call ``attach_all`` first. A broken output ends the run, cleanly."""
        gc.freeze()
        signals = SignalPipe(self._epoll, self.stop)
        watched = [pid for watch in self.watches for pid in watch.replica.pids]
        self._neighbours = Neighbours(exclude=[os.getpid(), *watched])
        try:
            with OnTime(self.options.realtime) as on_time:
                try:
                    self._loop(on_time, signals)
                finally:
                    self.summary.braked = on_time.braked
        except BrokenPipeError:
            self._say("the reader of our output went away")
        finally:
            self._leave()  # a signal that comes meanwhile must not leave a target half detached
            signals.close()
            self._epoll.close()
            gc.unfreeze()
        return self.summary

    def _loop(self, on_time: OnTime, signals: SignalPipe) -> None:
        begun = time.monotonic()
        end = None if self.options.duration_s is None else begun + self.options.duration_s
        host_at = lease_at = search_at = looked_at = begun
        while not self._stop:
            settled = [watch.settle() for watch in self.watches]  # every one must be asked
            nap_s = min((watch.nap_s for watch in self.watches), default=NAP_S)
            ready = self._epoll.poll(nap_s if all(settled) else 0)
            if any(fd == signals.fd for fd, _ in ready):
                signals.drain()
            if any(what & select.EPOLLHUP for _, what in ready):
                lease_at = 0.0  # a probe is gone: its pipe would be ready from now on
            seen_ns = time.monotonic_ns()
            self._poll_all()
            if self.captures.under_way:
                self.captures.advance()
            now = time.monotonic()
            if now >= host_at:
                host_at = now + (HOST_PERIOD_S if self._busy else HOST_CALM_S)
                self._slow_signals(time.monotonic_ns(), seen_ns)
            if now - looked_at >= (NEIGHBOURS_PERIOD_S if self.capturing else NEIGHBOURS_CALM_S):
                looked_at = now
                self._look_around(time.monotonic_ns())
            if now >= lease_at:
                lease_at = now + LEASE_PERIOD_S
                self._keep_alive()
            if self._gone and now >= search_at:
                search_at = now + SEARCH_PERIOD_S
                self._look_for_restarted()
            if end is not None and now >= end:
                return
            if not self.watches and not self._gone:
                return

    # -- steps and alerts ------------------------------------------------------------------------

    def _poll_all(self) -> None:
        for watch in self.watches:
            for alert, end_ns in watch.look():
                self._raise(watch, alert, end_ns)
            self._pass_on(watch, *watch.hand_on(time.monotonic_ns()))

    def _pass_on(self, watch: ReplicaWatch, window: Window, alerts: list[Alert]) -> None:
        if self._attendants:
            self._attendants.window(watch, window, alerts)
        if self.options.steps is not None:
            for step in window.steps:
                self.options.steps.write(step)

    def _raise(self, watch: ReplicaWatch, alert: Alert, end_ns: int | None) -> None:
        """Emission comes first; all that costs time comes after it."""
        begin = self.captures.choose(watch, alert, time.monotonic_ns())
        if end_ns is not None:
            alert.delay_ms = round((time.monotonic_ns() - end_ns) / 1e6, 3)
        self._out.write(alert.to_json())
        if self._webhook is not None:
            self._webhook.offer(alert)
        self._on_alert(alert)
        watch.tape.alert(alert, time.monotonic_ns())
        if begin:
            self.captures.begin(watch, alert)
        else:
            self.captures.add_alert(watch, alert)
        if self._attendants:
            self._attendants.alert(watch, alert)

    def _asked(self, raised: Raised) -> None:
        """What an attendant wants: an alert, a capture, or both."""
        if raised.watch not in self.watches:
            return
        if raised.alert is not None:
            self.summary.count(raised.alert)
            self._raise(raised.watch, raised.alert, None)
        if raised.capture is not None:
            path = self.captures.begin_for(raised.watch, raised.capture)
            if path is not None:
                self._say(f"capture asked for ({raised.capture.kind}: {raised.capture.reason}): {path}")

    # -- slower things ---------------------------------------------------------------------------

    def _slow_signals(self, now_ns: int, seen_ns: int) -> None:
        """``seen_ns``: all steps that had ended by then have been seen. If we were held up since, that is no
        silence of the engine's."""
        for watch in self.watches:
            watch.sample_host(now_ns)
            silence = watch.silence(seen_ns)
            if silence is not None:
                self._raise(watch, silence, None)
        if self._attendants:
            for raised in self._attendants.tick(now_ns):
                self._asked(raised)

    def _look_around(self, now_ns: int) -> None:
        """Who else burns CPU here: so that a culprit has a name."""
        if self._neighbours is not None:
            for counter in self._neighbours.counters(now_ns):
                for watch in self.watches:
                    watch.recorder.add_counter(counter)

    def _keep_alive(self) -> None:
        for watch in list(self.watches):
            source = watch.attachment.source
            source.renew()
            for text in (*source.notices(), *watch.cost.notices()):
                self._say(f"note: {text}")
                self._out.event(
                    "notice", engine=watch.replica.engine, pid=watch.replica.engine_pid, text=text
                )
            if not watch.attachment.alive():
                self._lost(watch, "the engine ended")
                continue
            why = source.detached()
            if why == "expired":
                self._attach_again(watch)
            elif why is not None:
                reason = "somebody else detached us" if why == "detached" else f"its probe was {why}"
                self._lost(watch, reason, look_again=False)

    def _attach_again(self, watch: ReplicaWatch) -> None:
        """The watch was held up for longer than the lease: the probe did what it must; begin anew."""
        self._lost(watch, "the watch was held up for longer than its lease", look_again=False)
        try:
            self._attach(watch.replica, again=True)
        except TargetRefused as problem:
            self._say(str(problem))
            self._gone.append(watch.replica)

    def _lost(self, watch: ReplicaWatch, why: str, *, look_again: bool = True) -> None:
        self._say(f"{watch.replica.engine} {watch.replica.engine_pid}: {why}")
        self._out.event("gone", engine=watch.replica.engine, pid=watch.replica.engine_pid, why=why)
        self._detach(watch)
        if look_again and self.options.reattach:
            self._gone.append(watch.replica)

    def _look_for_restarted(self) -> None:
        """An engine of the same kind that was not there before takes the place of one that ended."""
        known = {pid for watch in self.watches for pid in watch.replica.pids}
        for replica in [*discover(), *successors(self._gone)]:
            members = {member.process.identity for member in replica.members if member.role != "api"}
            if known & set(replica.pids) or members & self._refused:
                continue
            before = next((old for old in self._gone if self._takes_the_place(replica, old)), None)
            if before is None:
                continue
            try:
                self._attach(replica, again=True)
                self._gone.remove(before)
            except TargetRefused as problem:
                # An engine that is still starting has not imported what we hook, or serves nothing yet.
                if "nothing to hook" not in problem.why and "no iteration was found" not in problem.what:
                    self._refuse(replica, problem)

    def _takes_the_place(self, replica: Replica, old: Replica) -> bool:
        """Who was told to watch one engine must not end up watching a stranger's."""
        return replica.engine == old.engine if self.options.pid is None else replica.succeeds(old)

    def _refuse(self, replica: Replica, problem: TargetRefused) -> None:
        self._refused |= {member.process.identity for member in replica.members}
        self._say(str(problem))

    # -- attach and detach -----------------------------------------------------------------------

    def _attach(self, replica: Replica, *, again: bool = False) -> None:
        realtime = self.options.realtime
        below_watch.prepare()
        budget_ppm = self.options.budget_ppm or self._attendants.budget_ppm
        attachment = attach(replica, self._say, realtime=realtime, budget_ppm=budget_ppm)
        with OnTime(realtime):  # its first steps are there already
            watch = ReplicaWatch(attachment, realtime=realtime)
        watch.prompt = self._attendants.prompt
        if self.options.kernels:
            watch.record_kernels()
        self.watches.append(watch)
        fd = watch.attachment.source.fileno()
        if fd is not None:
            self._epoll.register(fd, select.EPOLLIN)
            self._registered[fd] = watch
        watch.attachment.source.renew()  # from here on the ordinary lease holds
        warning = watch.attachment.warning
        self._out.event(
            "reattached" if again else "attached",
            engine=replica.engine, version=replica.version, replica=replica.number,
            pids={str(pid): role for pid, role in watch.roles.items()}, warning=warning,
        )  # fmt: skip
        name = " ".join(word for word in (replica.engine, replica.version) if word)
        who = ", ".join(f"{role} {pid}" for pid, role in watch.roles.items())
        self._say(f"{'re-attached' if again else 'attached'} to {name}: {who}")
        if warning:
            self._say(f"note: {warning}")
        if self._attendants:
            self._attendants.attached(watch)

    def _detach(self, watch: ReplicaWatch) -> None:
        for fd, owner in list(self._registered.items()):
            if owner is watch:
                self._epoll.unregister(fd)
                del self._registered[fd]
        self.watches.remove(watch)
        self.summary.steps += watch.counts.steps
        self.summary.evidence += watch.counts.evidence
        self.summary.page += watch.counts.page
        self.summary.lost += watch.attachment.source.lost
        self.summary.costs[watch.replica.engine_pid] = watch.cost.values()
        # The probes go first: whoever runs the engine must not wait for our files.
        watch.attachment.close()
        self._pass_on(watch, *watch.hand_on())
        if self._attendants:
            self._attendants.detached(watch)
        self.captures.abandon(watch)
        watch.close()

    def _leave(self) -> None:
        for watch in list(self.watches):
            try:
                self._detach(watch)
            except (PrismError, OSError) as error:
                self._say(f"detaching from {watch.replica.engine_pid}: {error}")
        self._attendants.close()
        self.summary.captures = self.captures.written
        if self._webhook is not None:
            self._webhook.close()

    @property
    def _busy(self) -> bool:
        return self.capturing or any(watch.detector.paging for watch in self.watches)

    @property
    def capturing(self) -> bool:
        """True while a capture is under way."""
        return bool(self.captures.under_way)

    def describe(self) -> dict[str, Any]:
        """The summary as the closing event."""
        summary = self.summary
        return {
            "steps": summary.steps, "evidence": summary.evidence, "page": summary.page,
            "lost": summary.lost, "captures": summary.captures, "braked": summary.braked,
            "watch_cpu_s": round(time.process_time(), 3), "costs": summary.costs,
        }  # fmt: skip
