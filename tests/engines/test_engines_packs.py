"""Packs against the real source they claim to hold for: the installed engine, read and never imported."""

from __future__ import annotations

import ast
import itertools
import os
from pathlib import Path

import numpy as np
import pytest

from latencyprism.engines.discovery import distribution_version
from latencyprism.engines.packs import PYTHON_ENGINES, Hook, load_pack, version_key
from latencyprism.lab.install import EngineUnavailable, ensure


def site_packages(engine: str) -> Path:
    try:
        env = ensure(engine)  # type: ignore[arg-type]
    except EngineUnavailable as missing:
        pytest.skip(f"engine unavailable: {missing.reason}")
    (folder,) = env.dir.glob("lib/python3*/site-packages")
    return folder


def methods(folder: Path, module: str, class_name: str) -> dict[str, ast.FunctionDef]:
    tree = ast.parse((folder / Path(*module.split("."))).with_suffix(".py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            return {item.name: item for item in node.body if isinstance(item, ast.FunctionDef)}
    return {}


@pytest.mark.engine
@pytest.mark.parametrize("engine", PYTHON_ENGINES)
def test_every_hook_is_in_the_installed_engine(engine: str) -> None:
    folder = site_packages(engine)
    entry = load_pack(engine).ranges[-1]
    hooks: list[Hook] = [*entry.hooks.values(), *(hook for group in entry.deep.values() for hook in group)]
    gone = [
        (module, owner, method)
        for module, owners, method in hooks
        for owner in owners.split("|")
        if method not in methods(folder, module, owner)
    ]
    assert gone == []


# Fields that the readers use, by the file that defines them.
FIELDS = {
    "vllm": {
        "vllm/v1/core/sched/output.py": [
            "num_scheduled_tokens", "total_num_scheduled_tokens", "scheduled_new_reqs",
            "scheduled_cached_reqs",
            "scheduled_spec_decode_tokens", "finished_req_ids", "resumed_req_ids", "num_computed_tokens",
            "num_output_tokens", "req_ids", "req_id",
        ],
        "vllm/v1/outputs.py": ["sampled_token_ids", "req_id_to_index"],
        "vllm/v1/core/kv_cache_manager.py": ["block_pool"],
        "vllm/v1/core/block_pool.py": ["get_usage"],
        "vllm/v1/core/sched/scheduler.py": ["running", "waiting"],
    },
    "transformers": {
        "transformers/generation/continuous_batching/requests.py": [
            "has_new_token", "query_length", "generated_tokens", "position_offset", "request_id",
        ],
        "transformers/generation/continuous_batching/scheduler.py": ["active_requests", "waiting_requests"],
    },
}  # fmt: skip


@pytest.mark.engine
@pytest.mark.parametrize("engine", PYTHON_ENGINES)
def test_every_field_read_is_in_the_installed_engine(engine: str) -> None:
    folder = site_packages(engine)
    for file, names in FIELDS[engine].items():
        words = {
            name
            for node in ast.walk(ast.parse((folder / file).read_text(encoding="utf-8")))
            for name in (
                getattr(node, "attr", None), getattr(node, "name", None),
                getattr(getattr(node, "target", None), "id", None),
            )
        }  # fmt: skip
        words |= {
            text for node in ast.walk(ast.parse((folder / file).read_text(encoding="utf-8")))
            if isinstance(node, ast.Constant) and isinstance(text := node.value, str)
        }  # fmt: skip
        assert set(names) <= words, f"{file}: {set(names) - words}"


@pytest.mark.parametrize("engine", PYTHON_ENGINES)
def test_ranges_are_ordered_and_hold_what_they_verified(engine: str) -> None:
    ranges = load_pack(engine).ranges
    for entry in ranges:
        assert version_key(entry.since) < version_key(entry.below)
        assert all(entry.holds_for(version) for version in entry.verified)
    assert all(version_key(a.below) <= version_key(b.since) for a, b in itertools.pairwise(ranges))


def test_version_outside_the_ranges_is_used_with_a_warning() -> None:
    pack = load_pack("vllm")
    assert pack.choose("0.32.0+cpu")[1] is None
    assert "not verified" in str(pack.choose("0.31.0")[1])
    for version in ("0.1.0", "99.0", None):
        assert pack.choose(version)[1]


def test_version_is_read_from_what_a_process_maps() -> None:
    assert distribution_version(os.getpid(), ("numpy",)) == np.__version__
    assert distribution_version(os.getpid(), ("no_such_thing",)) is None
