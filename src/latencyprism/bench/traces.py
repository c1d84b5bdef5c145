"""Arrivals of published traces of LLM services, scaled to a tiny engine."""

from __future__ import annotations

import csv
import gzip
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import islice, pairwise
from pathlib import Path
from typing import NamedTuple

from latencyprism.errors import BadInput
from latencyprism.lab.profiles import FIRST_PLAIN_TOKEN, LAST_PLAIN_TOKEN

TRACES = {
    "azure": "azure_2023_conv.csv.gz",
    "azure-code": "azure_2023_code.csv.gz",
    "mooncake": "mooncake_conversation.jsonl.gz",
}
BLOCK_TOKENS = 512
MOST = 4000


class Arrival(NamedTuple):
    """``at_s`` from the trace's first; ``blocks``: hashes of the prompt's blocks of ``BLOCK_TOKENS`` tokens,
    empty where the trace tells none."""

    at_s: float
    prompt: int
    output: int
    blocks: tuple[int, ...] = ()


@dataclass(frozen=True)
class Scale:
    """Lengths are divided by these and cut at these."""

    prompt: float = 8.0
    output: float = 1.0
    longest_prompt: int = 1200
    longest_output: int = 400


def read_trace(folder: Path, name: str, *, skip: int = 0, most: int = MOST) -> list[Arrival]:
    """``most`` arrivals of a trace in ``folder``. BadInput where it is not there or is another thing."""
    path = folder / TRACES[name]
    try:
        with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
            rows = _mooncake(file) if name == "mooncake" else _azure(csv.DictReader(file))
            found = list(islice(rows, skip, skip + most))
    except (OSError, EOFError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise BadInput(f"cannot read {path}", why, "give the folder of the traces with --traces") from None
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path} is no trace of this kind", f"{type(error).__name__}: {error}") from None
    if len(found) < 2 or any(b.at_s < a.at_s for a, b in pairwise(found)):
        raise BadInput(f"{path} is no trace of this kind", "it holds no arrivals in order of time")
    return found


def synthetic(count: int, seed: int) -> list[Arrival]:
    """Where no trace is at hand: arrivals in bursts, prompts and answers log-normal with the medians and
    spreads of conversations."""
    rng, at, found = random.Random(seed), 0.0, []
    hurried = False
    for _ in range(count):
        hurried = hurried if rng.random() < 0.9 else not hurried
        at += rng.expovariate(2.5 if hurried else 0.7)
        prompt = int(min(max(rng.lognormvariate(6.9, 1.0), 8), 14_000))
        found.append(Arrival(at, prompt, int(min(max(rng.lognormvariate(5.1, 0.7), 4), 1500))))
    return found


def _azure(rows: Iterator[dict[str, str]] | csv.DictReader[str]) -> Iterator[Arrival]:
    first = None
    for row in rows:
        at = datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp()
        first = at if first is None else first
        yield Arrival(at - first, int(row["ContextTokens"]), int(row["GeneratedTokens"]))


def _mooncake(lines: Iterator[str] | Sequence[str]) -> Iterator[Arrival]:
    for line in lines:
        row = json.loads(line)
        blocks = tuple(int(block) for block in row["hash_ids"])
        yield Arrival(
            float(row["timestamp"]) / 1e3, int(row["input_length"]), int(row["output_length"]), blocks
        )


def scaled(arrivals: Sequence[Arrival], rate: float, scale: Scale) -> list[Arrival]:
    """The same bursts at ``rate`` requests a second on average, with shorter prompts and answers."""
    first, last = arrivals[0].at_s, arrivals[-1].at_s
    stretch = (len(arrivals) - 1) / rate / max(last - first, 1e-9)
    return [
        Arrival(
            (a.at_s - first) * stretch,
            int(min(max(a.prompt / scale.prompt, 4), scale.longest_prompt)),
            int(min(max(a.output / scale.output, 2), scale.longest_output)),
            a.blocks,
        )
        for a in arrivals
    ]


def prompt_of(arrival: Arrival, number: int, scale: Scale, seed: int) -> list[int]:
    """Token ids: blocks that the trace says are shared are the same tokens here."""
    if not arrival.blocks:
        return _tokens(random.Random(f"{seed} {number}"), arrival.prompt)
    size = max(1, int(BLOCK_TOKENS / scale.prompt))
    found: list[int] = []
    for block in arrival.blocks:
        found += _tokens(random.Random(f"{seed} block {block}"), size)
        if len(found) >= arrival.prompt:
            break
    return found[: arrival.prompt] or [FIRST_PLAIN_TOKEN]


def _tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(FIRST_PLAIN_TOKEN, LAST_PLAIN_TOKEN) for _ in range(count)]
