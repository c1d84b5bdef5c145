"""TGI's reader in a stand-in that has the recorded modules, classes, methods and parameters of a version, run
as a separate process and really attached to. The engine needs an accelerator that test machines lack."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from stand_in_process import let_serve, until_the_end

from latencyprism.engines.discovery import discover
from latencyprism.engines.packs import load_pack
from latencyprism.records import Step
from latencyprism.timeline.python_source import PythonSource

HERE = Path(__file__).parent
RECORDED = HERE / "signatures" / "tgi.json"
(RANGE,) = load_pack("tgi").ranges
LAST = "2.0.5.dev0+3.3.7"
COUNTS = (
    "requests", "prefill_requests", "decode_requests", "prefill_tokens", "decode_tokens", "cached_tokens",
    "context_tokens", "attention_work", "draft_tokens",
)  # fmt: skip


@contextmanager
def stand_in(
    folder: Path,
    version: str,
    scenario: str,
    rank: int | None = None,
    python: str = sys.executable,
    recorded: Path = RECORDED,
) -> Iterator[subprocess.Popen[str]]:
    """Ready and idle; its command line is what TGI's launcher gives its shards."""
    program = folder / "text-generation-server"
    if not program.exists():
        program.symlink_to(HERE / "tgi_stand_in.py")
    sharded = [] if rank is None else ["--sharded"]
    process = subprocess.Popen(
        [
            python, str(program), "serve", "tiny", "--uds-path", str(folder / "socket"), *sharded,
            str(recorded), version, scenario,
        ],
        executable=str(Path(python).resolve()),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=dict(os.environ) if rank is None else {**os.environ, "RANK": str(rank), "WORLD_SIZE": "2"},
    )  # fmt: skip
    with until_the_end(process):
        yield process


def served(
    folder: Path, version: str, scenario: str, **options: str
) -> tuple[list[Step], list[dict[str, int]]]:
    with stand_in(folder, version, scenario, **options) as process:  # type: ignore[arg-type]
        (replica,) = discover(process.pid)
        assert (replica.engine, replica.engine_pid) == ("tgi", process.pid)
        source = PythonSource(replace(replica, version=version))
        calls = let_serve(process)["calls"]
        steps = source.poll().steps
        health = source.health()[process.pid]
        outputs = source.totals.output_tokens
        source.close()
    assert (health["errors"], health["dropped"], health["message"]) == (0, 0, "")
    assert outputs == sum(call["output_tokens"] for call in calls)
    return steps, calls


def compare(steps: list[Step], calls: list[dict[str, int]]) -> None:
    assert len(steps) == len(calls) > 20
    for step, call in zip(steps, calls):
        seen = {name: getattr(step, name) for name in COUNTS}
        assert seen == {name: call[name] for name in COUNTS}, call
        assert (step.waiting, step.kv_usage, step.preempted, step.sample_ns) == (None,) * 4
    assert [step.step for step in steps] == list(range(len(steps)))


@pytest.mark.parametrize("version", RANGE.recorded)
def test_every_call_is_a_step_with_its_counts(tmp_path: Path, version: str) -> None:
    steps, calls = served(tmp_path, version, "chunked")
    compare(steps, calls)
    assert {step.phase for step in steps} == {"prefill", "mixed", "decode"}
    assert sum(step.cached_tokens or 0 for step in steps) == 3 * 16, (
        "once for each request, not for each chunk"
    )
    assert [step.running for step in steps][-1] == 0 and max(step.running or 0 for step in steps) == 4
    for step, call in zip(steps, calls):
        assert step.running == call["requests"] - call["finished"]
        assert step.draft_tokens == 0 and step.accepted_tokens is None


def test_the_parts_of_a_call_are_told_apart(tmp_path: Path) -> None:
    steps, _ = served(tmp_path, LAST, "chunked")
    for step in steps:
        parts = (step.schedule_ns, step.execute_ns, step.update_ns)
        assert None not in parts and sum(p or 0 for p in parts) == step.duration_ns
        assert (step.execute_ns or 0) >= 2_000_000 and (step.update_ns or 0) >= 1_000_000
    # New prompts are made a batch first.
    assert sum((step.schedule_ns or 0) >= 1_000_000 for step in steps) >= 3
    for before, after in itertools.pairwise(steps):
        assert after.gap_ns == after.start_ns - before.end_ns >= 0


def test_without_chunks_prompts_are_batches_of_their_own(tmp_path: Path) -> None:
    steps, calls = served(tmp_path, LAST, "whole")
    compare(steps, calls)
    assert {step.phase for step in steps} == {"prefill", "decode"}
    beside = [step for step in steps[1:] if step.phase == "prefill"]
    assert beside and all((step.running or 0) > (step.requests or 0) for step in beside)


def test_drafts_and_how_many_were_right(tmp_path: Path) -> None:
    steps, calls = served(tmp_path, LAST, "drafts")
    assert steps
    for step, call in zip(steps, calls):
        assert {name: getattr(step, name) for name in COUNTS} == {name: call[name] for name in COUNTS}
        if step.phase == "decode":
            assert step.accepted_tokens == 2 * (step.requests or 0)
        else:
            assert step.accepted_tokens is None


def test_a_call_that_failed_is_no_step_and_spoils_none(tmp_path: Path) -> None:
    steps, calls = served(tmp_path, LAST, "whole fails")
    assert len(steps) == len(calls) > 10
    for step, call in zip(steps, calls):
        assert {name: getattr(step, name) for name in COUNTS} == {name: call[name] for name in COUNTS}
    assert sum(call["finished"] for call in calls) < 6


@pytest.mark.parametrize("family", ["padded", "seq2seq"])
def test_models_without_paged_attention(tmp_path: Path, family: str) -> None:
    steps, calls = served(tmp_path, LAST, family)
    compare(steps, calls)


@pytest.mark.parametrize("python", ["3.10", "3.12", "3.13", "3.14"])
def test_other_interpreters_and_their_own_means_of_observing(
    tmp_path: Path, python: str, nameable_python_of: Callable[[str], str]
) -> None:
    compare(*served(tmp_path, LAST, "chunked", python=nameable_python_of(python)))


def test_shards_are_one_replica_of_which_the_first_writes_steps(tmp_path: Path) -> None:
    with ExitStack() as stack:
        # Started in the other order: ranks are told by the environment.
        second, first = (stack.enter_context(stand_in(tmp_path, LAST, "chunked", rank)) for rank in (1, 0))
        (replica,) = discover(second.pid)
        assert [(m.pid, m.role, m.rank) for m in replica.members] == [
            (first.pid, "engine", 0), (second.pid, "worker", 1),
        ]  # fmt: skip
        assert replica.roles() == {first.pid: "shard", second.pid: "shard 1"}
        source = PythonSource(replace(replica, version=LAST))
        calls = let_serve(first)["calls"]
        assert let_serve(second)["calls"] == calls
        window = source.poll()
        health = source.health()
        source.close()
    assert all((h["errors"], h["dropped"], h["message"]) == (0, 0, "") for h in health.values())
    compare(window.steps, calls)
    assert len(window.spans) == len(calls) and {span.track[0] for span in window.spans} == {
        f"shard 1 {second.pid}"
    }
    # A shard knows the end of its own share of the requests alone.
    assert {step.running for step in window.steps[:-1]} == {None} and window.steps[-1].running == 0


def test_a_version_that_was_only_read_is_said_to_be() -> None:
    pack = load_pack("tgi")
    assert not any(entry.verified for entry in pack.ranges)
    for version in ("2.0.5.dev0", "2.4.1"):
        assert "compared with this pack by its source, and not run" in str(pack.choose(version)[1])
    assert not pack.covers("2.0.4"), "also what the variant for Gaudi calls itself"


def test_batches_in_an_earlier_form_are_told_and_not_guessed_at(tmp_path: Path) -> None:
    """Releases 2.1 to 2.3 call themselves what those from 3.0 on do."""
    known = json.loads(RECORDED.read_text())
    for signature in known["signatures"].values():
        signature["attributes"] = [name for name in signature["attributes"] if name != "prefilling_mask"]
    (tmp_path / "older.json").write_text(json.dumps(known))
    with stand_in(tmp_path, LAST, "older", recorded=tmp_path / "older.json") as process:
        (replica,) = discover(process.pid)
        source = PythonSource(replace(replica, version=LAST))
        calls = let_serve(process)["calls"]
        steps = source.poll().steps
        health = source.health()[process.pid]
        source.close()
    assert "FlashCausalLMBatch.prefilling_mask" in str(health["message"])
    assert "cache_lengths" not in str(health["message"]) and health["errors"] == 0
    assert [step.requests for step in steps] == [call["requests"] for call in calls]
    assert {(s.prefill_tokens, s.decode_tokens, s.context_tokens, s.phase) for s in steps} == {(None,) * 4}
