"""The guard on a real vLLM under bursts of long prompts: TPOT kept and throughput, without and with it.

The same arrivals without and with, in turns; figures are those of the clients.
"""

from __future__ import annotations

import math
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from latencyprism.bench.alerting import WatchProcess
from latencyprism.bench.guard_plot import Block, svg
from latencyprism.bench.replayed import Replayed
from latencyprism.bench.traces import Arrival, Scale
from latencyprism.errors import PrismError
from latencyprism.lab import serve
from latencyprism.lab.generate import Request
from latencyprism.lab.launch import Options
from latencyprism.lab.models import Shape
from latencyprism.lab.outcome import Result
from latencyprism.records.objective import quantile_digits

SHAPE = Shape(layers=8, hidden=512, intermediate=1536, heads=8, kv_heads=4)
"""Large enough for long prompts to take seconds."""
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


def run(
    pairs: int, seconds: float, seed: int, plot: Path | None, say: Callable[[str], None]
) -> dict[str, Any]:
    """``pairs`` times ``seconds`` without and with the guard; ``plot``: an SVG file to write."""
    options = Options(slots=SLOTS, context=2048, batch_tokens=BATCH_TOKENS)
    blocks: dict[str, list[dict[str, Any]]] = {"without": [], "with": []}
    drawn: list[Block] = []
    with serve.start("vllm", options, shape=SHAPE) as server, tempfile.TemporaryDirectory() as folder:
        say(f"vllm serves, started in {server.start_s:.0f} s")
        quiet_ms = _quiet_ms(server, seed)
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
                told = _told(watch)
                blocks[name].append({**score(result, limit_ms), **told})
                drawn.append(Block(name == "with", _points(result), _limits(watch)))
                say(f"{name}: {_shown(blocks[name][-1]['violated_share'])} violate")
    if plot is not None:
        plot.write_text(svg(drawn, limit_ms), encoding="utf-8")
    return {
        "limit_ms": round(limit_ms, 2), "quiet_ms": round(quiet_ms, 2), **compare(blocks),
        "plot": None if plot is None else str(plot), "blocks": blocks,
    }  # fmt: skip


def _quiet_ms(server: serve.Server, seed: int) -> float:
    quiet = _replay(server, "quiet", arrivals(QUIET_S, seed, bursts=False), seed + 1000)
    known = [ms for r in quiet.requests if (ms := tpot_ms(r)) is not None]
    if not known:
        raise PrismError("the engine answered nothing while it was quiet", f"{len(quiet.requests)} were sent")
    return float(np.median(known))


def _points(result: Result) -> list[tuple[int, float]]:
    """(end of an answer ns, its TPOT ms)"""
    return [(r.end_ns, ms) for r in result.requests if r.end_ns and (ms := tpot_ms(r)) is not None]


def _limits(watch: WatchProcess) -> list[tuple[int, int | None]]:
    """(when ns, tokens a step that the guard allows; None: all)"""
    return [
        (at, entry["tokens"]) for at, entry in list(watch.lines) if "tokens" in entry and _is_order(entry)
    ]


def _is_order(entry: dict[str, Any]) -> bool:
    return entry.get("event") == "guard" and entry.get("action") == "shape"


def _shown(share: float | None) -> str:
    return "none was judged, so none" if share is None else f"{share:.1%}"


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
        "throughput_without": rates["without"],
        "throughput_with": rates["with"],
        "attainment_without": None if before is None else round(1.0 - before, 4),
        "attainment_with": None if after is None else round(1.0 - after, 4),
        "violations_cut": cut,
        "throughput_lost": lost,
    }


def _told(watch: WatchProcess) -> dict[str, Any]:
    entries = [entry for _, entry in list(watch.lines)]
    orders = [entry for entry in entries if _is_order(entry) and "tokens" in entry]
    effects = [e for e in entries if e.get("event") == "guard_effect" and e.get("action") == "shape"]
    tokens = [entry["tokens"] for entry in orders]
    said = [e["text"] for e in entries if e.get("event") in ("notice", "guard", "gone") and e.get("text")]
    return {
        "orders": len(orders),
        "turns": turns(tokens),
        "tokens": tokens,
        "estimate": next((entry["estimate"] for entry in orders if entry.get("estimate")), None),
        "effect": effects[-1] if effects else None,
        "notices": said,
    }


def turns(tokens: Sequence[int | None]) -> int:
    """How often a limit that was lowered was raised or the other way round: many are an oscillation."""
    values = [math.inf if one is None else float(one) for one in tokens]
    signs = [after > before for before, after in pairwise(values) if after != before]
    return sum(one != other for one, other in pairwise(signs))


def _quantile(values: Sequence[float], q: float) -> float | None:
    return round(float(np.quantile(values, q)), 2) if values else None
