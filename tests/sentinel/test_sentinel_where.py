"""The phase that holds an excess."""

from __future__ import annotations

from latencyprism.records import Step
from latencyprism.sentinel.where import PhaseShares, phase_names


def a_step(schedule: int, execute: int | None, update: int) -> Step:
    total = schedule + (execute or 0) + update
    return Step("vllm", 0, 0, 1, 0, total * 1_000_000, phase="decode",
                schedule_ns=schedule * 1_000_000, execute_ns=None if execute is None else execute * 1_000_000,
                update_ns=update * 1_000_000)  # fmt: skip


NAMES = phase_names("vllm", {10: "EngineCore", 20: "Worker"})


def learned() -> PhaseShares:
    shares = PhaseShares()
    for _ in range(50):
        shares.learn(a_step(1, 18, 1))
    return shares


def test_excess_in_the_worker_is_placed_there() -> None:
    assert learned().locate(a_step(1, 40, 1), 20.0, NAMES) == "Worker 20: execute_model"


def test_excess_in_the_scheduler_is_placed_there() -> None:
    assert learned().locate(a_step(15, 19, 1), 20.0, NAMES) == "EngineCore 10: schedule"


def test_nothing_is_claimed_without_phases_or_history() -> None:
    assert PhaseShares().locate(a_step(1, 40, 1), 20.0, NAMES) is None
    bare = Step("vllm", 0, 0, 1, 0, 5_000_000, phase="decode")
    assert learned().locate(bare, 1.0, NAMES) is None
