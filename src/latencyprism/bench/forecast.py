"""Forecast of TTFT and TPOT violations on a real engine under arrivals of published traces.

A closed loop first, to learn step times and what the engine can take; then each trace at a part of that.
Limits from strict to lenient are foretold side by side; told is the one that about a quarter of the requests
missed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from latencyprism.bench.forecasting import Scorer
from latencyprism.bench.replayed import Replayed
from latencyprism.bench.simulated_engine import SimulatedEngine
from latencyprism.bench.traces import Arrival, Scale, scaled
from latencyprism.detect import Detector
from latencyprism.engines.discovery import discover
from latencyprism.errors import PrismError
from latencyprism.lab import serve
from latencyprism.lab.launch import Options
from latencyprism.records import Request, Step
from latencyprism.sentinel.targets import attach
from latencyprism.slo.forecast import Forecaster
from latencyprism.timeline.python_source import PythonSource
from latencyprism.timeline.requests import UnderWay

NO_BUDGET_PPM = 1_000_000
LEARN_PART = 0.2
MISSED = 0.25
TTFT_LIMITS_S = (1.2, 1.6, 2.2, 3.0, 4.5, 7.0)
TPOT_FACTORS = (0.8, 0.9, 1.0, 1.15, 1.35, 1.7)
CLOSED_CLIENTS, CLOSED_S = 20, 12.0
FEWEST_SEEN = 12
LOOK_NS = 100_000_000
SLOTS = 16
SCALE = Scale(prompt=8.0, output=2.0, longest_prompt=1200, longest_output=250)
"""Answers that take seconds, and a hundred of them in a minute or so."""
SIMULATED = {"slots": SLOTS, "base_ms": 16.0, "decode_ms": 1.0, "noise": 0.2, "wander": 0.1}
"""About as fast as the real one on a core."""


def simulated_rate(plan: Sequence[Arrival], load: float) -> float:
    """Requests a second that are ``load`` of what the simulated engine gets done in a closed loop."""
    closed = [arrival._replace(at_s=0.0) for arrival in scaled(plan[:500], 1.0, SCALE)]
    run = SimulatedEngine(closed, **SIMULATED)  # type: ignore[arg-type]
    begun = run.now_ns
    while not run.over:
        run.step()
    return load * len(closed) / ((run.now_ns - begun) / 1e9)


def simulate(arrivals: Sequence[Arrival], seed: int = 0, **engine: Any) -> dict[str, Any]:
    """The same judgement on a simulated engine, in seconds."""
    judged = _Judged(Detector())
    run = SimulatedEngine(arrivals, seed=seed, **engine)
    while not run.over:
        step, ended = run.step()
        if step is None:
            continue
        judged.steps([step])
        judged.take(ended)
        if not judged.scorers and len(judged.seen) >= LEARN_PART * len(arrivals) and judged.may_judge:
            judged.judge()
        judged.look(run.now_ns, run.under_way)
    return judged.result()


class _Judged:
    """Forecasters with limits from strict to lenient on one stream; told is what those say whose limits were
    missed by a share nearest to ``MISSED``."""

    def __init__(self, detector: Detector) -> None:
        self.detector = detector
        self.forecasters = [Forecaster(detector.model, int(limit * 1e9), 10**15) for limit in TTFT_LIMITS_S]
        self.seen: list[Request] = []
        self.scorers: list[Scorer] = []
        self.look_us: list[float] = []
        self.output_tokens = 0
        self._looked_ns = 0

    def steps(self, steps: Sequence[Step]) -> None:
        for step in steps:
            self.detector.observe(step)
            self.output_tokens += step.decode_tokens or 0
        for forecaster in self.forecasters:
            forecaster.steps(steps)

    def take(self, ended: Sequence[Request]) -> None:
        self.seen += ended
        for forecaster in self.forecasters:
            forecaster.ended(ended)
        for scorer in self.scorers:
            scorer.ended(ended)

    def look(self, now_ns: int, flights: Callable[[], Sequence[UnderWay]]) -> None:
        if now_ns - self._looked_ns < LOOK_NS:
            return
        self._looked_ns, found = now_ns, flights()
        for place, forecaster in enumerate(self.forecasters):
            begun = time.perf_counter_ns()
            outlook = forecaster.look(now_ns, found)
            self.look_us.append((time.perf_counter_ns() - begun) / 1e3)
            if self.scorers:
                self.scorers[place].look(outlook)

    @property
    def may_judge(self) -> bool:
        """Were enough requests seen to set limits by?"""
        return sum(r.tpot_ns is not None for r in self.seen) >= FEWEST_SEEN

    def judge(self) -> None:
        """From here on. TPOT limits lie around the median of what was seen until now."""
        tpot = [r.tpot_ns for r in self.seen if r.tpot_ns is not None]
        median = float(np.median(tpot))
        for forecaster, seconds, factor in zip(self.forecasters, TTFT_LIMITS_S, TPOT_FACTORS, strict=True):
            forecaster.tpot_limit_s = median * factor / 1e9
            self.scorers.append(Scorer({"ttft": int(seconds * 1e9), "tpot": int(median * factor)}))

    def result(self) -> dict[str, Any]:
        found = [scorer.result() for scorer in self.scorers]
        if not found:
            seen = f"{len(self.seen)} requests ended"
            raise PrismError("the replay was too short to be judged", seen, "take longer, with -d")

        def missed(metric: str) -> Callable[[int], float]:
            return lambda place: abs((found[place][metric]["violated_share"] or 0.0) - MISSED)

        ttft, tpot = (min(range(len(found)), key=missed(metric)) for metric in ("ttft", "tpot"))
        return {
            "requests": found[ttft]["requests"],
            "ttft": found[ttft]["ttft"],
            "tpot": found[tpot]["tpot"],
            "share": found[ttft]["share"],
            "look_us": {
                "p50": round(float(np.median(self.look_us)), 1),
                "p99": round(float(np.quantile(self.look_us, 0.99)), 1),
            },
        }


class _Reader:
    """One attachment, read from this thread."""

    def __init__(self, server: serve.Server) -> None:
        self.attachment = attach(discover(server.pid)[0])
        source = self.attachment.source
        if not isinstance(source, PythonSource):
            self.attachment.close()
            raise PrismError(f"single requests of {server.engine} are not observed")
        source.allow(NO_BUDGET_PPM)
        self.source = source
        self._renewed = 0.0

    def follow(self, judged: _Judged, running: Callable[[], bool], when: float = math.inf) -> None:
        """Until ``running`` says no; judged from the time ``when`` on."""
        while running():
            if time.monotonic() - self._renewed > 0.5:
                self._renewed = time.monotonic()
                self.source.renew()
            window = self.source.poll()
            judged.steps(window.steps)
            judged.take(window.requests)
            if not judged.scorers and time.monotonic() > when and judged.may_judge:
                judged.judge()
            if window.steps:
                judged.look(time.monotonic_ns(), self.source.requests.under_way)
            time.sleep(0.005)


def run(
    engine: str, plans: Mapping[str, Sequence[Arrival]], seconds: float, load: float, seed: int,
    say: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    """``seconds`` of each of the ``plans`` by name, of which the first part sets the limits; ``load``: rate
    of arrivals as a share of what a closed loop gets done."""
    found: dict[str, Any] = {"engine": engine, "load": load, "traces": {}}
    options = Options(slots=SLOTS, context=2048, batch_tokens=256)
    with serve.start(engine, options) as server:  # type: ignore[arg-type]
        say(f"{engine} serves, started in {server.start_s:.0f} s")
        for name, plan in plans.items():
            # Anew for each: what a probe dropped because the machine was busy does not come back.
            reader = _Reader(server)
            try:
                told = _one_trace(server, reader, name, plan, seconds, load, seed, say)
                told["followed"] = reader.source.follows_requests
                told["lost"] = reader.source.lost
            except PrismError as error:
                say(f"{name}: {error}")
                told = {"failed": str(error)}
            finally:
                reader.attachment.close()
            found["traces"][name] = told
    return found


def _one_trace(
    server: serve.Server, reader: _Reader, name: str, plan: Sequence[Arrival], seconds: float, load: float,
    seed: int, say: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    scale, judged = SCALE, _Judged(Detector())
    rate = load * _capacity(server, reader, judged, plan, scale, seed)
    arrivals = scaled(plan[: max(30, int(rate * seconds))], rate, scale)
    say(f"{name}: {len(arrivals)} requests at {rate:.2f} a second")
    judged.seen.clear()
    replay = Replayed(server, name, arrivals, scale, seed=seed)
    try:
        reader.follow(judged, lambda: replay.running, time.monotonic() + LEARN_PART * seconds)
        until = time.monotonic() + 3.0
        reader.follow(judged, lambda: time.monotonic() < until)
    finally:
        replay.stop()
    summary = replay.result().summary()
    load_seen = {key: summary[key] for key in ("requests", "ok", "failed", "tokens_per_s")}
    return {"rate": round(rate, 3), **judged.result(), "load": load_seen}


def _capacity(
    server: serve.Server, reader: _Reader, judged: _Judged, plan: Sequence[Arrival], scale: Scale, seed: int
) -> float:
    """Requests a second with lengths as in the trace, from the tokens of a closed loop: of the requests
    themselves the short ones would end first."""
    lengths = scaled(plan[:400], 1.0, scale)
    closed = [arrival._replace(at_s=0.0) for arrival in lengths]
    replay = Replayed(server, "closed", closed, scale, seed=seed + 1, clients=CLOSED_CLIENTS)
    try:
        settle = time.monotonic() + CLOSED_S / 4
        reader.follow(judged, lambda: replay.running and time.monotonic() < settle)
        before, begun = judged.output_tokens, time.monotonic()
        until = begun + CLOSED_S
        reader.follow(judged, lambda: replay.running and time.monotonic() < until)
        tokens = judged.output_tokens - before
        rate = tokens / (time.monotonic() - begun) / float(np.mean([a.output for a in lengths]))
        replay.end()
        reader.follow(judged, lambda: replay.running)
    finally:
        replay.stop()
    if tokens < 50:
        raise PrismError("the engine got next to nothing done", f"{tokens} tokens in {CLOSED_S:.0f} s")
    return rate
