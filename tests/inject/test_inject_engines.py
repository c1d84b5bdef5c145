"""Disturbances of real engines: they take effect there, and the engine is left as it was."""

import json
import os
import threading
import time
import urllib.request

import pytest

from latencyprism import inject
from latencyprism.attach import footprint
from latencyprism.attach.inject import Injector

pytestmark = [
    pytest.mark.engine,
    pytest.mark.root,
    pytest.mark.attach_safety,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs the right to ptrace"),
]


class Asking:
    """One request after the other, with a prompt in words: it passes the tokenizer."""

    def __init__(self, server):
        self.server, self.over, self.answered = server, False, 0
        self.thread = threading.Thread(target=self.run)

    def run(self):
        body = {"model": self.server.model, "prompt": " a b c d" * 8, "max_tokens": 16, "temperature": 0}
        head = {"Content-Type": "application/json"}
        while not self.over:
            asked = urllib.request.Request(
                f"{self.server.url}/v1/completions", json.dumps(body).encode(), head
            )
            with urllib.request.urlopen(asked, timeout=120) as answer:
                assert answer.status == 200
                answer.read()
            self.answered += 1

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.over = True
        self.thread.join()


def left(injector, before):
    """What is of ours; an engine at work opens and closes descriptors and threads itself."""
    end = time.monotonic() + 5
    while True:
        found = footprint.take(injector, ()).left_since(before)
        own = [one for one in found if "latencyprism" in one or "lprism" in one or one.startswith("sys.")]
        own += [one for one in found if one.startswith(("gc callbacks", "monitoring", "switch", "signal"))]
        if not own or time.monotonic() > end:
            return own


def disturb(server, pid, causes):
    injector = Injector(pid)
    before = footprint.take(injector, ())
    with Asking(server) as asking:
        for cause in causes:
            with inject.start(cause, pid, 0.5, 3.0) as injection:
                injection.wait()
            effect = injection.effect_check()
            assert effect.measured > 0 and len(injection.truth()) == 1, (cause, effect.text)
            assert "has not said" not in effect.text and left(injector, before) == []
    assert asking.answered > 0 and server.alive()


def test_transformers_from_within(transformers_server):
    causes = ["python.gil", "python.gc", "python.lock", "log.flood", "engine.event_loop", "engine.tokenizer"]
    disturb(transformers_server, transformers_server.pid, causes)


def test_requests_to_llama(llama_server):
    given = {"url": llama_server.url, "prompt_tokens": 256}
    with inject.start("workload.long_prompt", llama_server.pid, 0.5, 3.0, **given) as injection:
        injection.wait()
    effect = injection.effect_check()
    assert effect.effective and " 0 answered" not in effect.text, effect.text
    assert llama_server.complete(4) == 4


def test_prefixes_of_vllm_are_lost(vllm_server):
    for _ in range(8):
        vllm_server.complete(1, prompt_tokens=256)
    given = {"url": vllm_server.url, "prompt_tokens": 512}
    with inject.start("workload.prefix_cache_lost", vllm_server.pid, 1.0, 4.0, **given) as injection:
        injection.wait()
    effect = injection.effect_check()
    assert effect.effective and "came from the cache" in effect.text, effect.text


def test_a_proxy_before_an_engine(transformers_server):
    url = transformers_server.url
    with inject.start("net.delay", transformers_server.pid, 1.0, 60.0, url=url) as injection:
        body = {"model": transformers_server.model, "prompt": " a b", "max_tokens": 4}
        asked = urllib.request.Request(
            f"http://127.0.0.1:{injection.address()}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        began = time.monotonic()
        with urllib.request.urlopen(asked, timeout=60) as answer:
            assert json.loads(answer.read())["usage"]["completion_tokens"] == 4
        assert time.monotonic() - began >= 0.1
    assert injection.effect_check().effective
