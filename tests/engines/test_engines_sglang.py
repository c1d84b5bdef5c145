"""SGLang's reader in a stand-in that has the recorded modules, classes, methods and parameters of a version,
run as a separate process and really attached to. The engine needs kernels that test machines lack."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from stand_in_process import let_serve, until_the_end

from latencyprism.agent.knobs import KnobOrders
from latencyprism.engines.discovery import discover
from latencyprism.engines.packs import load_pack
from latencyprism.records import Step
from latencyprism.timeline.python_source import PythonSource

HERE = Path(__file__).parent
VERSIONS = [entry.recorded[-1] for entry in load_pack("sglang").ranges]
COUNTS = (
    "requests", "prefill_requests", "decode_requests", "prefill_tokens", "decode_tokens", "context_tokens",
    "attention_work", "draft_tokens", "cached_tokens",
)  # fmt: skip


@contextmanager
def stand_in(
    version: str, scenario: str, title: str = "sglang::scheduler_TP0", python: str = sys.executable
) -> Iterator[subprocess.Popen[str]]:
    """Ready and idle; its title is what SGLang gives its schedulers."""
    process = subprocess.Popen(
        [
            title,
            str(HERE / "sglang_stand_in.py"),
            str(HERE / "signatures" / "sglang.json"),
            version,
            scenario,
        ],
        executable=str(Path(python).resolve()),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with until_the_end(process):
        yield process


def serve(process: subprocess.Popen[str], source: PythonSource) -> tuple[list[Step], dict[str, object]]:
    """Let it serve its scenario: (steps that were seen, what it says that it did)."""
    said = let_serve(process)
    return source.poll().steps, said


def attached(process: subprocess.Popen[str], version: str) -> PythonSource:
    (replica,) = discover(process.pid)
    assert (replica.engine, replica.engine_pid) == ("sglang", process.pid)
    return PythonSource(replace(replica, version=version))


def compare(steps: list[Step], said: dict[str, object]) -> None:
    batches = said["batches"]
    assert isinstance(batches, list) and len(steps) == len(batches) > 7
    for step, batch in zip(steps, batches):
        seen = {name: getattr(step, name) for name in COUNTS}
        assert seen == {name: batch[name] for name in COUNTS}, batch
        assert step.start_ns < step.end_ns and step.schedule_ns is not None and step.update_ns is not None
    assert [step.step for step in steps] == list(range(len(steps)))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("scenario", ["normal", "overlap"])
def test_every_batch_is_a_step_with_its_counts(version: str, scenario: str) -> None:
    with stand_in(version, scenario) as process:
        source = attached(process, version)
        steps, said = serve(process, source)
        health = source.health()[process.pid]
        source.close()
        assert (health["errors"], health["dropped"], health["message"]) == (0, 0, "")
    compare(steps, said)
    assert {step.phase for step in steps} == {"prefill", "decode"}
    assert sum(step.preempted or 0 for step in steps) == 0
    outputs = sum(batch["output_tokens"] for batch in said["batches"])  # type: ignore[attr-defined]
    assert source.totals.output_tokens == outputs == sum(8 + number for number in range(6))
    assert steps[-1].running == 0 and steps[-1].waiting == 0
    assert max(step.running or 0 for step in steps) > 1 and steps[0].waiting
    assert all(step.kv_usage is not None and 0 <= step.kv_usage < 0.2 for step in steps)
    overlapping = [a.end_ns > b.start_ns for a, b in itertools.pairwise(steps)]
    assert any(overlapping) is (scenario == "overlap")


@pytest.mark.parametrize("python", ["3.10", "3.12", "3.13", "3.14"])
def test_other_interpreters_and_their_own_means_of_observing(
    python: str, nameable_python_of: Callable[[str], str]
) -> None:
    with stand_in(VERSIONS[-1], "overlap mixed retract", python=nameable_python_of(python)) as process:
        source = attached(process, VERSIONS[-1])
        steps, said = serve(process, source)
        health = source.health()[process.pid]
        source.close()
    assert (health["errors"], health["dropped"], health["message"]) == (0, 0, "")
    compare(steps, said)


@pytest.mark.parametrize("version", [VERSIONS[0], VERSIONS[-1]])
@pytest.mark.parametrize("loop", ["normal", "overlap"])
def test_mixed_batches_and_retraction(version: str, loop: str) -> None:
    with stand_in(version, f"{loop} mixed retract") as process:
        source = attached(process, version)
        steps, said = serve(process, source)
        source.close()
    compare(steps, said)
    assert "mixed" in {step.phase for step in steps}
    assert said["retracted"] == 1 == sum(step.preempted or 0 for step in steps)


@pytest.mark.parametrize("version", VERSIONS)
def test_verified_drafts_are_counted(version: str) -> None:
    with stand_in(version, "normal verify") as process:
        source = attached(process, version)
        steps, said = serve(process, source)
        source.close()
    compare(steps, said)
    for step in steps:
        if step.phase == "decode":
            assert (step.draft_tokens, step.accepted_tokens) == (4 * step.requests, 2 * step.requests)  # type: ignore[operator]
        else:
            assert step.accepted_tokens is None


def test_a_rank_without_requests_beside_others_is_a_step_of_nothing() -> None:
    with stand_in(VERSIONS[-1], "normal idle", "sglang::scheduler_DP1_TP1_EP1") as process:
        (replica,) = discover(process.pid)
        assert replica.ranks == {"DP": 1} and replica.members[0].rank == 1
        source = PythonSource(replace(replica, version=VERSIONS[-1]))
        steps, said = serve(process, source)
        source.close()
    compare(steps, said)
    assert [step.requests for step in steps].count(0) == 1
    assert (steps[-1].requests, steps[-1].phase, steps[-1].running) == (0, None, 0)


def test_a_version_with_other_fields_is_told_at_attach() -> None:
    """The pack of today on the classes of the oldest version: what is not there is named, the rest is
    read."""
    with stand_in(VERSIONS[0], "normal") as process:
        (replica,) = discover(process.pid)
        source = PythonSource(replace(replica, version=VERSIONS[-1]))
        message = str(source.health()[process.pid]["message"])
        source.close()
    for name in ("ScheduleBatch.forward_iter", "sglang.srt.managers.utils.GenerationBatchResult"):
        assert name in message
    assert "ScheduleBatch.reqs" not in message


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("loop", ["normal", "overlap"])
def test_chunks_are_made_smaller_on_order_and_as_before_after_it(version: str, loop: str) -> None:
    with stand_in(version, f"{loop} mixed") as process:
        source = attached(process, version)
        orders = KnobOrders(source.engine_session)
        number = orders.order(tokens=40)
        steps, said = serve(process, source)
        state = orders.state()
        health = source.health()[process.pid]
        assert (health["errors"], health["dropped"], health["message"]) == (0, 0, "")
        assert (state.done, state.tokens, state.tokens_was, state.sequences) == (number, 40, 64, None)
        assert said["chunk"] == 40
        compare(steps, said)
        totals = [(step.prefill_tokens or 0) + (step.decode_tokens or 0) for step in steps]
        assert totals[0] == 64  # launched before the order could be carried out
        later = [total for step, total in zip(steps[2:], totals[2:]) if step.prefill_tokens]
        assert later and max(later) == 40
        source.close()  # which puts it back


def test_with_the_probe_the_chunk_comes_back() -> None:
    with stand_in(VERSIONS[-1], "normal mixed") as process:
        source = attached(process, VERSIONS[-1])
        orders = KnobOrders(source.engine_session)
        orders.order(tokens=1)
        _, said = serve(process, source)
        # Never below what decodes take and two pages and 16 tokens.
        assert isinstance(said["chunk"], int) and 16 < said["chunk"] < 40
        orders.release()
        time.sleep(0.05)
        assert orders.state().tokens_was == 64
        source.close()


@pytest.mark.parametrize(
    ("scenario", "why"), [("normal", "--enable-mixed-chunk"), ("overlap", "--enable-mixed-chunk")]
)
def test_where_smaller_chunks_would_not_help_they_are_left_alone(scenario: str, why: str) -> None:
    with stand_in(VERSIONS[-1], scenario) as process:
        source = attached(process, VERSIONS[-1])
        orders = KnobOrders(source.engine_session)
        orders.order(tokens=20)
        steps, said = serve(process, source)
        assert orders.refused and said["chunk"] == 64
        assert any(why in text for text in source.notices())
        compare(steps, said)
        source.close()
