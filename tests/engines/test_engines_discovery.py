"""Which processes make up which replica, from what /proc would show."""

from __future__ import annotations

import pytest

from latencyprism.attach.process import Identity, ProcessInfo
from latencyprism.engines import discovery
from latencyprism.errors import TargetRefused


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
]


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery, "list_processes", lambda: MACHINE)
    monkeypatch.setattr(discovery, "read_process", lambda pid: None)
    monkeypatch.setattr(discovery, "library_of", lambda pid: None)
    monkeypatch.setattr(discovery, "distribution_version", lambda pid, names: "1.0")


def test_replicas_and_roles() -> None:
    found = {r.engine_pid: r for r in discovery.discover()}
    assert sorted(found) == [11, 12, 20, 40]
    assert [(m.pid, m.role, m.rank) for m in found[11].members] == [
        (11, "engine", 0), (13, "worker", 0), (14, "worker", 1), (10, "api", 0),
    ]  # fmt: skip
    assert found[11].ranks == {"DP": 0} and found[12].ranks == {"DP": 1}
    assert found[40].members[0].role == "engine+worker"
    assert len({r.number for r in found.values()}) == 4


@pytest.mark.parametrize(("pid", "engines"), [(13, [11]), (11, [11]), (10, [11, 12]), (20, [20]), (15, [12])])
def test_any_process_of_an_engine_names_it(pid: int, engines: list[int]) -> None:
    assert [r.engine_pid for r in discovery.discover(pid)] == engines


@pytest.mark.parametrize("pid", [21, 30, 31])
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
