"""The guard on a real vLLM under bursts of long prompts: TPOT kept and throughput, without and with it.

The same arrivals without and with, in turns; figures are those of the clients.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from latencyprism.bench.alerting import WatchProcess
from latencyprism.bench.forecast import SHAPE
from latencyprism.bench.replayed import Replayed
from latencyprism.bench.traces import Arrival, Scale
from latencyprism.lab import serve
from latencyprism.lab.generate import Request
from latencyprism.lab.launch import Options
from latencyprism.lab.outcome import Result
from latencyprism.records.objective import quantile_digits

BATCH_TOKENS, SLOTS = 1024, 16
QUIET_S, LEAD_S = 10.0, 12.0
FACTOR = 2.5
"""The TPOT limit, in those of a quiet engine."""
SHARE = 0.95
BURST_EVERY_S, BURST, LONG_PROMPT = 10.0, 5, 1500
RATE, SHORT_PROMPT, ANSWER = 2.0, 16, (24, 64)


def arrivals(seconds: float, seed: int, *, bursts: bool = True) -> list[Arrival]:
    """Short questions all the time, and now and then some long prompts at once."""
    rng = random.Random(seed)
    found, at = [], 0.0
    while at < seconds:
        found.append(Arrival(at, SHORT_PROMPT, rng.randint(*ANSWER)))
        at += rng.expovariate(RATE)
    burst = LEAD_S / 2
    while bursts and burst < seconds - 3:
        found += [Arrival(burst + 0.01 * n, LONG_PROMPT + 20 * n, 16) for n in range(BURST)]
        burst += BURST_EVERY_S
    return sorted(found)


def run(pairs: int, seconds: float, seed: int, say: Callable[[str], None]) -> dict[str, Any]:
    """``pairs`` times ``seconds`` without and with the guard."""
    options = Options(slots=SLOTS, context=2048, batch_tokens=BATCH_TOKENS)
    blocks: dict[str, list[dict[str, Any]]] = {"without": [], "with": []}
    with serve.start("vllm", options, shape=SHAPE) as server, tempfile.TemporaryDirectory() as folder:
        say(f"vllm serves, started in {server.start_s:.0f} s")
        quiet = _replay(server, "quiet", arrivals(QUIET_S, seed, bursts=False), seed + 1000)
        quiet_ms = float(np.median([ms for r in quiet.requests if (ms := tpot_ms(r)) is not None]))
        limit_ms = FACTOR * quiet_ms
        say(f"quiet TPOT {quiet_ms:.1f} ms, limit {limit_ms:.1f} ms")
        file = Path(folder) / "slo.toml"
        digits = quantile_digits(SHARE)
        file.write_text(f'period = "1h"\ntpot_p{digits} = "< {limit_ms * 1e3:.0f} us"\n')
        for pair in range(pairs):
            plan = arrivals(LEAD_S + seconds, seed + pair)
            for place, name in enumerate(("without", "with")):
                extra = ["--guard", "shape"] if name == "with" else []
                watch = WatchProcess(server.pid, "--no-capture", "--slo", str(file), *extra)
                try:
                    result = _replay(server, name, plan, seed + 2 * pair + place)
                    time.sleep(1.0)
                finally:
                    watch.close()
                blocks[name].append({**score(result, limit_ms), **_told(watch)})
                say(f"{name}: {blocks[name][-1]['violated_share']:.1%} violate")
    return {
        "limit_ms": round(limit_ms, 2),
        "quiet_ms": round(quiet_ms, 2),
        **compare(blocks),
        "blocks": blocks,
    }


def _replay(server: serve.Server, name: str, plan: Sequence[Arrival], seed: int) -> Result:
    # Prompts of another seed are others: none is in the prefix cache.
    replay = Replayed(server, name, plan, Scale(1.0, 1.0), seed=seed)
    while replay.running:
        time.sleep(0.1)
    return replay.result()


def tpot_ms(request: Request) -> float | None:
    """As the client saw it."""
    tokens = request.output_tokens
    if request.outcome != "ok" or not tokens or tokens < 2:
        return None
    if request.first_ns is None or request.end_ns is None:
        return None
    return (request.end_ns - request.first_ns) / 1e6 / (tokens - 1)


def score(result: Result, limit_ms: float) -> dict[str, Any]:
    """What lies after the lead-in, in which the watch learns."""
    since_ns = result.began_ns + int(LEAD_S * 1e9)
    sent = [r for r in result.requests if r.due_ns >= since_ns]
    ok = [r for r in sent if r.outcome == "ok"]
    tpots = [ms for r in ok if (ms := tpot_ms(r)) is not None]
    last_ns = max((r.end_ns or 0 for r in ok), default=since_ns)
    tokens = sum((r.prompt_tokens or r.asked_prompt_tokens) + (r.output_tokens or 0) for r in ok)
    short = [(r.first_ns - r.due_ns) / 1e6 for r in ok if r.first_ns and r.asked_prompt_tokens < LONG_PROMPT]
    long = [(r.first_ns - r.due_ns) / 1e6 for r in ok if r.first_ns and r.asked_prompt_tokens >= LONG_PROMPT]
    return {
        "requests": len(sent),
        "ok": len(ok),
        "violations": sum(ms > limit_ms for ms in tpots),
        "judged": len(tpots),
        "violated_share": round(float(np.mean(np.array(tpots) > limit_ms)), 4) if tpots else None,
        "tpot_ms_p50": _quantile(tpots, 0.5),
        "tpot_ms_p95": _quantile(tpots, 0.95),
        "ttft_short_ms_p50": _quantile(short, 0.5),
        "ttft_long_ms_p50": _quantile(long, 0.5),
        "tokens_per_s": round(tokens / ((last_ns - since_ns) / 1e9), 1) if last_ns > since_ns else None,
    }


def compare(blocks: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Violations cut and throughput lost, all blocks together; None where there was nothing to cut."""
    shares, rates = {}, {}
    for name, rows in blocks.items():
        judged = sum(row["judged"] for row in rows)
        shares[name] = sum(row["violations"] for row in rows) / judged if judged else None
        known = [row["tokens_per_s"] for row in rows if row["tokens_per_s"]]
        rates[name] = float(np.mean(known)) if known else None
    before, after = shares["without"], shares["with"]
    cut = None if not before or after is None else round(1.0 - after / before, 4)
    lost = None
    if rates["without"] and rates["with"]:
        lost = round(1.0 - rates["with"] / rates["without"], 4)
    return {
        "attainment_without": None if before is None else round(1.0 - before, 4),
        "attainment_with": None if after is None else round(1.0 - after, 4),
        "violations_cut": cut,
        "throughput_lost": lost,
    }


def _told(watch: WatchProcess) -> dict[str, Any]:
    orders = [entry for _, entry in watch.lines if entry.get("event") == "guard"]
    effects = [entry for _, entry in watch.lines if entry.get("event") == "guard_effect"]
    return {
        "orders": sum("tokens" in entry for entry in orders),
        "tokens": [entry["tokens"] for entry in orders if "tokens" in entry],
        "estimate": next((entry["estimate"] for entry in orders if entry.get("estimate")), None),
        "effect": effects[-1] if effects else None,
    }


def _quantile(values: Sequence[float], q: float) -> float | None:
    return round(float(np.quantile(values, q)), 2) if values else None
