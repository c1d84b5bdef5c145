"""Disturbances by what is asked and by its way: a proxy that is late, and requests beside the others."""

import http.client
import http.server
import json
import socket
import subprocess
import sys
import threading
import time

import pytest

from latencyprism import inject
from latencyprism.errors import BadInput

COUNTS = {"requests": 0, "words": 0, "preemptions": 0.0, "queries": 1000.0, "hits": 900.0}


class Engine(http.server.BaseHTTPRequestHandler):
    """Answers as an engine does, at once, and counts."""

    def do_GET(self):
        text = (
            f'vllm:num_preemptions_total{{engine="0"}} {COUNTS["preemptions"]}\n'
            f'vllm:prefix_cache_queries_total{{engine="0"}} {COUNTS["queries"]}\n'
            f'vllm:prefix_cache_hits_total{{engine="0"}} {COUNTS["hits"]}\n'
        )
        self.answer(text.encode())

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        words = len(body["prompt"].split())
        COUNTS["requests"] += 1
        COUNTS["words"] += words
        COUNTS["queries"] += words
        COUNTS["preemptions"] += body["max_tokens"] > 1
        COUNTS["models"] = body.get("model")
        time.sleep(0.02)
        self.answer(json.dumps({"usage": {"prompt_tokens": words}}).encode())

    def answer(self, body):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def url():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Engine)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def pid():
    process = subprocess.Popen(["/bin/sleep", "60"])
    yield process.pid
    process.kill()
    process.wait()


def ask(port, path="/v1/models"):
    """(status, ms) of a request on a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    began = time.monotonic()
    connection.request("GET", path)
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return answer.status, (time.monotonic() - began) * 1e3


def test_the_proxy_adds_to_each_round_trip(url, pid):
    with inject.start("net.delay", pid, 1.0, 30.0, url=url, reference_ms=120.0) as injection:
        port = injection.address()
        asked = [ask(port) for _ in range(3)]
    assert all(status == 200 and took >= 120 for status, took in asked)
    effect, truth = injection.effect_check(), injection.truth()
    assert effect.effective and effect.asked == 60 and effect.measured >= 60 and len(truth) == 1
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port), timeout=1)


def test_the_proxy_adds_nothing_before_its_time(url, pid):
    with inject.start("net.delay", pid, 1.0, 5.0, url=url, reference_ms=4000.0, lead_s=30.0) as injection:
        status, took = ask(injection.address())
    assert status == 200 and took < 3000
    assert injection.truth() == [] and not injection.effect_check().effective


def test_long_answers_pass_the_proxy_unharmed(pid):
    sent = bytes(range(256)) * 8192
    listener = socket.create_server(("127.0.0.1", 0))

    def serve():
        connection, _ = listener.accept()
        with connection:
            connection.sendall(sent)

    threading.Thread(target=serve, daemon=True).start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with (
        inject.start("net.delay", pid, 0.1, 30.0, url=url) as injection,
        socket.create_connection(("127.0.0.1", injection.address()), timeout=10) as client,
    ):
        got = b""
        while piece := client.recv(1 << 20):
            got += piece
    listener.close()
    assert got == sent


def test_nobody_behind_the_proxy(pid):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with (
        inject.start("net.delay", pid, 0.1, 30.0, url=f"http://127.0.0.1:{port}") as injection,
        pytest.raises((OSError, http.client.HTTPException)),
    ):
        ask(injection.address())
    assert not injection.effect_check().effective


@pytest.mark.parametrize(
    "cause", ["workload.long_prompt", "workload.prefix_cache_lost", "workload.preemption"]
)
def test_requests_are_sent_and_counted(url, pid, cause):
    before = dict(COUNTS)
    with inject.start(cause, pid, 0.25, 4.0, url=url, prompt_tokens=200) as injection:
        injection.wait()
    effect, truth = injection.effect_check(), injection.truth()
    assert effect.effective, effect.text
    assert len(truth) == 1 and COUNTS["requests"] > before["requests"]
    assert COUNTS["models"] is None
    length = (COUNTS["words"] - before["words"]) / (COUNTS["requests"] - before["requests"])
    assert length == {"long_prompt": 200, "prefix_cache_lost": 100, "preemption": 64}[cause.partition(".")[2]]
    asked = {"long_prompt": 0.2, "preemption": 1.0}.get(cause.partition(".")[2])
    if asked is not None:
        assert effect.asked == pytest.approx(asked)


def test_a_model_is_named_when_asked(url, pid):
    with inject.start("workload.long_prompt", pid, 1.0, 1.0, url=url, model="tiny") as injection:
        injection.wait()
    assert COUNTS["models"] == "tiny"


def test_a_stronger_load_is_more(url, pid):
    sent = []
    for strength in (0.1, 2.0):
        before = COUNTS["requests"]
        with inject.start("workload.long_prompt", pid, strength, 1.5, url=url) as injection:
            injection.wait()
        sent.append(COUNTS["requests"] - before)
    assert 0 < sent[0] < sent[1]


def test_a_server_that_is_not_there_is_no_success(pid):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for cause in ("workload.long_prompt", "workload.preemption", "workload.prefix_cache_lost"):
        with inject.start(cause, pid, 0.5, 1.0, url=f"http://127.0.0.1:{port}") as injection:
            injection.wait()
        assert not injection.effect_check().effective


@pytest.mark.parametrize(
    "url",
    [None, "", "http://example.com:80", "http://127.0.0.1", "https://127.0.0.1:1", "http://127.0.0.1:99999",
     "http://127.0.0.1:1@example.com", "http://10.0.0.1:80", "127.0.0.1:80"],
)  # fmt: skip
@pytest.mark.parametrize("cause", ["net.delay", "workload.long_prompt"])
def test_only_this_machine_is_talked_to(pid, cause, url):
    with pytest.raises(BadInput):
        inject.start(cause, pid, url=url)


@pytest.mark.parametrize(
    "options",
    [{"prompt_tokens": 0}, {"prompt_tokens": 10**9}, {"lead_s": -1.0}, {"lead_s": float("nan")},
     {"reference_ms": 0.0}, {"reference_ms": float("inf")}],
)  # fmt: skip
def test_numbers_out_of_range_are_bad_input(url, pid, options):
    with pytest.raises(BadInput):
        inject.start("net.delay", pid, url=url, **options)


def test_the_verb_tells_where_clients_go(url, pid):
    words = [sys.executable, "-m", "latencyprism", "inject", "net.delay", "-p", str(pid), "--url", url]
    verb = subprocess.Popen([*words, "-d", "2", "--i-know", "--json"], stdout=-1, stderr=-1, text=True)
    port = int(verb.stderr.readline().rsplit(":", 1)[1])
    assert ask(port)[0] == 200
    out, _ = verb.communicate(timeout=30)
    assert verb.returncode == 0 and json.loads(out)["effective"]
