"""Acts where objectives are missed: tells, answers a load balancer, shapes the engine's steps, shields it.

Off unless asked for. Each action is bounded, told with its expected effect before and its measured effect
after, and taken back when the guard ends, however it ends.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from latencyprism.agent.knobs import KnobOrders
from latencyprism.engines.discovery import Replica
from latencyprism.records import Window
from latencyprism.sentinel.attendant import Attendant, Raised
from latencyprism.sentinel.replica_watch import ReplicaWatch
from latencyprism.sentinel.shield_thread import ShieldThread
from latencyprism.sentinel.slo_watch import Served, SloWatch
from latencyprism.slo.effect import Effect
from latencyprism.slo.pace import Pace
from latencyprism.slo.prompts_seen import PromptsSeen
from latencyprism.slo.readiness import Endpoint, Readiness
from latencyprism.slo.rules import metrics_text
from latencyprism.slo.shaping import Shaper
from latencyprism.timeline.python_source import PythonSource

ACTIONS = ("notify", "ready", "shape", "shield")
EFFECT_NS = 10_000_000_000
RENEW_NS = 2_000_000_000
_SEVERAL_RANKS = re.compile(r"_(?:[A-Z]+_)?(?:TP|PP)\d")
"""In a title of SGLang's: it has a rank's number only where there are several."""
ROOM_TOKENS = 16
"""Of a step, for short prompts: else they would wait behind all of the long ones, as chunks are small now."""


@dataclass(frozen=True)
class GuardOptions:
    """``neighbours``: folders of control groups that may be confined; ``port`` 0: any free one."""

    actions: frozenset[str]
    port: int = 0
    neighbours: tuple[Path, ...] = ()
    dry_run: bool = False


@dataclass
class _Guarded:
    served: Served
    effects: dict[str, Effect]
    shaper: Shaper | None = None
    orders: KnobOrders | None = None
    prompts: PromptsSeen | None = None
    """Where requests are not followed."""
    ordered: int | None = None
    told_ns: int = 0
    burning: bool = False
    planned: bool = False

    @property
    def pid(self) -> int:
        return self.served.watch.replica.engine_pid


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
        self._shields: ShieldThread | None = None
        if "shield" in options.actions:
            self._shields = ShieldThread(options.neighbours, dry_run=options.dry_run)
        self._renewed_ns = 0

    # -- the watch ---------------------------------------------------------------------------------

    def attached(self, watch: ReplicaWatch) -> None:
        if self.endpoint is not None and not self._said_port:
            self._said_port = True
            url = f"http://127.0.0.1:{self.endpoint.port}/ready"
            self.emit("guard", action="ready", state="on", url=url)
            self.say(f"readiness at {url}")
        served = self._slo.served.get(watch.replica.engine_pid)
        if served is None:
            return
        effects = {name: Effect() for name in self.options.actions if name != "notify"}
        guarded = self._guarded[watch.replica.engine_pid] = _Guarded(served, effects)
        if "shape" in self.options.actions:
            self._begin_shaping(watch, guarded)

    def _begin_shaping(self, watch: ReplicaWatch, guarded: _Guarded) -> None:
        source, served = watch.attachment.source, guarded.served
        objective = next((one for one in served.foretold if one.metric == "tpot"), None)
        text = not_to_be_shaped(watch.replica)
        if not text and (objective is None or not isinstance(source, PythonSource)):
            text = "shaping needs a tpot objective for all routes; it is left out"
        if text or objective is None or not isinstance(source, PythonSource):
            self.emit("guard", action="shape", pid=guarded.pid, state="refused", text=text)
            self.say(f"guard: {text}")
            return
        guarded.prompts = PromptsSeen() if watch.replica.engine == "sglang" else None
        guarded.shaper = Shaper(objective.limit_ns / 1e9)
        guarded.orders = KnobOrders(source.engine_session)

    def detached(self, watch: ReplicaWatch) -> None:
        # The probe put the knobs back when it went.
        guarded = self._guarded.get(watch.replica.engine_pid)
        if guarded is None or guarded.served.watch is not watch:
            return
        del self._guarded[watch.replica.engine_pid]
        if guarded.ordered is not None:
            state = "dry run" if self.options.dry_run else "taken back"
            self.emit("guard", action="shape", pid=guarded.pid, state=state, tokens=None)
        for action, effect in guarded.effects.items():
            if effect.after.seen:
                self._tell_effect(guarded, action)

    def window(self, watch: ReplicaWatch, window: Window, alerts: list[Any]) -> None:
        guarded = self._guarded.get(watch.replica.engine_pid)
        if guarded is None:
            return
        expected = dict(islice(reversed(watch.expected), len(window.steps) + 1))
        violated = [guarded.served.violates(request) for request in window.requests]
        for effect in guarded.effects.values():
            for step in window.steps:
                effect.now.step(step, expected.get(step.step))
            for one in violated:
                if one is not None:
                    effect.now.request(one)
        if window.steps and guarded.shaper is not None:
            if guarded.served.forecaster is not None:
                pace = guarded.served.forecaster.pace
                whole = _whole_step(guarded, pace) if guarded.prompts is not None else 0
                for step in window.steps:
                    guarded.shaper.saw(pace, step)
                    if guarded.prompts is not None:
                        guarded.prompts.saw(step, guarded.ordered or whole, whole)
            self._shape(guarded, guarded.shaper, time.monotonic_ns())

    def tick(self, now_ns: int) -> Sequence[Raised]:
        burning, calm = False, True
        for guarded in self._guarded.values():
            served = guarded.served
            burns = served.burning(now_ns)
            burning, calm = burning or burns, calm and served.calm(now_ns)
            if burns != guarded.burning and (burns or served.calm(now_ns)):
                guarded.burning = burns
                self._notify(guarded)
            if burns and self._shields is not None and not guarded.planned:
                guarded.planned = True
                self._shields.plan(guarded.pid, served.watch.replica.pids)
            if guarded.orders is not None:
                self._keep(guarded, guarded.orders)
            if now_ns - guarded.told_ns >= EFFECT_NS:
                guarded.told_ns = now_ns
                for action, effect in guarded.effects.items():
                    if effect.on:
                        self._tell_effect(guarded, action)
        if self._shields is not None:
            self._shield_news(self._shields, now_ns)
        if self.endpoint is not None:
            self._answer(now_ns, burning, calm)
        return ()

    # -- actions -----------------------------------------------------------------------------------

    def _notify(self, guarded: _Guarded) -> None:
        if "notify" in self.options.actions:
            text = "an error budget burns" if guarded.burning else "the error budgets are at rest"
            state = "on" if guarded.burning else "taken back"
            self.emit("guard", action="notify", pid=guarded.pid, state=state, text=text)
            self.say(f"guard: {text} (process {guarded.pid})")

    def _answer(self, now_ns: int, burning: bool, calm: bool) -> None:
        changed = self.readiness.update(now_ns, burning, calm)
        told = self._slo.describe(now_ns)
        ready = self.readiness.ready or self.options.dry_run
        self._told = (ready, {"objectives": told}, metrics_text(told, ready))
        if not changed:
            return
        back = self.readiness.ready
        state = "dry run" if self.options.dry_run else "taken back" if back else "on"
        self.emit(
            "guard", action="ready", state=state, ready=back, estimate=None if back else self._no_more()
        )
        self.say("guard: ready again" if back else "guard: not ready, a budget burns")
        for guarded in self._guarded.values():
            if back:
                self._end(guarded, "ready")
            else:
                self._begin(guarded, "ready")

    def _no_more(self) -> dict[str, Any]:
        """What becomes of those under way if nothing more comes in: that is what the forecast is about."""
        found = [g.served.outlook for g in self._guarded.values() if g.served.outlook is not None]
        requests = sum(outlook.requests for outlook in found)
        bad = sum((outlook.share or 0.0) * outlook.requests for outlook in found)
        return {
            "requests": requests,
            "waiting": sum(outlook.waiting for outlook in found),
            "violating": round(bad / requests, 4) if requests else None,
        }

    def _shape(self, guarded: _Guarded, shaper: Shaper, now_ns: int) -> None:
        served, orders = guarded.served, guarded.orders
        prompts = _prompts(guarded)
        if served.forecaster is None or orders is None or prompts is None:
            return
        pace = served.forecaster.pace
        whole = _whole_step(guarded, pace)
        tokens = shaper.decide(pace, *prompts, whole, now_ns)
        if tokens == guarded.ordered:
            return
        guarded.ordered = tokens
        if tokens is None:
            orders.release()
            self._end(guarded, "shape")
        else:
            if not self.options.dry_run:
                orders.order(tokens=tokens, room=ROOM_TOKENS)
            self._begin(guarded, "shape")
        estimate = None if tokens is None or shaper.estimate is None else _rounded(shaper.estimate._asdict())
        state = "dry run" if self.options.dry_run else "taken back" if tokens is None else "on"
        self.emit(
            "guard", action="shape", pid=guarded.pid, state=state, tokens=tokens, tokens_whole=whole,
            estimate=estimate,
        )  # fmt: skip
        would = "would allow" if self.options.dry_run else "allows"
        self.say(f"guard: {would} {tokens or whole} tokens a step")

    def _keep(self, guarded: _Guarded, orders: KnobOrders) -> None:
        if guarded.ordered is None or self.options.dry_run:
            return
        source = guarded.served.watch.attachment.source
        blind = isinstance(source, PythonSource) and not source.follows_requests
        if blind or orders.refused:
            text = "the engine's knobs cannot be turned here; shaping ends"
            if blind:
                text = "requests are no longer followed, for what that costs; shaping ends"
            orders.release()
            self.say(f"guard: {text}")
            self.emit("guard", action="shape", pid=guarded.pid, state="refused", text=text)
            self._end(guarded, "shape", tell=False)
            guarded.shaper = guarded.orders = guarded.ordered = None
            return
        orders.renew()

    def _shield_news(self, shields: ShieldThread, now_ns: int) -> None:
        for values in shields.news():
            self.emit("guard", action="shield", **values)
            self.say(f"guard: {values['text']}")
            for guarded in self._guarded.values():
                if values["state"] == "on" and guarded.pid == values["pid"]:
                    self._begin(guarded, "shield")
                elif values["state"] == "taken back":
                    self._end(guarded, "shield")
        if now_ns - self._renewed_ns >= RENEW_NS:
            self._renewed_ns = now_ns
            shields.renew()

    # -- effects -----------------------------------------------------------------------------------

    def _begin(self, guarded: _Guarded, action: str) -> None:
        if not self.options.dry_run:
            guarded.effects[action].begin()

    def _end(self, guarded: _Guarded, action: str, *, tell: bool = True) -> None:
        effect = guarded.effects[action]
        if effect.on and tell:
            self._tell_effect(guarded, action)
        effect.end()

    def _tell_effect(self, guarded: _Guarded, action: str) -> None:
        values = guarded.effects[action].values()
        self.emit("guard_effect", action=action, pid=guarded.pid, **values)

    def close(self) -> None:
        if self.endpoint is not None:
            self.endpoint.close()
        if self._shields is not None and self._shields.close():
            self.emit("guard", action="shield", state="taken back", text="control groups are as they were")


def _whole_step(guarded: _Guarded, pace: Pace) -> int:
    """Tokens that the engine allows itself a step when nobody limits it."""
    orders = guarded.orders
    return (orders.state().tokens_was if orders is not None else None) or pace.room


def _prompts(guarded: _Guarded) -> tuple[int, float] | None:
    """Tokens of prompts that wait or are under way, and the mean context that they attend to."""
    if guarded.prompts is not None:
        return guarded.prompts.tokens, guarded.prompts.reach
    outlook = guarded.served.outlook
    return None if outlook is None else (outlook.prompt_tokens, outlook.prompt_reach)


def not_to_be_shaped(replica: Replica) -> str:
    """Why the steps of an engine cannot be shaped at all, in words; empty: the probe may try."""
    if replica.engine not in ("vllm", "sglang"):
        return f"shaping needs vLLM or SGLang, and this is {replica.engine}; it is left out"
    if replica.engine == "sglang":
        schedulers = [member.process for member in replica.members if member.role != "api"]
        titles = [process.cmdline[0] if process.cmdline else "" for process in schedulers]
        if len(titles) > 1 or any(_SEVERAL_RANKS.search(title) for title in titles):
            return (
                "SGLang's ranks make their batches each for itself, and would wait for ever for one that "
                "makes others; shaping needs one rank and is left out"
            )
    return ""


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    return {name: round(value, 2) if isinstance(value, float) else value for name, value in values.items()}
