"""Real engines: they start, count what was asked of them, and are gone afterwards."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from latencyprism.errors import PrismError
from latencyprism.lab.install import EngineUnavailable, ensure
from latencyprism.lab.launch import Options
from latencyprism.lab.load import Load
from latencyprism.lab.models import Shape, ensure_model
from latencyprism.lab.outcome import Result
from latencyprism.lab.profiles import Length, Profile, profile
from latencyprism.lab.serve import Server, start

pytestmark = pytest.mark.engine
FEW = Profile("few", clients=3, prompt=Length(40, 0.8, 8, 600), output=Length(12, 0.5, 2, 40), requests=12)


def measure(server: Server, wanted: Profile) -> Result:
    load = Load(server, wanted).start()
    load.wait(120)
    return load.result()


def test_llama_counts_agree_with_its_own(llama_server: Server) -> None:
    before = llama_server.metrics()
    result = measure(llama_server, FEW)
    after = llama_server.metrics()
    assert result.failures == []
    asked = sum(request.asked_output_tokens for request in result.requests)
    assert asked == sum(request.output_tokens or 0 for request in result.requests)
    name = "llamacpp:tokens_predicted_total"
    assert after[name] - before[name] == asked
    prompt = sum(request.asked_prompt_tokens for request in result.requests)
    names = ("llamacpp:prompt_tokens_total", "llamacpp:prompt_tokens_cached_total")
    assert sum(after[name] - before[name] for name in names) == prompt


def test_transformers_counts(transformers_server: Server) -> None:
    result = measure(transformers_server, FEW)
    assert result.failures == []
    for request in result.requests:
        assert request.output_tokens == request.asked_output_tokens
        assert request.prompt_tokens == request.asked_prompt_tokens


def test_vllm_counts_agree_with_its_own(vllm_server: Server) -> None:
    before = vllm_server.metrics()
    result = measure(vllm_server, FEW)
    assert result.failures == []
    asked = sum(request.asked_output_tokens for request in result.requests)
    name = "vllm:generation_tokens_total"
    deadline = time.monotonic() + 5
    # The API process counts when it has handled the output, a moment after the client has it.
    while vllm_server.metrics()[name] - before[name] < asked and time.monotonic() < deadline:
        time.sleep(0.1)
    after = vllm_server.metrics()
    assert after[name] - before[name] == asked
    prompt = sum(request.asked_prompt_tokens for request in result.requests)
    assert after["vllm:prompt_tokens_total"] - before["vllm:prompt_tokens_total"] == prompt


def test_vllm_processes_are_known(vllm_server: Server) -> None:
    roles = vllm_server.roles
    assert {"main", "engine_core", "worker"} <= set(roles)
    assert vllm_server.pid == roles["engine_core"]
    assert set(roles.values()) <= set(vllm_server.pids)


def test_prefixes_are_reused(llama_server: Server) -> None:
    result = measure(llama_server, profile("prefix").but(clients=1, requests=3))
    assert result.failures == []
    last = result.requests[-1]
    assert last.cached_tokens is not None
    assert last.cached_tokens >= 500


def test_stopped_server_leaves_nothing() -> None:
    with start("llama.cpp", Options(slots=2)) as server:
        pids, log = server.pids, server.log
        assert server.alive()
        assert server.complete(5) == 5
    assert not server.alive()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert not log.exists()
    server.stop()


def test_server_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF and no more")
    monkeypatch.setattr("latencyprism.lab.serve.ensure_model", lambda *_: broken)
    with pytest.raises(PrismError, match=r"llama\.cpp did not start.*ended by itself"):
        start("llama.cpp", ready_s=10)


def test_models_of_another_shape_are_made_once() -> None:
    try:
        env = ensure("llama.cpp")
    except EngineUnavailable as missing:
        pytest.skip(f"engine unavailable: {missing.reason}")
    shape = Shape(layers=1, hidden=64, intermediate=128, heads=2, kv_heads=1, head_dim=32, vocabulary=512)
    path = ensure_model(env, shape)
    written = path.stat().st_mtime_ns
    assert ensure_model(env, shape) == path
    assert path.stat().st_mtime_ns == written
    assert path != ensure_model(env)
