"""Every pack in rows: the versions it is for, those it was run against or compared with, and how it sees."""

from __future__ import annotations

from typing import Any

from latencyprism.engines.llama_cpp.pack import load_pack as load_llama_pack
from latencyprism.engines.packs import PYTHON_ENGINES, load_pack

INTERPRETER = "probe in the interpreter"
UPROBES = "uprobes at function entries"


def pack_rows() -> list[dict[str, Any]]:
    """One row a range, engine by engine, oldest versions first.

    ``from`` and ``below`` are null for llama.cpp, whose ``builds`` are told in words; ``verified``: run
    against; ``recorded``: compared with its source; ``seen``: by what means; ``hooks``: how many functions,
    deep ones left out."""
    rows: list[dict[str, Any]] = [
        {
            "engine": engine,
            "from": entry.since,
            "below": entry.below,
            "builds": None,
            "verified": list(entry.verified),
            "recorded": list(entry.recorded),
            "layout": entry.layout,
            "seen": INTERPRETER,
            "hooks": len(entry.hooks),
        }
        for engine in PYTHON_ENGINES
        for entry in load_pack(engine).ranges
    ]
    llama = load_llama_pack()
    rows += [
        {
            "engine": "llama.cpp",
            "from": None,
            "below": None,
            "builds": layout.builds,
            "verified": list(layout.verified),
            "recorded": [],
            "layout": layout.name,
            "seen": UPROBES,
            "hooks": len(llama.points) + 2,
        }
        for layout in reversed(llama.layouts)
    ]
    return rows


def in_words(row: dict[str, Any]) -> str:
    """A row as one line."""
    versions = row["builds"] or f"{row['from']} <= version < {row['below']}"
    told = f"run against {', '.join(row['verified'])}" if row["verified"] else "not run"
    if row["recorded"]:
        few = (
            row["recorded"] if len(row["recorded"]) < 4 else [row["recorded"][0], "...", row["recorded"][-1]]
        )
        told += f"; source compared: {' '.join(few)} ({len(row['recorded'])})"
    return f"{row['engine']:13} {versions:28} {row['seen']}; {told}"
