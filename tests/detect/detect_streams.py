"""Synthetic engines for detector tests: known cost of work, known noise."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from latencyprism.records.step import Step

DATA = Path(os.environ.get("LATENCYPRISM_DATA") or Path(__file__).parents[3] / "shared" / "data")


def recorded(name: str) -> Path:
    """A recorded step log, or skip."""
    path = DATA / "steps" / name
    if not path.exists():
        pytest.skip(f"needs the reference data {name}; LATENCYPRISM_DATA names its folder")
    return path


def steady(
    count: int,
    *,
    base_ms: float = 20.0,
    sd: float = 0.0,
    rho: float = 0.0,
    seed: int = 0,
    batches: tuple[int, ...] = (8,),
    shift_at: int | None = None,
    shift: float = 0.0,
    stalls: dict[int, float] | None = None,
    scale: float = 1.0,
) -> Iterator[Step]:
    """Decode steps with AR(1) noise (sd, lag-1 correlation rho, log domain)."""
    rng = random.Random(seed)
    noise, now, batch = 0.0, 10**9, rng.choice(batches)
    for number in range(count):
        noise = rho * noise + sd * math.sqrt(1.0 - rho * rho) * rng.gauss(0.0, 1.0)
        if rng.random() < 0.01:
            batch = rng.choice(batches)
        context = batch * (200 + number % 300)
        took = base_ms * (1.0 + 0.01 * batch + context / 4e4) * math.exp(noise)
        if shift_at is not None and number >= shift_at:
            took *= 1.0 + shift
        took = (took + (stalls or {}).get(number, 0.0)) * scale
        end = now + int(took * 1e6)
        yield Step("e", 0, 0, number, now, end, None, batch, 0, batch, 0, batch, 0, context, 0)
        now = end + 50_000


def serving(
    phases: tuple[tuple[int, int, int, int], ...], *, tiny: bool = False, sd: float = 0.05, seed: int = 0
) -> Iterator[Step]:
    """A continuous-batching engine with chunked prefill under a closed loop. ``phases``: (steps, clients,
    prompt tokens, output tokens)."""
    rng = random.Random(seed)
    now, number = 10**12, 0
    for steps, clients, prompt, output in phases:
        alive: list[list[int]] = []
        for _ in range(steps):
            while len(alive) < clients:
                answer = max(2, int(output * rng.uniform(0.5, 1.5)))
                alive.append([0, answer, max(4, int(prompt * rng.uniform(0.5, 1.5)))])
            step, alive = _one_batch(alive, tiny, sd, rng, number, now)
            yield step
            now, number = step.end_ns + 60_000, number + 1


def _one_batch(
    alive: list[list[int]], tiny: bool, sd: float, rng: random.Random, number: int, now: int
) -> tuple[Step, list[list[int]]]:
    budget, prefill, attention, prefilling, decoding, context = 256, 0, 0, 0, 0, 0
    for request in alive:
        if request[2] == 0:
            decoding += 1
            request[0] += 1
            request[1] -= 1
            context += request[0]
        elif budget > 0:
            chunk = min(budget, request[2])
            request[2] -= chunk
            request[0] += chunk
            budget -= chunk
            prefill += chunk
            attention += chunk * request[0]
            prefilling += 1
            context += request[0]
    padded = decoding if decoding < 8 else (decoding + 7) // 8 * 8
    if tiny:
        took = 1.6 + 0.12 * padded + context / 2e4 + prefill / 40 + attention / 2e6
    else:
        took = 14 + 0.3 * padded + context / 3e3 + prefill * 0.9 + (8 if prefill else 0) + attention / 2e5
    end = now + int(took * math.exp(rng.gauss(0.0, sd)) * 1e6)
    step = Step(
        "e", 0, 0, number, now, end, None, decoding + prefilling, prefilling, decoding, prefill, decoding,
        0, context, attention, gap_ns=60_000,
    )  # fmt: skip
    return step, [request for request in alive if request[1] > 0]
