"""Which processes make up which replica, from what /proc would show."""

from __future__ import annotations

import contextlib
import subprocess
import time
from pathlib import Path

import pytest

from latencyprism.attach.process import Identity, ProcessInfo
from latencyprism.engines import discovery
from latencyprism.engines.llama_cpp import source
from latencyprism.errors import TargetRefused

real_told_rank = discovery._told_rank


def process(pid: int, ppid: int, *arguments: str, comm: str = "python") -> ProcessInfo:
    return ProcessInfo(
        Identity(pid, pid), ppid, 0, comm, list(arguments), None, "S", pid, f"/proc/{pid}/root", 0, pid
    )


MACHINE = [
    process(10, 1, "/usr/bin/python", "/v/bin/vllm", "serve", "m", comm="vllm"),
    process(11, 10, "VLLM::EngineCore_DP0"),
    process(12, 10, "VLLM::EngineCore_DP1"),
    process(13, 11, "VLLM::Worker_TP0"),
    process(14, 11, "VLLM::Worker_TP1"),
    process(15, 12, "VLLM::Worker_TP0"),
    process(20, 1, "/v/bin/python", "/v/bin/transformers", "serve", "m", "--continuous-batching"),
    process(21, 1, "/v/bin/python", "/v/bin/transformers", "serve", "m"),
    process(30, 1, "bash", "-c", "echo VLLM::EngineCore"),
    process(31, 1),
    process(40, 1, "VLLM::EngineCore"),
    # vLLM before 0.10.1: no titles; forked engine, spawned workers.
    process(50, 1, "/v/bin/python", "/v/bin/vllm", "serve", "old"),
    process(51, 50, "/v/bin/python", "/v/bin/vllm", "serve", "old"),
    process(52, 50, "/v/bin/python", "-c", "from multiprocessing.resource_tracker import main;main(5)"),
    process(53, 51, "/v/bin/python", "-c", "from multiprocessing.spawn import spawn_main; spawn_main()"),
    process(54, 51, "/v/bin/python", "-c", "from multiprocessing.spawn import spawn_main; spawn_main()"),
    process(55, 51, "/v/bin/python", "-c", "from multiprocessing.resource_tracker import main;main(5)"),
    process(57, 50, "nvidia-smi"),
    # SGLang with two tensor-parallel ranks.
    process(60, 1, "/s/bin/python", "-m", "sglang.launch_server", "--tp", "2"),
    process(61, 60, "sglang::scheduler_TP0"),
    process(62, 60, "sglang::scheduler_TP1"),
    process(63, 60, "sglang::detokenizer"),
    # SGLang with data parallelism: a controller between; expert ranks.
    process(70, 1, "/s/bin/python", "-m", "sglang.launch_server", "--dp", "2"),
    process(71, 70, "sglang::data_parallel_controller"),
    process(72, 71, "sglang::scheduler_DP0_PP0_ATTN_CP0_TP0_EP0"),
    process(73, 71, "sglang::scheduler_DP1_TP1_EP1"),
    process(74, 71, "sglang::scheduler_DP1_PP1_TP0"),
    process(80, 1, "bash", "-c", "sglang::scheduler_TP0"),
    # vLLM of today that was started a moment ago: no titles yet.
    process(90, 1, "/v/bin/python", "/v/bin/vllm", "serve", "new"),
    # vLLM 0.10.1 with data and tensor parallelism: forked workers keep the engine's title.
    process(95, 1, "VLLM::DPEngineCore_1"),
    process(96, 95, "VLLM::DPEngineCore_1_TP0"),
    process(97, 95, "VLLM::DPEngineCore_1_TP1"),
    # TGI with two shards, and one without; started by a launcher each.
    process(100, 1, "text-generation-launcher", "--num-shard", "2"),
    *(
        process(
            pid,
            100,
            "/t/bin/python",
            "/t/bin/text-generation-server",
            "serve",
            "m",
            "--uds-path",
            "/a",
            "--sharded",
        )
        for pid in (101, 102)
    ),
    process(103, 100, "text-generation-router", "serve"),
    process(104, 1, "/t/bin/python", "-m", "text_generation_server.cli", "serve", "m"),
    process(105, 1, "/t/bin/python", "/t/bin/text-generation-server", "download-weights", "serve"),
    process(106, 1, "bash", "-c", "text-generation-server serve m"),
    process(91, 90, "/v/bin/python", "-c", "from multiprocessing.spawn import spawn_main; spawn_main()"),
]


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery, "list_processes", lambda: MACHINE)
    monkeypatch.setattr(discovery, "read_process", lambda pid: None)
    monkeypatch.setattr(discovery, "library_of", lambda pid: None)
    monkeypatch.setattr(discovery, "_told_rank", lambda pid: {101: 1}.get(pid, 0))
    monkeypatch.setattr(
        discovery, "distribution_version", lambda pid, names: "0.9.2" if pid in (50, 51) else "1.0"
    )


def test_replicas_and_roles() -> None:
    found = {r.engine_pid: r for r in discovery.discover()}
    assert sorted(found) == [11, 12, 20, 40, 51, 61, 72, 73, 95, 102, 104]
    assert [(m.pid, m.role, m.rank) for m in found[95].members] == [
        (95, "engine", 0), (96, "worker", 0), (97, "worker", 1),
    ]  # fmt: skip
    assert found[95].ranks == {"DP": 1}
    assert [(m.pid, m.role, m.rank) for m in found[11].members] == [
        (11, "engine", 0), (13, "worker", 0), (14, "worker", 1), (10, "api", 0),
    ]  # fmt: skip
    assert found[11].ranks == {"DP": 0} and found[12].ranks == {"DP": 1}
    assert found[40].members[0].role == "engine+worker"
    assert len({r.number for r in found.values()}) == 11
    assert [(m.pid, m.role, m.rank) for m in found[51].members] == [
        (51, "engine", 0), (53, "worker", 0), (54, "worker", 1), (50, "api", 0),
    ]  # fmt: skip


def test_schedulers_of_sglang_are_told_by_their_titles() -> None:
    found = {r.engine_pid: r for r in discovery.discover() if r.engine == "sglang"}
    assert [(m.pid, m.role, m.rank) for m in found[61].members] == [
        (61, "engine", 0), (62, "worker", 1), (60, "api", 0),
    ]  # fmt: skip
    assert found[61].ranks == {} and found[61].version == "1.0"
    assert found[61].roles() == {61: "scheduler", 62: "scheduler 1", 60: "API server"}
    assert [(m.pid, m.role) for m in found[72].members] == [(72, "engine"), (70, "api")]
    assert [(m.pid, m.rank) for m in found[73].members if m.role != "api"] == [(73, 1), (74, 1000)]
    assert (found[72].ranks, found[73].ranks) == ({"DP": 0}, {"DP": 1})


def test_shards_of_tgi_are_told_by_their_command_and_ranked_by_their_environment() -> None:
    found = {r.engine_pid: r for r in discovery.discover() if r.engine == "tgi"}
    assert [(m.pid, m.role, m.rank) for m in found[102].members] == [(102, "engine", 0), (101, "worker", 1)]
    assert [(m.pid, m.role) for m in found[104].members] == [(104, "engine")]
    assert found[102].roles() == {102: "shard", 101: "shard 1"}


def test_of_an_environment_only_the_rank_is_looked_at() -> None:
    told_rank = real_told_rank
    for variables, rank in (
        ({"RANK": "3"}, 3),
        ({"LOCAL_RANK": "3"}, 0),
        ({"RANK": "x"}, 0),
        ({"RANK": "3;rm"}, 0),
    ):
        with subprocess.Popen(["sleep", "60"], env={"A": "b", **variables, "C": "d"}) as sleeper:
            try:
                about = Path(f"/proc/{sleeper.pid}/cmdline")
                while b"60" not in about.read_bytes():  # what it has of its own is there a little later
                    time.sleep(0.001)
                assert told_rank(sleeper.pid) == rank
            finally:
                sleeper.kill()
    assert told_rank(1 << 22) == 0


@pytest.mark.parametrize(
    ("pid", "engines"),
    [
        (13, [11]),
        (11, [11]),
        (10, [11, 12]),
        (20, [20]),
        (15, [12]),
        (62, [61]),
        (70, [72, 73]),
        (101, [102]),
    ],
)
def test_any_process_of_an_engine_names_it(pid: int, engines: list[int]) -> None:
    assert [r.engine_pid for r in discovery.discover(pid)] == engines


@pytest.mark.parametrize("pid", [21, 30, 31, 52, 57, 63, 80, 90, 91, 100, 103, 105, 106])
def test_other_processes_are_refused(pid: int) -> None:
    with pytest.raises(TargetRefused, match="not a known engine"):
        discovery.discover(pid)


def test_only_the_same_server_started_again_succeeds_an_engine() -> None:
    def served(pid: int, *arguments: str) -> discovery.Replica:
        return discovery.Replica("llama.cpp", 0, (discovery.Member(process(pid, 1, *arguments), "engine"),))

    old = served(50, "/v/llama-server", "--port", "8080")
    assert served(60, "/v/llama-server", "--port", "9090").succeeds(old)
    assert not served(60, "/v/llama-server", "--port", "9090", "--other").succeeds(old)
    assert not served(40, "/v/llama-server", "--port", "8080").succeeds(old)


def test_a_program_is_looked_into_once_and_a_process_only_where_a_name_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A search asks this of every process of a machine."""
    looked: list[int] = []
    real = source._candidates
    monkeypatch.setattr(source, "_known", {})
    monkeypatch.setattr(source, "_candidates", lambda pid: looked.append(pid) or real(pid))
    with contextlib.ExitStack() as stack:
        sleepers = [stack.enter_context(subprocess.Popen(["sleep", "60"])) for _ in range(3)]
        stack.callback(lambda: [one.kill() for one in sleepers])
        assert [source.find(one.pid) for one in sleepers] == [None] * 3
        assert looked == [sleepers[0].pid]
    assert source.find(1 << 22) is None
