"""Objectives along with a watch: budgets from the requests that end, a forecast for those under way."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from latencyprism.records import Alert, Request, Window
from latencyprism.records.objective import Objective
from latencyprism.sentinel.attendant import Attendant, Raised
from latencyprism.sentinel.replica_watch import ReplicaWatch, utc
from latencyprism.sentinel.server_names import server_names
from latencyprism.slo.budget import Account, Burn
from latencyprism.slo.forecast import Forecaster, Outlook
from latencyprism.slo.objectives import Objectives
from latencyprism.slo.words import burn_words, objective_words
from latencyprism.timeline.python_source import PythonSource

EVENT_NS = 1_000_000_000
LOOK_SHARE = 50
"""A look is taken at most so often that it takes a fiftieth of the time."""
LOOK_LEAST_NS = 20_000_000
FORETELL_BURN, FORETELL_MOST, FORETELL_LEAST = 14.4, 0.5, 3
"""A forecast is told where, even at its low end, the share burns the budget so many times too fast (at most
this share), and as many requests of those under way will violate."""
FORGET_NS = 30_000_000_000
HEARD_NS = 60_000_000_000


@dataclass
class Served:
    """One replica under objectives."""

    watch: ReplicaWatch
    accounts: list[Account]
    forecaster: Forecaster | None
    foretold: list[Objective] = field(default_factory=list)
    """TTFT and TPOT objectives that the forecast is about."""
    outlook: Outlook | None = None
    looked_ns: int = 0
    pause_ns: int = LOOK_LEAST_NS
    told_ns: int = 0
    warned_ns: int | None = None
    attached_ns: int = 0
    steps: int = 0
    ended: int = 0
    mute: bool = False

    def burning(self, now_ns: int) -> bool:
        return any(account.burning(now_ns) for account in self.accounts)

    def violates(self, request: Request) -> bool | None:
        """Any of its objectives; None: none could be judged."""
        judged = [account.objective.judge(request) for account in self.accounts]
        known = [one.violated for one in judged if one is not None]
        return any(known) if known else None

    def calm(self, now_ns: int) -> bool:
        return all(account.calm(now_ns) for account in self.accounts)


class SloWatch(Attendant):
    """Raises alerts of kind ``slo``; emits an event ``forecast`` at most once a second a replica."""

    name = "objectives"
    budget_ppm = 10_000  # without requests nothing can be judged

    def __init__(self, objectives: Objectives) -> None:
        super().__init__()
        self._objectives = objectives
        self.served: dict[int, Served] = {}
        """By engine process."""
        self._kept: dict[tuple[str, int], list[Account]] = {}

    # -- the watch ---------------------------------------------------------------------------------

    def attached(self, watch: ReplicaWatch) -> None:
        names = server_names(watch.replica)
        holding = self._without_routes(watch, self._objectives.for_server(names.models, names.port))
        if not holding:
            self.say(f"no objective holds for {watch.replica.engine} {watch.replica.engine_pid}")
            return
        # An engine that was started again goes on with the budget it had.
        place = (watch.replica.engine, watch.replica.number)
        accounts = self._kept.get(place)
        if accounts is None or [a.objective for a in accounts] != holding:
            accounts = [Account(one, self._objectives.windows_of(one)) for one in holding]
            self._kept[place] = accounts
        source = watch.attachment.source
        foretold = [one for metric in ("ttft", "tpot") if (one := _strictest(holding, metric)) is not None]
        forecaster = None
        if foretold and isinstance(source, PythonSource):
            limits = {one.metric: one.limit_ns for one in foretold}
            forecaster = Forecaster(watch.detector.model, limits.get("ttft"), limits.get("tpot"))
        served = Served(watch, accounts, forecaster, foretold, attached_ns=time.monotonic_ns())
        self.served[watch.replica.engine_pid] = served
        self.emit(
            "objectives", pid=watch.replica.engine_pid, objectives=[objective_words(o) for o in holding]
        )

    def _without_routes(self, watch: ReplicaWatch, holding: list[Objective]) -> list[Objective]:
        """Those that can be judged here: which route a request came by is told by vLLM alone."""
        left_out = [one for one in holding if one.route is not None and watch.replica.engine != "vllm"]
        if left_out:
            text = (
                f"{watch.replica.engine} does not tell which route a request came by: not judged: "
                f"{', '.join(one.label for one in left_out)}. Give such a class of requests a port of its own"
            )
            self.say(text)
            self.emit("notice", engine=watch.replica.engine, pid=watch.replica.engine_pid, text=text)
        return [one for one in holding if one not in left_out]

    def detached(self, watch: ReplicaWatch) -> None:
        served = self.served.get(watch.replica.engine_pid)
        if served is not None and served.watch is watch:
            del self.served[watch.replica.engine_pid]

    def window(self, watch: ReplicaWatch, window: Window, alerts: list[Alert]) -> None:
        served = self.served.get(watch.replica.engine_pid)
        if served is None:
            return
        now_ns = time.monotonic_ns()
        served.steps += len(window.steps)
        served.ended += len(window.requests)
        for request in window.requests:
            for account in served.accounts:
                account.take(now_ns, request)
        forecaster = served.forecaster
        if forecaster is None:
            return
        forecaster.steps(window.steps)
        forecaster.ended(window.requests)
        if window.steps and now_ns - served.looked_ns >= served.pause_ns:
            self._look(served, forecaster, now_ns)

    def _look(self, served: Served, forecaster: Forecaster, now_ns: int) -> None:
        source = served.watch.attachment.source
        assert isinstance(source, PythonSource)
        served.outlook = forecaster.look(now_ns, source.requests.under_way())
        served.looked_ns = now_ns
        spent_ns = time.monotonic_ns() - now_ns
        served.pause_ns = max(LOOK_LEAST_NS, LOOK_SHARE * spent_ns)

    def tick(self, now_ns: int) -> Sequence[Raised]:
        raised = []
        for served in self.served.values():
            for account in served.accounts:
                raised += [
                    Raised(served.watch, alert=_burn_alert(served.watch, account, burn, now_ns))
                    for burn in account.news(now_ns)
                ]
            early = self._foretell(served, now_ns)
            if early is not None:
                raised.append(Raised(served.watch, alert=early))
            self._note_silence(served, now_ns)
        return raised

    # -- what is coming ----------------------------------------------------------------------------

    def _foretell(self, served: Served, now_ns: int) -> Alert | None:
        outlook = served.outlook
        if outlook is None or outlook.share is None or now_ns - outlook.time_ns > EVENT_NS:
            return None
        if now_ns - served.told_ns >= EVENT_NS:
            served.told_ns = now_ns
            self.emit("forecast", **forecast_values(served, outlook))
        assert outlook.low is not None
        budget = min(one.budget for one in served.foretold)
        level = min(FORETELL_BURN * budget, FORETELL_MOST)
        sure = outlook.low * outlook.requests >= FORETELL_LEAST and outlook.low >= level
        if not sure:
            if served.warned_ns is not None and now_ns - served.warned_ns > FORGET_NS:
                served.warned_ns = None
            return None
        fresh = served.warned_ns is None
        served.warned_ns = now_ns
        return _forecast_alert(served, outlook, now_ns) if fresh else None

    def _note_silence(self, served: Served, now_ns: int) -> None:
        """Objectives without requests to judge must not look kept."""
        quiet = served.steps > 100 and not served.ended and now_ns - served.attached_ns > HEARD_NS
        if quiet and not served.mute:
            served.mute = True
            text = (
                f"no request of {served.watch.replica.engine} was seen to end: its objectives are not judged"
            )
            self.say(text)
            self.emit("notice", text=text)

    def describe(self, now_ns: int) -> list[dict[str, Any]]:
        """Each objective as it stands."""
        return [
            {
                "pid": pid, "objective": account.objective.label, "requests": account.total,
                "violations": account.violations, "budget_left": account.left(now_ns),
                "burning": account.burning(now_ns),
            }
            for pid, served in list(self.served.items())
            for account in served.accounts
        ]  # fmt: skip


def forecast_values(served: Served, outlook: Outlook) -> dict[str, Any]:
    """The values of a ``forecast`` event."""
    known = [value for value in (outlook.share, outlook.low, outlook.high) if value is not None]
    share, low, high = (round(value, 4) for value in known)
    return {
        "engine": served.watch.replica.engine,
        "pid": served.watch.replica.engine_pid,
        "requests": outlook.requests,
        "waiting": outlook.waiting,
        "share": share,
        "low": low,
        "high": high,
        "objectives": [one.label for one in served.foretold],
    }


def _strictest(objectives: Sequence[Objective], metric: str) -> Objective | None:
    """The objective of a metric that the most requests must meet, of those for all routes."""
    found = [one for one in objectives if one.metric == metric and one.route is None]
    return max(found, key=lambda one: (one.share, -one.limit_ns), default=None)


def _burn_alert(watch: ReplicaWatch, account: Account, burn: Burn, now_ns: int) -> Alert:
    value_ns = account.value_ns()
    limit_ms = account.objective.limit_ns / 1e6
    observed_ms = limit_ms if value_ns is None else value_ns / 1e6
    text = burn_words(account, burn, now_ns)
    return _alert(watch, burn.window.level, observed_ms, limit_ms, text, now_ns)


def _forecast_alert(served: Served, outlook: Outlook, now_ns: int) -> Alert:
    assert outlook.share is not None and outlook.low is not None and outlook.high is not None
    objective = served.foretold[0]
    share = f"{outlook.share:.0%} ({outlook.low:.0%} to {outlook.high:.0%})"
    whom = f"{outlook.requests} requests under way, {outlook.waiting} of them waiting"
    what = " or ".join(objective_words(one) for one in served.foretold)
    text = f"forecast: {share} of {whom}, will violate {what}"
    limit_ms = objective.limit_ns / 1e6
    return _alert(served.watch, "evidence", limit_ms, limit_ms, text, now_ns)


def _alert(
    watch: ReplicaWatch, level: str, observed_ms: float, limit_ms: float, text: str, now_ns: int
) -> Alert:
    step = watch.last_step
    number, rank = (0, 0) if step is None else (step.step, step.rank)
    return Alert(
        id=secrets.token_hex(8), kind="slo", level=level, engine=watch.replica.engine,
        replica=watch.replica.number, rank=rank, step=number, onset_step=number, time=utc(now_ns),
        observed_ms=round(observed_ms, 3), expected_ms=round(limit_ms, 3),
        excess=round(observed_ms / limit_ms - 1.0, 4), where=text,
    )  # fmt: skip
