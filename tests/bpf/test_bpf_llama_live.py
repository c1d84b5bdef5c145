"""Steps of a real llama.cpp server against the server's own counters: none lost, none invented."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest

from latencyprism.bpf import kernel
from latencyprism.engines.llama_cpp.source import WAKE_INTERVAL_NS, LlamaSource, find
from latencyprism.errors import PrismError, TargetRefused
from latencyprism.lab.serve import Server
from latencyprism.records import Step
from latencyprism.sentinel.priority import OnTime

pytestmark = [pytest.mark.bpf, pytest.mark.root, pytest.mark.engine]

COUNTERS = ("n_decode_total", "prompt_tokens_total", "tokens_predicted_total")


@pytest.fixture
def source(llama_server: Server) -> Iterator[LlamaSource]:
    attached = LlamaSource(llama_server.pid)
    try:
        yield attached
    finally:
        attached.close()


def ask(server: Server, prompt_tokens: int, output_tokens: int, first: int = 300) -> None:
    body = {
        "prompt": [first + index % 500 for index in range(prompt_tokens)],
        "n_predict": output_tokens, "ignore_eos": True, "cache_prompt": True,
    }  # fmt: skip
    request = urllib.request.Request(
        server.url + "/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert json.load(answer)["tokens_predicted"] == output_tokens


def counters(server: Server) -> tuple[int, ...]:
    said = server.metrics()
    return tuple(
        int(next(value for name, value in said.items() if name.endswith(wanted))) for wanted in COUNTERS
    )


def settle(server: Server, source: LlamaSource) -> list[Step]:
    """Steps so far, once the server has finished its last iteration."""
    time.sleep(0.1)
    return source.poll().steps


def counted(steps: list[Step], requests: int) -> tuple[int, ...]:
    """What the server's counters should have grown by. The token sampled from a prompt's last logits is
    predicted, but its step is one of prefill."""
    prefill = sum(step.prefill_tokens or 0 for step in steps)
    decode = sum(step.decode_tokens or 0 for step in steps)
    return len(steps), prefill, decode + requests


def test_counts_are_the_servers_own_under_concurrent_load(llama_server: Server, source: LlamaSource) -> None:
    assert source.engine == "llama.cpp" and source.pids == (llama_server.pid,)
    before = counters(llama_server)
    load = [(700, 6), (40, 30), (5, 50), (300, 20), (1, 12), (257, 9), (90, 40), (513, 3)]
    start_ns = time.monotonic_ns()
    with ThreadPoolExecutor(5) as clients:
        for number, (prompt, output) in enumerate(load):
            clients.submit(ask, llama_server, prompt, output, 300 + number)
    steps = settle(llama_server, source)
    end_ns = time.monotonic_ns()
    growth = tuple(after - first for after, first in zip(counters(llama_server), before))
    assert counted(steps, len(load)) == growth
    assert source.lost == 0 and source.unreadable == 0
    assert [step.step for step in steps] == list(range(len(steps)))
    for first, second in pairwise(steps):
        assert first.end_ns <= second.start_ns and second.gap_ns == second.start_ns - first.end_ns
    assert start_ns <= steps[0].start_ns and steps[-1].end_ns <= end_ns
    assert {step.phase for step in steps} == {"prefill", "decode", "mixed"}
    for step in steps:
        assert step.schedule_ns is not None and step.execute_ns is not None and step.update_ns is not None
        assert step.schedule_ns + step.execute_ns + step.update_ns == step.duration_ns
        assert step.kv_usage is None and step.preempted is None


def test_a_kernel_without_multi_links_gives_the_same(
    llama_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*_: object, **__: object) -> int:
        raise kernel.FeatureMissing("cannot attach uprobes", "Invalid argument", kernel.KERNEL)

    monkeypatch.setattr(kernel, "link_uprobe_multi", unknown)
    source = LlamaSource(llama_server.pid)
    try:
        before = counters(llama_server)
        with ThreadPoolExecutor(3) as clients:
            for number in range(3):
                clients.submit(ask, llama_server, 50, 20, 600 + number)
        steps = settle(llama_server, source)
        growth = tuple(after - first for after, first in zip(counters(llama_server), before))
    finally:
        source.close()
    assert counted(steps, 3) == growth


def test_context_and_attention_work_of_one_request(llama_server: Server, source: LlamaSource) -> None:
    ask(llama_server, 600, 4, first=333)
    steps = settle(llama_server, source)
    assert [step.prefill_tokens for step in steps] == [256, 256, 88, 0, 0, 0]
    assert [step.context_tokens for step in steps] == [256, 512, 600, 601, 602, 603]
    assert [step.attention_work for step in steps] == [256 * 256, 256 * 512, 88 * 600, 0, 0, 0]
    assert [step.decode_tokens for step in steps] == [0, 0, 0, 1, 1, 1]
    # The same prompt again: all but its last token come from the cache.
    ask(llama_server, 600, 2, first=333)
    cached = settle(llama_server, source)
    assert [(step.phase, step.prefill_tokens, step.context_tokens) for step in cached] == [
        ("prefill", 1, 600), ("decode", 0, 601),
    ]  # fmt: skip


def test_spans_lie_inside_their_steps(llama_server: Server, source: LlamaSource) -> None:
    ask(llama_server, 300, 5, first=444)
    time.sleep(0.1)
    window = source.poll()
    by_step = {step.step: step for step in window.steps}
    assert {span.step for span in window.spans} == by_step.keys()
    for span in window.spans:
        step = by_step[span.step or 0]
        assert step.start_ns <= span.start_ns <= span.end_ns <= step.end_ns


def test_a_step_wakes_the_reader_within_milliseconds(llama_server: Server, source: LlamaSource) -> None:
    descriptor = source.fileno()
    assert descriptor is not None
    poll = select.epoll()
    poll.register(descriptor, select.EPOLLIN)
    delays = []
    # As the watch does it: otherwise this measures who else wants the processor.
    with ThreadPoolExecutor(1) as client, OnTime():
        asked = client.submit(ask, llama_server, 8, 60)
        while not asked.done():
            if poll.poll(0.5):
                steps = source.poll().steps
                now_ns = time.monotonic_ns()
                delays += [now_ns - step.end_ns for step in steps]
    poll.close()
    # The last steps of a request come less than an interval after a wake-up; they wait for the next poll.
    assert len(delays) >= 40
    assert sorted(delays)[len(delays) // 2] < WAKE_INTERVAL_NS + 5e6


def test_attached_in_the_middle_of_a_request_only_whole_steps_are_told(llama_server: Server) -> None:
    with ThreadPoolExecutor(1) as client:
        asked = client.submit(ask, llama_server, 20, 400)
        time.sleep(0.15)
        source = LlamaSource(llama_server.pid)
        try:
            asked.result()
            steps = settle(llama_server, source)
        finally:
            source.close()
    assert 0 < len(steps) < 400
    assert {step.phase for step in steps} == {"decode"} and {step.decode_tokens for step in steps} == {1}
    contexts = [step.context_tokens or 0 for step in steps]
    assert contexts == list(range(contexts[0], contexts[0] + len(contexts)))


@pytest.mark.attach_safety
def test_attaching_and_detaching_again_and_again_harms_nothing(llama_server: Server) -> None:
    with ThreadPoolExecutor(2) as clients:
        asked = [clients.submit(ask, llama_server, 30, 150, 300 + number) for number in range(2)]
        for _ in range(5):
            LlamaSource(llama_server.pid).close()
        for answer in asked:
            answer.result()
    assert llama_server.alive()


def test_it_is_found_and_other_processes_are_not(llama_server: Server) -> None:
    path = find(llama_server.pid)
    assert path is not None and "llama" in os.path.basename(path)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        assert find(other.pid) is None
        with pytest.raises(TargetRefused, match="no known decode function"):
            LlamaSource(other.pid)
        other.kill()
    with pytest.raises(PrismError, match="gone"):
        LlamaSource(other.pid)
