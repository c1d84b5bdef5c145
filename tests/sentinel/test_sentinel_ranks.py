"""Which rank an alert names: a watch over two workers, without an engine."""

from __future__ import annotations

import os
import re
from types import SimpleNamespace

import pytest
from sentinel_windows import Source

from latencyprism.attach.process import read_process
from latencyprism.engines.discovery import Member, Replica
from latencyprism.faces.wording import alert_sentence
from latencyprism.records import Alert, Counter, Span, Step
from latencyprism.sentinel import rank_watch
from latencyprism.sentinel.rank_watch import RankWatch
from latencyprism.sentinel.replica_watch import ReplicaWatch
from latencyprism.sentinel.sinks import webhook_payload
from latencyprism.sentinel.targets import Attachment

MS = 1_000_000
PERIOD = 15.0


def replica(*ranks: int, engine: str = "vllm") -> Replica:
    members = [Member(SimpleNamespace(pid=900), "engine")]  # type: ignore[arg-type]
    members += [Member(SimpleNamespace(pid=901 + n), "worker", rank) for n, rank in enumerate(ranks)]  # type: ignore[arg-type]
    return Replica(engine, 0, tuple(members), "0.32")


def test_only_workers_of_one_stage_are_compared() -> None:
    assert RankWatch.of(replica(0, 1)) is not None
    assert RankWatch.of(replica(0)) is None
    assert RankWatch.of(replica(0, 1000)) is None
    assert RankWatch.of(replica(0, 1, engine="sglang")) is None


@pytest.fixture
def watch() -> ReplicaWatch:
    here = Replica("vllm", 0, (Member(read_process(os.getpid()), "engine"),), "0.32")
    made = ReplicaWatch(Attachment(here, Source((900, 901, 902)), [], None))  # type: ignore[arg-type]
    made._ranks = RankWatch([(0, ("Worker 901",)), (1, ("Worker 1 902",))])
    return made


def step(
    watch: ReplicaWatch, number: int, first: tuple[float, float], second: tuple[float, float]
) -> list[Alert]:
    """One step of two ranks that begin and end so many ms after their order."""
    at = int(number * PERIOD * 10 * MS)
    runs = [(at + int((1 + a) * MS), at + int((1 + b) * MS)) for a, b in (first, second)]
    end = max(runs[0][1], runs[1][1]) + MS
    execute = end - at - 2 * MS
    source: Source = watch.attachment.source  # type: ignore[assignment]
    source.window.spans += [
        Span(("Worker 901",), "execute_model", *runs[0]),
        Span(("Worker 1 902",), "execute_model", *runs[1]),
    ]
    source.window.steps.append(
        Step("vllm", 0, 0, number, at, end, "decode", requests=4, prefill_requests=0, decode_requests=4,
             prefill_tokens=0, decode_tokens=4, context_tokens=400, attention_work=0, running=4, waiting=0,
             schedule_ns=MS, execute_ns=execute, update_ns=MS)
    )  # fmt: skip
    return [alert for alert, _ in watch.look()]


def settle(watch: ReplicaWatch, count: int = 300) -> None:
    for number in range(count):
        wobble = number % 7 * 0.05
        assert step(watch, number, (0, 12 + wobble), (0.1, 12.2 + wobble)) == []


def test_the_rank_that_returned_late_is_named(watch: ReplicaWatch) -> None:
    settle(watch)
    (alert,) = step(watch, 300, (0, 12.1), (0.1, 71.0))
    assert alert.rank == 1
    assert alert.where == "Worker 1 902 (rank 1): execute_model"
    assert alert.text is not None
    said = r"; Worker 1 902 \(rank 1\): execute_model 70.9 ms where 12\.[23] ms is usual$"
    assert re.search(said, alert.text)


def test_the_rank_that_began_late_is_named_though_the_other_took_longer(watch: ReplicaWatch) -> None:
    settle(watch)
    (alert,) = step(watch, 300, (0, 71.0), (59.0, 71.2))
    assert alert.rank == 1
    assert alert.where == "Worker 1 902 (rank 1): before execute_model"
    assert alert.text is not None and alert.text.endswith("began 59.0 ms after the first rank")


def test_no_rank_is_named_where_all_grew_alike(watch: ReplicaWatch) -> None:
    settle(watch)
    (alert,) = step(watch, 300, (0, 71.0), (0.1, 71.2))
    assert alert.rank == 0
    assert alert.where == "all ranks: execute_model"
    assert alert.text is not None and "grew on all 2 ranks alike (71.1 ms where 12." in alert.text


@pytest.mark.parametrize(
    ("queued_ms", "rank"), [((2, 45), 1), ((45, 2), 0), ((45, 30), None), ((0, 10), None), ((2, None), None)]
)
def test_where_all_grew_alike_the_one_that_queued_for_a_cpu_is_named(
    watch: ReplicaWatch,
    monkeypatch: pytest.MonkeyPatch,
    queued_ms: tuple[int, int | None],
    rank: int | None,
) -> None:
    settle(watch)
    for pid, name in ((901, "Worker 901"), (902, "Worker 1 902")):
        assert watch._ranks is not None
        watch._ranks.count(Counter((name, f"python {pid}"), "runqueue_ns", 5, 7 * MS))
        watch._ranks.count(Counter((name, "gloo 77"), "runqueue_ns", 6, 999 * MS))
    now = {901 + place: None if ms is None else (7 + ms) * MS for place, ms in enumerate(queued_ms)}
    monkeypatch.setattr(rank_watch, "runqueue_ns", now.get)
    (alert,) = step(watch, 300, (0, 71.0), (0.1, 71.2))
    assert alert.text is not None
    if rank is None:
        assert (alert.rank, alert.where) == (0, "all ranks: execute_model")
    else:
        assert alert.rank == rank and alert.where is not None and f"(rank {rank})" in alert.where
        assert "waited 45.0 ms for a CPU, no other rank's more than 2.0 ms" in alert.text


def test_a_lasting_straggler_within_the_steps_limits_is_evidence(watch: ReplicaWatch) -> None:
    settle(watch)
    told = []
    for number in range(300, 700):
        wobble = number % 7 * 0.05
        # The step takes as long as before: the other rank has become faster.
        told += step(watch, number, (0, 10 + wobble), (0.1, 12.2 + wobble))
    (alert,) = told
    assert (alert.kind, alert.level, alert.rank) == ("straggler", "evidence", 1)
    assert alert.where == "Worker 1 902 (rank 1): execute_model"
    assert 256 < alert.onset_step <= 340  # as exact as a block of 32
    assert alert.excess > 0.1 and watch.counts.evidence == 1 and watch.counts.page == 0
    assert "one rank became slower than the others: Worker 1 902 (rank 1) is slow" in alert_sentence(alert)
    assert "behind the fastest rank" in webhook_payload(alert, "firing")["commonAnnotations"]["summary"]
