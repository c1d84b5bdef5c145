"""Acts where objectives are missed: tells, answers a load balancer, shapes the engine's steps, shields it.

Off unless asked for. Each action is bounded, told with its expected effect before and its measured effect
after, and taken back when the guard ends, however it ends.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from latencyprism.agent.knobs import KnobOrders
from latencyprism.errors import PrismError
from latencyprism.records import Step, Window
from latencyprism.sentinel.attendant import Attendant, Raised
from latencyprism.sentinel.replica_watch import ReplicaWatch
from latencyprism.sentinel.slo_watch import Served, SloWatch
from latencyprism.slo.readiness import Endpoint, Readiness
from latencyprism.slo.rules import metrics_text
from latencyprism.slo.shaping import Shaper
from latencyprism.slo.shield import Change, Shield, confine, raise_weight
from latencyprism.timeline.python_source import PythonSource

ACTIONS = ("notify", "ready", "shape", "shield")
EFFECT_NS = 10_000_000_000
MEMORY = 50.0


@dataclass(frozen=True)
class GuardOptions:
    """``neighbours``: folders of control groups that may be confined; ``port`` 0: any free one."""

    actions: frozenset[str]
    port: int = 0
    neighbours: tuple[Path, ...] = ()
    dry_run: bool = False


@dataclass
class Measured:
    """Steps that carried decodes and prompts together."""

    steps: int = 0
    step_ms: float = 0.0
    tokens_per_s: float = 0.0

    def take(self, step: Step) -> None:
        if not step.decode_tokens or not step.prefill_tokens or step.duration_ns <= 0:
            return
        self.steps += 1
        part = 1.0 / min(self.steps, MEMORY)
        self.step_ms += (step.duration_ms - self.step_ms) * part
        self.tokens_per_s += (step.prefill_tokens / step.duration_ns * 1e9 - self.tokens_per_s) * part

    def values(self) -> dict[str, Any] | None:
        if not self.steps:
            return None
        rates = {"step_ms": round(self.step_ms, 2), "prompt_tokens_per_s": round(self.tokens_per_s)}
        return {"steps": self.steps, **rates}


@dataclass
class _Guarded:
    served: Served
    shaper: Shaper | None = None
    orders: KnobOrders | None = None
    ordered: int | None = None
    free: Measured = field(default_factory=Measured)
    shaped: Measured = field(default_factory=Measured)
    told_ns: int = 0
    burning: bool = False
    shielded: bool = False


class GuardWatch(Attendant):
    """Goes along after the ``SloWatch`` whose judgement it acts on."""

    name = "guard"

    def __init__(self, slo: SloWatch, options: GuardOptions) -> None:
        super().__init__()
        self._slo = slo
        self.options = options
        self._guarded: dict[int, _Guarded] = {}
        self.readiness = Readiness()
        self._told: tuple[bool, dict[str, Any], str] = (True, {}, "")
        self.endpoint = Endpoint(options.port, lambda: self._told) if "ready" in options.actions else None
        self._said_port = False
        self._shields: _ShieldThread | None = None
        if "shield" in options.actions:
            self._shields = _ShieldThread(options)

    # -- the watch ---------------------------------------------------------------------------------

    def attached(self, watch: ReplicaWatch) -> None:
        if self.endpoint is not None and not self._said_port:
            self._said_port = True
            self.emit("guard", action="ready", url=f"http://127.0.0.1:{self.endpoint.port}/ready")
            self.say(f"readiness at http://127.0.0.1:{self.endpoint.port}/ready")
        served = self._slo.served.get(watch.replica.engine_pid)
        if served is None:
            return
        guarded = self._guarded[watch.replica.engine_pid] = _Guarded(served)
        if "shape" in self.options.actions:
            self._begin_shaping(watch, guarded)

    def _begin_shaping(self, watch: ReplicaWatch, guarded: _Guarded) -> None:
        source, served = watch.attachment.source, guarded.served
        objective = next((one for one in served.foretold if one.metric == "tpot"), None)
        if objective is None or watch.replica.engine != "vllm" or not isinstance(source, PythonSource):
            self.say("guard: shaping needs vLLM and a tpot objective; it is left out")
            return
        guarded.shaper = Shaper(objective.limit_ns / 1e9)
        guarded.orders = KnobOrders(source.engine_session)

    def detached(self, watch: ReplicaWatch) -> None:
        # The probe put the knobs back when it went.
        guarded = self._guarded.pop(watch.replica.engine_pid, None)
        if guarded is not None and guarded.shaper is not None and guarded.shaper.changes:
            self._tell_effect(guarded)
            self.emit("guard", action="shape", pid=watch.replica.engine_pid, state="taken back")

    def window(self, watch: ReplicaWatch, window: Window, alerts: list[Any]) -> None:
        guarded = self._guarded.get(watch.replica.engine_pid)
        if guarded is None or guarded.shaper is None:
            return
        measured = guarded.free if guarded.ordered is None or self.options.dry_run else guarded.shaped
        for step in window.steps:
            measured.take(step)
        if window.steps:
            self._shape(guarded, guarded.shaper, time.monotonic_ns())

    def tick(self, now_ns: int) -> Sequence[Raised]:
        burning, calm = False, True
        for pid, guarded in self._guarded.items():
            served = guarded.served
            burns = served.burning(now_ns)
            burning, calm = burning or burns, calm and served.calm(now_ns)
            if burns != guarded.burning and (burns or served.calm(now_ns)):
                guarded.burning = burns
                self._notify(pid, burns)
                if burns and not guarded.shielded and self._shields is not None:
                    guarded.shielded = True
                    self._shields.plan(pid)
            if guarded.orders is not None:
                self._keep(guarded, guarded.orders, now_ns)
        if self._shields is not None:
            for values in self._shields.news():
                self.emit("guard", action="shield", **values)
                self.say(f"guard: {values['text']}")
        if self.endpoint is not None:
            self._answer(now_ns, burning, calm)
        return ()

    # -- actions -----------------------------------------------------------------------------------

    def _notify(self, pid: int, burns: bool) -> None:
        if "notify" in self.options.actions:
            text = "an error budget burns" if burns else "the error budgets are at rest"
            self.emit("guard", action="notify", pid=pid, text=text)
            self.say(f"guard: {text} (process {pid})")

    def _answer(self, now_ns: int, burning: bool, calm: bool) -> None:
        changed = self.readiness.update(now_ns, burning, calm)
        told = self._slo.describe(now_ns)
        ready = self.readiness.ready or self.options.dry_run
        self._told = (ready, {"objectives": told}, metrics_text(told, ready))
        if changed:
            values: dict[str, Any] = {"ready": self.readiness.ready, "dry_run": self.options.dry_run}
            self.emit("guard", action="ready", **values)
            self.say("guard: ready again" if self.readiness.ready else "guard: not ready, a budget burns")

    def _shape(self, guarded: _Guarded, shaper: Shaper, now_ns: int) -> None:
        served, orders = guarded.served, guarded.orders
        if served.forecaster is None or served.outlook is None or orders is None:
            return
        pace = served.forecaster.pace
        whole = orders.state().tokens_was or pace.room
        tokens = shaper.decide(pace, served.outlook.prompt_tokens, whole, now_ns)
        if tokens == guarded.ordered:
            return
        guarded.ordered = tokens
        if not self.options.dry_run:
            if tokens is None:
                orders.release()
            else:
                orders.order(tokens=tokens)
        estimate = None if tokens is None or shaper.estimate is None else _rounded(shaper.estimate._asdict())
        self.emit(
            "guard", action="shape", pid=served.watch.replica.engine_pid, tokens=tokens, tokens_whole=whole,
            estimate=estimate, dry_run=self.options.dry_run,
        )  # fmt: skip
        would = "would allow" if self.options.dry_run else "allows"
        self.say(f"guard: {would} {tokens or whole} tokens a step")

    def _keep(self, guarded: _Guarded, orders: KnobOrders, now_ns: int) -> None:
        if guarded.ordered is None or self.options.dry_run:
            return
        if orders.refused:
            self.say("guard: the engine's knobs cannot be turned here; shaping ends")
            self.emit("guard", action="shape", state="refused")
            guarded.shaper = guarded.orders = None
            return
        orders.renew()
        if now_ns - guarded.told_ns >= EFFECT_NS:
            guarded.told_ns = now_ns
            self._tell_effect(guarded)

    def _tell_effect(self, guarded: _Guarded) -> None:
        self.emit(
            "guard_effect", action="shape", pid=guarded.served.watch.replica.engine_pid,
            before=guarded.free.values(), after=guarded.shaped.values(),
            changes=guarded.shaper.changes if guarded.shaper is not None else None,
        )  # fmt: skip

    def close(self) -> None:
        if self.endpoint is not None:
            self.endpoint.close()
        if self._shields is not None:
            self._shields.close()


class _ShieldThread:
    """Control groups are files: changed by a thread of its own."""

    def __init__(self, options: GuardOptions) -> None:
        self._options = options
        self._plans: queue.Queue[int | None] = queue.Queue()
        self._news: queue.Queue[dict[str, Any]] = queue.Queue()
        self._shield = Shield()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def plan(self, pid: int) -> None:
        self._plans.put(pid)

    def news(self) -> list[dict[str, Any]]:
        found = []
        while not self._news.empty():
            found.append(self._news.get())
        return found

    def _work(self) -> None:
        while (pid := self._plans.get()) is not None:
            try:
                for change in self._changes(pid):
                    if not self._options.dry_run:
                        self._shield.make(change)
                    text = ("would set " if self._options.dry_run else "set ") + change.text
                    self._news.put({"pid": pid, "text": text, "dry_run": self._options.dry_run})
            except (PrismError, OSError, ValueError) as error:
                self._news.put({"pid": pid, "text": str(error), "state": "refused"})

    def _changes(self, pid: int) -> list[Change]:
        """Named neighbours are confined; where none is named, the engine's own group gets more weight."""
        if self._options.neighbours:
            return [confine(group) for group in self._options.neighbours]
        return [raise_weight(pid)]

    def close(self) -> None:
        self._plans.put(None)
        self._thread.join(10)
        self._shield.close()


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    return {name: round(value, 2) if isinstance(value, float) else value for name, value in values.items()}
